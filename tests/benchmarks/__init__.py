"""Benchmarks against the peers, in one run and in alternating rounds: `python -m tests.benchmarks --docs`.

Each module but the helpers below is one benchmark: `run(bench)` adds figures and ratios to a report.

    environment.py  the PostgreSQL of the run (fsync on), worker processes, what the machine is
    apps.py         the servers under test, in processes of their own
    wire.py         a client of blocking sockets, which costs little and sees what arrives when it arrives
    figures.py      rounds, medians, ratios, tables, JSON
    charts.py       SVG
    page.py         docs/benchmarks/ and the README's lines
"""
