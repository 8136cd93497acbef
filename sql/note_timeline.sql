-- Notices that the server goes on along another timeline, and returns the timeline; NULL where it cannot be told.
--
-- A standby that was promoted may lack what its primary had acknowledged last, numbers included: sequences and counters
-- went back, and would give clients a second event under an id that they know. So every open stream, and the numbers of
-- streams and workers, skip ahead of whatever was lost. Called on every new connection, before it stores anything.
--
-- SECURITY DEFINER, and its search_path, as in ensure_partitions.
CREATE OR REPLACE FUNCTION note_timeline() RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $function$
DECLARE
    current text;
BEGIN
    BEGIN
        current := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    EXCEPTION WHEN OTHERS THEN
        -- A standby, or a service that hides its log.
        RETURN NULL;
    END;
    IF (SELECT s.timeline FROM settings s) = current THEN
        RETURN current;
    END IF;
    UPDATE settings SET timeline = current WHERE timeline IS NULL;
    IF FOUND THEN
        RETURN current;
    END IF;
    UPDATE settings SET timeline = current WHERE timeline <> current;
    IF FOUND THEN
        PERFORM FROM streams WHERE final_seq IS NULL ORDER BY number FOR UPDATE;
        UPDATE streams SET last_seq = greatest(last_seq, floor) + 1000000 WHERE final_seq IS NULL;
        PERFORM setval(s.name, nextval(s.name) + 100000)
        FROM (VALUES ('streams'), ('workers'), ('inbox')) AS t(name),
            LATERAL (SELECT pg_get_serial_sequence(t.name, CASE t.name WHEN 'inbox' THEN 'id' ELSE 'number' END)) AS s(name);
    END IF;
    RETURN current;
END
$function$;

COMMENT ON FUNCTION note_timeline() IS 'Skips numbers after a failover, so that none is given twice.';
REVOKE EXECUTE ON FUNCTION note_timeline() FROM PUBLIC;
