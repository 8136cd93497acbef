-- What leaves with a partition of events: before it goes, streams that go on keep the highest number in it as their
-- floor. New events are numbered from there, and a client that asks for what was in it is told that it has expired.
--
-- The search_path of these is that of the migration, which is this schema and then pg_temp.

-- Raises the floors of the streams that have, or may get, events after those in a partition; how many were raised.
CREATE OR REPLACE FUNCTION raise_floors(partition regclass, upper_bound timestamptz) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    raised bigint;
BEGIN
    EXECUTE format(
        $query$
        UPDATE streams t SET floor = last.seq
        FROM streams s CROSS JOIN LATERAL (SELECT max(e.seq) AS seq FROM %s e WHERE e.stream = s.number) last
        WHERE s.created_at < $1 AND (s.final_seq IS NULL OR s.ended_at IS NULL OR s.ended_at >= $1)
          AND t.number = s.number AND last.seq > t.floor
        $query$,
        partition
    ) USING upper_bound;
    GET DIAGNOSTICS raised = ROW_COUNT;
    RETURN raised;
END
$function$;

COMMENT ON FUNCTION raise_floors(regclass, timestamptz) IS 'Remembers what leaves with a partition.';

-- Removes a batch of each kind of row that nothing refers to any more, and how many that were. What ended before `horizon`,
-- the beginning of the oldest events that are left, can be resumed no more. A session that has been idle for `idle`, and
-- has no event left, is ended: an app that nobody visits does not do so by itself. The rows of ended workers, and letters
-- to them, stay for a day, for people to look at.
CREATE OR REPLACE FUNCTION remove_rows(horizon timestamptz, idle interval, error text, batch integer)
    RETURNS TABLE (kind text, removed bigint)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
BEGIN
    -- Those that a worker of an earlier revision ended: it does not say when.
    UPDATE streams SET ended_at = now()
    WHERE number IN (SELECT t.number FROM streams t WHERE t.final_seq IS NOT NULL AND t.ended_at IS NULL LIMIT batch);

    kind := 'idle sessions';
    SELECT count(*) INTO removed
    FROM (
        SELECT s.id FROM sessions s
        WHERE s.ended_at IS NULL AND s.seen_at <= now() - idle AND NOT EXISTS (
            SELECT FROM streams t JOIN events e ON e.stream = t.number AND e.created_at >= horizon
            WHERE t.session_id = s.id)
        ORDER BY s.seen_at LIMIT batch
    ) unseen
    WHERE end_session(unseen.id, NULL, NULL, extract(epoch FROM idle)::double precision, true, 'idle', error) IS NOT NULL;
    RETURN NEXT;

    kind := 'streams';
    DELETE FROM streams WHERE number IN (SELECT t.number FROM streams t WHERE t.ended_at < horizon LIMIT batch);
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN NEXT;

    kind := 'sessions';
    DELETE FROM sessions WHERE id IN (
        SELECT s.id FROM sessions s
        WHERE s.ended_at < horizon AND NOT EXISTS (SELECT FROM streams t WHERE t.session_id = s.id) LIMIT batch);
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN NEXT;

    kind := 'inbox';
    DELETE FROM inbox WHERE id IN (
        SELECT i.id FROM inbox i
        WHERE i.created_at < now() - interval '1 day'
          AND NOT EXISTS (SELECT FROM workers w WHERE w.number = i.worker AND w.ended_at IS NULL) LIMIT batch);
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN NEXT;

    kind := 'workers';
    DELETE FROM workers WHERE number IN (
        SELECT w.number FROM workers w
        WHERE w.ended_at < now() - interval '1 day'
          AND NOT EXISTS (SELECT FROM streams t WHERE t.worker = w.number AND t.final_seq IS NULL) LIMIT batch);
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN NEXT;
END
$function$;

COMMENT ON FUNCTION remove_rows(timestamptz, interval, text, integer) IS
    'Removes ended sessions and streams, ended workers, and letters to them.';

