-- Makes the partition of events for now() and for `ahead` further intervals, and returns how many it made.
--
-- Called by the migration, by every worker, and by an append that met "no partition found". When all of them exist it
-- only reads the catalog. The same rule as `mcp_pg_events.partitions.plan`: every interval, less what is covered
-- already, so that a changed partition_interval neither overlaps an older partition nor leaves a gap.
--
-- SECURITY DEFINER, so that a worker's role need not own the tables. The search_path is that of the migration, which is
-- this schema and then pg_temp: named last, or a caller's temporary table could stand in for `settings`.
CREATE OR REPLACE FUNCTION ensure_partitions(ahead integer DEFAULT 2) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
AS $function$
DECLARE
    parent CONSTANT regclass := 'events'::regclass;
    namespace CONSTANT oid := (SELECT c.relnamespace FROM pg_class c WHERE c.oid = parent);
    unit CONSTANT text := (SELECT s.partition_interval FROM settings s);
    step CONSTANT interval := ('1 ' || unit)::interval;
    start CONSTANT timestamptz := date_trunc(unit, now());
    base text;
    name text;
    gaps tstzrange[];
    gap tstzrange;
BEGIN
    IF ahead IS NULL OR ahead < 0 OR ahead > 1000 THEN
        RAISE EXCEPTION 'ahead must be between 0 and 1000, not %', ahead USING ERRCODE = 'invalid_parameter_value';
    END IF;

    -- Twice: once without a lock, and, when something is missing, once more behind those who are making it now.
    FOR attempt IN 1..2 LOOP
        SELECT array_agg(missing ORDER BY lower(missing)) INTO gaps
        FROM (
            -- A default partition has no bounds, and covers nothing here.
            SELECT coalesce(range_agg(tstzrange(
                replace(bounds[1], 'MINVALUE', '-infinity')::timestamptz,
                replace(bounds[2], 'MAXVALUE', 'infinity')::timestamptz
            )), '{}'::tstzmultirange) AS ranges
            FROM pg_inherits i
            JOIN pg_class c ON c.oid = i.inhrelid
            CROSS JOIN LATERAL regexp_match(
                pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \(''?([^'')]+)''?\) TO \(''?([^'')]+)''?\)$'
            ) AS bounds
            WHERE i.inhparent = parent AND bounds IS NOT NULL
        ) AS covered
        CROSS JOIN generate_series(0, ahead) AS n
        CROSS JOIN LATERAL unnest(
            tstzmultirange(tstzrange(start + n * step, start + (n + 1) * step)) - covered.ranges
        ) AS missing;

        IF gaps IS NULL THEN
            RETURN 0;
        END IF;
        IF attempt = 1 THEN
            PERFORM pg_advisory_xact_lock(hashtextextended('mcp_pg_events.ensure_partitions', namespace::bigint));
        END IF;
    END LOOP;

    FOREACH gap IN ARRAY gaps LOOP
        -- A detached partition keeps its name until it is dropped.
        base := 'events_p' || to_char(lower(gap), 'YYYYMMDDHH24');
        name := base;
        FOR number IN 2..1000 LOOP
            EXIT WHEN NOT EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = namespace AND c.relname = name);
            name := base || '_' || number;
        END LOOP;
        -- Standalone and then ATTACH: CREATE ... PARTITION OF would lock every reader of events out. The CHECK spares
        -- ATTACH its scan, and has no use afterwards.
        EXECUTE format(
            'CREATE TABLE %1$s.%2$I (LIKE %1$s.events INCLUDING ALL, CONSTRAINT bounds CHECK '
            '(created_at IS NOT NULL AND created_at >= %3$L AND created_at < %4$L))',
            namespace::regnamespace, name, lower(gap), upper(gap)
        );
        EXECUTE format(
            'ALTER TABLE %1$s.events ATTACH PARTITION %1$s.%2$I FOR VALUES FROM (%3$L) TO (%4$L)',
            namespace::regnamespace, name, lower(gap), upper(gap)
        );
        EXECUTE format('ALTER TABLE %1$s.%2$I DROP CONSTRAINT bounds', namespace::regnamespace, name);
    END LOOP;
    RETURN cardinality(gaps);
END
$function$;

COMMENT ON FUNCTION ensure_partitions(integer) IS 'Makes the partitions of events for now and some intervals ahead.';
REVOKE EXECUTE ON FUNCTION ensure_partitions(integer) FROM PUBLIC;
