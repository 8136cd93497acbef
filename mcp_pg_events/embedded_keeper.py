"""Stops the embedded PostgreSQL when its last user is gone without a word: killed, or out of memory.

One such process sleeps beside every server that `embedded` starts, and costs a few megabytes: it is run as a file and
imports nothing but the standard library. A user that leaves in good order stops the server itself.

Run as `python -I embedded_keeper.py HOME UID GID COMMAND...`; -1 is "as who I am"; COMMAND stops the server.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys


def main() -> None:
    """Sleep until nobody uses the server, and make sure that it is stopped."""
    home, user, group, *stop = sys.argv[1:]
    while True:
        with open(f"{home}/users", "rb") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
        # Let go of it before asking for the lock: a newcomer has that one, and waits for this.
        with open(f"{home}/lock", "rb") as lock, open(f"{home}/users", "rb") as users:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if int(user) < 0:
                subprocess.run(stop, cwd="/", check=False)
            else:
                subprocess.run(stop, cwd="/", check=False, user=int(user), group=int(group), extra_groups=[])
            return


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError:  # the home was removed: a temporary one
        sys.exit(0)
