"""What other processes left or did: whether a process runs, whether a file is there. For `until`."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["gone", "made"]


async def gone(*pids: int) -> bool:
    """Whether none of the processes runs; one that nobody has waited for counts as gone."""
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    states = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: ASYNC221 (a test's)
    return all(state.startswith("Z") for state in states)


async def made(path: Path) -> bool:
    """Whether a file is there."""
    return path.exists()  # noqa: ASYNC240 (a test's)
