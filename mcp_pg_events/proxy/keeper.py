"""Ends the programs of a proxy that is gone without a word: killed, or out of memory.

A decent program ends when its standard input does, which happens whoever ends the proxy. For the others one such
process sleeps beside each replica of a stdio proxy: it is told the process groups that run (`+123`, `-123`, one a
line), and when the proxy goes, ends what is left of them. It is run as a file, `python -I keeper.py`, and imports
nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

_GRACE = 2.0
"""What programs get to end by themselves, and again after SIGTERM, in seconds."""


def main() -> None:
    """Sleep until the proxy is gone, and end the groups that it has left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The proxy decides when it is over, and says so by closing the pipe.
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    _wait(groups)
    _send(groups, signal.SIGTERM)
    _wait(groups)
    _send(groups, signal.SIGKILL)


def _wait(groups: set[int]) -> None:
    deadline = time.monotonic() + _GRACE
    while groups and time.monotonic() < deadline:
        _send(groups, 0)
        time.sleep(0.05)


def _send(groups: set[int], number: int) -> None:
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.discard(group)
        except PermissionError:
            pass


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
