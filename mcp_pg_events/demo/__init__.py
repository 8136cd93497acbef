"""The main job on real parts, in under twenty seconds: what `mcp-pg-events demo` runs.

    client (a process, the SDK's) ─▶ forwarder (round robin, cuts connections) ─▶ two workers ─▶ PostgreSQL

`run` starts them and counts; `forwarder` forwards and cuts; `server` and `client` are the other processes; `watch` asks
the database who holds what; `show` puts it on the terminal.
"""