-- One step of a pass, for pg_cron and for a worker that is elected: drops partitions whose events are all older than
-- `ttl`, the oldest first; or, where there is none, removes some of the rows that nothing refers to any more. A row for
-- each partition, its name and `dropped` or `contended`, or for each kind of row, and how many were removed; none when
-- nothing is left to do. Where another session reads events in a transaction that goes on, nothing waits longer than a
-- tenth of a second for that: a waiting lock would hold up every append behind it. Then the oldest is `contended`, and
-- everything is left for the next time. A function cannot detach concurrently, as `mcp-pg-events retention` does.
--
-- From the first detach until the commit no append gets through. So nothing shares a transaction with it that takes
-- time: floors are raised before, rows are removed by another call, and no more than `at_most` partitions go at once.
--
-- SECURITY DEFINER, so that a worker's role need not own the tables. It takes no `ttl` below one partition's length, and
-- so nobody can drop with it what is being written.
CREATE OR REPLACE FUNCTION drop_expired(ttl interval, at_most integer DEFAULT 10)
    RETURNS TABLE (what text, result text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET lock_timeout = '100ms'
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
AS $function$
DECLARE
    step CONSTANT interval := ('1 ' || (SELECT s.partition_interval FROM settings s))::interval;
    expired text[];
    uppers timestamptz[];
    horizon timestamptz;
BEGIN
    IF ttl IS NULL OR ttl < step THEN
        RAISE EXCEPTION 'ttl has to be one partition (%) or more, not %', step, ttl
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtextextended('mcp_pg_events.retention', 'events'::regclass::oid::bigint)) THEN
        RETURN;
    END IF;
    SELECT array_agg(old.relname ORDER BY old.upper_bound), array_agg(old.upper_bound ORDER BY old.upper_bound)
    INTO expired, uppers
    FROM (
        SELECT c.relname::text, bounds[2]::timestamptz AS upper_bound
        FROM pg_inherits i
        JOIN pg_class c ON c.oid = i.inhrelid
        CROSS JOIN LATERAL regexp_match(
            pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \(''([^'']+)''\) TO \(''([^'']+)''\)$'
        ) AS bounds
        WHERE i.inhparent = 'events'::regclass AND NOT i.inhdetachpending AND c.relname ~ '^events_p\d{10}(_\d+)?$'
          AND c.relnamespace = (SELECT p.relnamespace FROM pg_class p WHERE p.oid = 'events'::regclass)
          AND bounds[2]::timestamptz <= now() - ttl
        ORDER BY 2 LIMIT at_most
    ) old;
    IF expired IS NOT NULL THEN
        BEGIN
            FOR n IN 1..cardinality(expired) LOOP
                PERFORM raise_floors(quote_ident(expired[n])::regclass, uppers[n]);
            END LOOP;
            FOREACH what IN ARRAY expired LOOP
                EXECUTE format('ALTER TABLE events DETACH PARTITION %I', what);
                EXECUTE format('DROP TABLE %I', what);
            END LOOP;
        EXCEPTION WHEN lock_not_available THEN
            RETURN QUERY SELECT expired[1], 'contended';
            RETURN;
        END;
        RETURN QUERY SELECT name, 'dropped' FROM unnest(expired) name;
        RETURN;
    END IF;
    SELECT min(bounds[1]::timestamptz) INTO horizon
    FROM pg_inherits i
    JOIN pg_class c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \(''([^'']+)''\)') AS bounds
    WHERE i.inhparent = 'events'::regclass;
    RETURN QUERY SELECT r.kind, r.removed::text
    FROM remove_rows(horizon, ttl,
        '{"code":-32000,"message":"The session ended before this request completed","data":{"reason":"session_ended"}}',
        1000) r
    WHERE r.removed > 0;
EXCEPTION WHEN lock_not_available THEN
    -- Somebody works with one of the rows.
    RETURN;
END
$function$;

COMMENT ON FUNCTION drop_expired(interval, integer) IS 'Drops the partitions of events that are older than this.';
REVOKE EXECUTE ON FUNCTION drop_expired(interval, integer) FROM PUBLIC;
