-- Tell the worker that runs a call when a reader of its stream attaches on another one.
--
-- The owner looks up who reads a stream after each of its commits only once it was told so; in the common case, where
-- the reader is on the owner itself, it never has to. A trigger, and not part of the statement that attaches, because
-- workers of an older release, which run beside newer ones during an upgrade, attach without knowing of it.
--
-- The notification is sent by the commit that attaches. What the owner committed before it hears of that, it looks up
-- when it does.
CREATE FUNCTION tell_owner() RETURNS trigger
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $function$
BEGIN
    PERFORM pg_catalog.pg_notify(
        'mcp_pg_events_' || (SELECT c.relnamespace::bigint FROM pg_catalog.pg_class c WHERE c.oid = TG_RELID)
            || '_' || NEW.worker,
        'a' || NEW.number || ':' || NEW.reader_generation
    );
    RETURN NULL;
END
$function$;

COMMENT ON FUNCTION tell_owner() IS 'Tells the worker that runs a call of a reader on another worker.';

CREATE TRIGGER tell_owner AFTER UPDATE OF reader_generation ON streams
    FOR EACH ROW
    WHEN (NEW.final_seq IS NULL AND NEW.worker IS NOT NULL AND NEW.reader_worker <> NEW.worker)
    EXECUTE FUNCTION tell_owner();
