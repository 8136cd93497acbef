-- Write the finals of calls that cannot write their own: their session ended, or their worker did.
--
-- Each is one statement for whoever calls it, because it holds the rows of the calls' owners, who store nothing meanwhile:
-- a worker whose event loop is blocked between two statements of its own would hold everybody else up for as long.
--
-- Always the same order of locks (session, workers by number, streams by number), so that two of these never deadlock,
-- and always the owners' rows first. FOR UPDATE waits for the append that is under way, whose statement holds
-- FOR KEY SHARE; the epoch, which the append's own condition names, then refuses the appends that were waiting for the
-- row and have an older snapshot. Each statement in here sees what was committed before it.
--
-- They run with the caller's rights, which a worker's role has. The search_path is that of the migration.

-- Ends the open calls among `numbers`, each with one error after what its worker has stored; the streams that it ended.
CREATE OR REPLACE FUNCTION finish_calls(numbers bigint[], error text) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    owners bigint[];
    bound timestamptz;
BEGIN
    SELECT array_agg(DISTINCT t.worker), min(t.created_at) INTO owners, bound
    FROM streams t WHERE t.number = ANY (numbers) AND t.final_seq IS NULL AND t.request_key IS NOT NULL;
    IF bound IS NULL THEN
        RETURN;
    END IF;
    PERFORM FROM workers w WHERE w.number = ANY (owners) ORDER BY w.number FOR UPDATE;
    UPDATE workers w SET epoch = w.epoch + 1 WHERE w.number = ANY (owners);
    -- EXECUTE, with the bound as a literal: a plan that is kept would lock and look into every partition. The bound
    -- leaves room for a clock that was set back.
    RETURN QUERY EXECUTE format(
        $query$
        WITH open AS (
            SELECT t.number, t.request_id, greatest(t.floor, t.last_seq) AS floor FROM streams t
            WHERE t.number = ANY ($1) AND t.final_seq IS NULL AND t.request_key IS NOT NULL
            ORDER BY t.number FOR UPDATE
        ), last AS (
            SELECT open.number, open.request_id,
                   greatest(open.floor, coalesce((SELECT max(e.seq) FROM events e
                       WHERE e.stream = open.number AND e.created_at >= %L::timestamptz), 0)) + 1 AS seq
            FROM open
        ), written AS (
            INSERT INTO events (stream, seq, payload)
            SELECT last.number, last.seq,
                   '{"jsonrpc":"2.0","id":' || last.request_id || ',"error":' || $2 || '}'
            FROM last
        )
        UPDATE streams t SET final_seq = last.seq, ended_at = now() FROM last WHERE t.number = last.number RETURNING t.number
        $query$,
        bound - interval '10 minutes'
    ) USING numbers, error;
END
$function$;

COMMENT ON FUNCTION finish_calls(bigint[], text) IS 'Ends open calls with an error, in the place of their workers.';

-- Closes the standalone stream of a session that has ended; its number, NULL where it had ended before. It has no response,
-- so that its end is its last number.
CREATE OR REPLACE FUNCTION close_standalone(session text) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    closed bigint;
BEGIN
    UPDATE streams t SET final_seq = greatest(t.last_seq, t.floor), ended_at = now()
    WHERE t.session_id = session AND t.request_key IS NULL AND t.final_seq IS NULL
    RETURNING t.number INTO closed;
    RETURN closed;
END
$function$;

COMMENT ON FUNCTION close_standalone(text) IS 'Closes the standalone stream of a session that has ended.';

