-- What leaves with a partition of events: before it goes, streams that go on keep the highest number in it as their
-- floor. New events are numbered from there, and a client that asks for what was in it is told that it has expired.
--
-- The search_path of these is that of the migration, which is this schema and then pg_temp.

-- Raises the floors of streams that have, or may get, events after those in a partition: of `at_most` streams, in the order
-- of their numbers, which is the one order in which streams are locked, and from the first one after `after`. The last
-- number that was raised; NULL where there was none. A caller goes on from there in another transaction, since nobody
-- stores into a stream while its row is locked.
CREATE OR REPLACE FUNCTION raise_floors(
    partition regclass, upper_bound timestamptz, after bigint DEFAULT 0, at_most integer DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    reached bigint;
BEGIN
    EXECUTE format(
        $query$
        WITH leaving AS MATERIALIZED (
            SELECT s.number, last.seq
            FROM streams s CROSS JOIN LATERAL (SELECT max(e.seq) AS seq FROM %s e WHERE e.stream = s.number) last
            WHERE s.number > $2 AND s.created_at < $1 AND (s.final_seq IS NULL OR s.ended_at IS NULL OR s.ended_at >= $1)
              AND last.seq > s.floor
            ORDER BY s.number LIMIT $3
        ), locked AS MATERIALIZED (
            SELECT t.number, leaving.seq FROM streams t JOIN leaving ON leaving.number = t.number
            ORDER BY t.number FOR NO KEY UPDATE OF t
        ), raised AS (
            UPDATE streams t SET floor = greatest(t.floor, locked.seq) FROM locked WHERE t.number = locked.number
        )
        SELECT max(leaving.number) FROM leaving
        $query$,
        partition
    ) INTO reached USING upper_bound, after, at_most;
    RETURN reached;
END
$function$;

COMMENT ON FUNCTION raise_floors(regclass, timestamptz, bigint, integer) IS 'Remembers what leaves with a partition.';

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

-- One step of a pass, for pg_cron and for a worker that is elected. The first of these that there is to do: raise the floors
-- of some streams that go on, drop the partitions whose events are all older than `ttl`, the oldest first, or remove some
-- of the rows that nothing refers to any more. A row says what was done: a partition's name and `floors raised`, `dropped`
-- or `contended`, or a kind of row and how many were removed; none when nothing is left to do. Where another session
-- reads events in a transaction that goes on, nothing waits longer than a tenth of a second for that: a waiting lock would
-- hold up every append behind it. Then the oldest is `contended`, and everything is left for the next time. A function
-- cannot detach concurrently, as `mcp-pg-events retention` does. A partition that is being detached concurrently, by
-- that command or by somebody else, is left to whoever does: `detach pending`.
--
-- From the first detach until the commit no append gets through. So nothing shares a transaction with it that takes
-- time: floors are raised and rows are removed by calls of their own, and no more than `at_most` partitions go at once.
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
    unit CONSTANT text := (SELECT s.partition_interval FROM settings s);
    -- The shortest month, so that none is refused which another one allows.
    step CONSTANT interval := CASE unit WHEN 'month' THEN interval '28 days' ELSE ('1 ' || unit)::interval END;
    given CONSTANT interval := ttl;
    expired text[];
    uppers timestamptz[];
    horizon timestamptz;
BEGIN
    -- To days and hours, as they are from now back: comparisons take every month for 30 days, so that one of '-1000 months
    -- 30001 days' would pass for a day, and lie in the future.
    ttl := now() - (now() - ttl);
    IF ttl IS NULL OR ttl < step OR ttl >= interval '36500 days' THEN
        RAISE EXCEPTION 'ttl has to be one partition (1 %) or more, and less than 36500 days, not %', unit, given
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtextextended('mcp_pg_events.retention', 'events'::regclass::oid::bigint)) THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT c.relname::text, 'detach pending' FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'events'::regclass AND i.inhdetachpending;
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
            -- The newest first: a stream's floor then covers the older ones too.
            FOR n IN REVERSE cardinality(expired)..1 LOOP
                IF raise_floors(quote_ident(expired[n])::regclass, uppers[n], 0, 1000) IS NOT NULL THEN
                    RETURN QUERY SELECT expired[n], 'floors raised';
                    RETURN;
                END IF;
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
