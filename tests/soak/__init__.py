"""A soak: many clients call tools for minutes while workers, connections and PostgreSQL keep failing under them.

    python -m tests.soak --seconds 600

Some workers of one app stand behind haproxy, over a PostgreSQL of the soak's own. Every few seconds something happens
to them: SIGKILL, SIGTERM, SIGSTOP, ended backends, PostgreSQL restarted in order or crashed, every client's connection
cut. Whoever ends is started again at once. The clients make calls with progress, questions, cancellations and
notifications, lose connections of their own accord too, and resume anywhere. In the end every call has an outcome, and
the database is examined. The exit code is 1 if a promise of `docs/explanation/guarantees.md` was broken.

`stage` is what runs, `clients` what works, `faults` what goes wrong, `check` what must hold, `report` what is printed.
pytest collects none of it.
"""
