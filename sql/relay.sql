-- The ends of workers and sessions where streams are read from an upstream, for a proxy.

-- Ends a worker. What it does is what `end_worker` in finish.sql does, which it replaces, but for streams that another
-- replica can go on with, because the upstream gave ids in them: those lose their worker and wait, adrift, for a client
-- whose credential the upstream takes. The other calls of proxied sessions end with an error of their own.
CREATE OR REPLACE FUNCTION end_worker(
    dead bigint, reason text, error text, seen timestamptz DEFAULT NULL, locked boolean DEFAULT NULL,
    OUT calls bigint[], OUT standalone bigint[]
)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    lost CONSTANT text := '{"code":-32000,"message":"The upstream''s response to this request is lost",'
        '"data":{"reason":"upstream_lost"}}';
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
    UPDATE streams t SET worker = NULL, adrift_since = now() FROM sessions s
    WHERE t.worker = dead AND t.final_seq IS NULL AND (t.upstream_id IS NOT NULL OR t.request_key IS NULL)
      AND s.id = t.session_id AND s.upstream IS NOT NULL AND s.ended_at IS NULL;
    calls := array(
        SELECT finish_calls(array(
            SELECT t.number FROM streams t JOIN sessions s ON s.id = t.session_id
            WHERE t.worker = dead AND t.final_seq IS NULL AND s.upstream IS NOT NULL
        ), lost)
    ) || array(
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

-- Closes the standalone stream of a session that has ended. Where a worker reads it from an upstream, that worker numbers
-- its events, as those of a call, and is fenced in the same way. `end_session`, which calls this, has locked its row.
CREATE OR REPLACE FUNCTION close_standalone(session text) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $function$
DECLARE
    relayed streams;
    stored bigint := 0;
    closed bigint;
BEGIN
    SELECT t.* INTO relayed FROM streams t JOIN sessions s ON s.id = t.session_id
    WHERE t.session_id = session AND t.request_key IS NULL AND t.final_seq IS NULL AND s.upstream IS NOT NULL;
    IF FOUND THEN
        UPDATE workers w SET epoch = w.epoch + 1 WHERE w.number = relayed.worker;
        -- EXECUTE for the same reason as in finish_calls.
        EXECUTE format(
            'SELECT coalesce(max(e.seq), 0) FROM events e WHERE e.stream = $1 AND e.created_at >= %L::timestamptz',
            relayed.created_at - interval '10 minutes'
        ) INTO stored USING relayed.number;
    END IF;
    UPDATE streams t SET final_seq = greatest(t.last_seq, t.floor, stored), ended_at = now()
    WHERE t.session_id = session AND t.request_key IS NULL AND t.final_seq IS NULL
    RETURNING t.number INTO closed;
    RETURN closed;
END
$function$;
