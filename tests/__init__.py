"""The tests of mcp_pg_events; `tests.support` holds what they share, `tests.servers` the real servers they start."""
