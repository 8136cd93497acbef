"""`python -m mcp_pg_events`: the same as the `mcp-pg-events` command."""

from mcp_pg_events.cli import main

if __name__ == "__main__":
    main()
