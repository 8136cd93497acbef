"""What an operator's commands do: look at sessions, end and purge them, follow one, carry one elsewhere, count.

`desk.py` has the connection, `statements.py` the SQL. Everything here blocks, and nothing here knows the session side:
workers learn of what an operator does as they learn it from each other. Next: `cli/`, which shows it.
"""