-- Ends a session: the asker's own where `expire` is false, one that has been idle for `idle` seconds where it is true.
-- The streams that ended with it, its standalone one among them; NULL where there is no such session.
CREATE OR REPLACE FUNCTION end_session(
    session text, asked_server text, asked_owner text, idle double precision, expire boolean, reason text, error text
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    finished bigint[];
BEGIN
    -- FOR UPDATE, which an UPDATE of these columns alone would not take: it waits for the requests that are being opened
    -- (they hold FOR KEY SHARE), so that the statements below see their streams.
    PERFORM FROM sessions s
    WHERE s.id = session AND s.ended_at IS NULL AND CASE
        WHEN expire THEN s.seen_at <= now() - make_interval(secs => idle)
        ELSE s.server = asked_server AND s.owner IS NOT DISTINCT FROM asked_owner
            AND (idle IS NULL OR s.seen_at > now() - make_interval(secs => idle))
    END
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    UPDATE sessions s SET ended_at = now(), ended_reason = reason WHERE s.id = session;
    -- The owners of all that is open in it: finish_calls locks those of the calls alone.
    PERFORM FROM workers w
    WHERE w.number IN (SELECT t.worker FROM streams t WHERE t.session_id = session AND t.final_seq IS NULL)
    ORDER BY w.number FOR UPDATE;
    finished := array(
        SELECT finish_calls(array(
            SELECT t.number FROM streams t
            WHERE t.session_id = session AND t.final_seq IS NULL AND t.request_key IS NOT NULL
        ), error)
    );
    RETURN array_remove(finished || close_standalone(session), NULL);
END
$function$;

COMMENT ON FUNCTION end_session(text, text, text, double precision, boolean, text, text) IS
    'Ends a session and its open calls in one statement.';

-- Whether somebody holds the advisory lock that is a worker's life: its key is the schema's oid and the number.
CREATE OR REPLACE FUNCTION holds_lock(worker bigint) RETURNS boolean
LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $function$
    SELECT EXISTS (
        SELECT FROM pg_catalog.pg_locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.objid::bigint = worker % 2147483648
          AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
          AND l.classid = (SELECT c.relnamespace FROM pg_catalog.pg_class c WHERE c.oid = 'workers'::regclass)
    )
$function$;

COMMENT ON FUNCTION holds_lock(bigint) IS 'Whether the connection lives that a worker''s life depends on.';

-- Ends a worker, its open calls, and the sessions that live on it. With `seen` and `locked` only if it is, once its row is
-- locked, as it was seen: with that last stamp, and with or without its lock. The calls that it ended, and the standalone
-- streams of those sessions; NULL where nothing was to be done, since the worker lives or another one was first.
CREATE OR REPLACE FUNCTION end_worker(
    dead bigint, reason text, error text, seen timestamptz DEFAULT NULL, locked boolean DEFAULT NULL,
    OUT calls bigint[], OUT standalone bigint[]
)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
BEGIN
    -- Sessions first, as everywhere. Those that are opened between the two locks are ended all the same.
    PERFORM FROM sessions s WHERE s.worker = dead AND s.ended_at IS NULL ORDER BY s.id FOR UPDATE;
    PERFORM FROM workers w WHERE w.number = dead AND w.ended_at IS NULL FOR UPDATE;
    UPDATE workers w SET ended_at = now(), ended_reason = reason, epoch = w.epoch + 1
    WHERE w.number = dead AND w.ended_at IS NULL
      AND (seen IS NULL OR (w.seen_at = seen AND holds_lock(w.number) = locked));
    IF NOT FOUND THEN
        RETURN;
    END IF;
    calls := array(
        SELECT finish_calls(array(SELECT t.number FROM streams t WHERE t.worker = dead AND t.final_seq IS NULL), error)
    );
    WITH ended AS (
        UPDATE sessions s SET ended_at = now(), ended_reason = reason
        WHERE s.worker = dead AND s.ended_at IS NULL RETURNING s.id
    ), closed AS (
        UPDATE streams t SET final_seq = greatest(t.last_seq, t.floor), ended_at = now() FROM ended
        WHERE t.session_id = ended.id AND t.request_key IS NULL AND t.final_seq IS NULL RETURNING t.number
    )
    SELECT array_agg(closed.number) INTO standalone FROM closed;
    UPDATE streams t SET reader_worker = NULL WHERE t.reader_worker = dead AND t.final_seq IS NULL;
    DELETE FROM inbox i WHERE i.worker = dead;
END
$function$;

COMMENT ON FUNCTION end_worker(bigint, text, text, timestamptz, boolean) IS
    'Declares a worker dead and ends its open calls in one statement.';
