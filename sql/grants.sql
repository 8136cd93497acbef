-- The least that a worker needs: `mcp-pg-events migrate --worker-role ROLE` runs this after the migrations.
-- The role owns nothing here, and makes partitions through ensure_partitions alone. Identity columns need no grant on
-- their sequences.
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.sessions, {schema}.streams, {schema}.workers, {schema}.inbox TO {role};
GRANT SELECT, INSERT ON {schema}.events TO {role};
GRANT SELECT ON {schema}.settings, {schema}.alembic_version TO {role};
GRANT EXECUTE ON FUNCTION {schema}.ensure_partitions(integer) TO {role};
GRANT EXECUTE ON FUNCTION {schema}.note_timeline() TO {role};
GRANT EXECUTE ON FUNCTION {schema}.drop_expired(interval, integer) TO {role};
