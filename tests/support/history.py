"""Code of earlier days, from this repository's history, for tests that run it beside the present one.

with checkout_of("0001") as root: ...   # the last code whose newest schema revision was 0001
"""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from tests.support.tools import require_tool

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def checkout_of(revision: str, *, repository: Path = ROOT) -> Iterator[Path]:
    """Unpack the last commit whose `schema.REVISION` was `revision` until the block ends.

    Fails the running test in a sentence where the history does not go back so far.
    """
    require_tool("git", "run `apt-get install git`.")
    if (commit := _last_commit_of(revision, repository)) is None:
        pytest.fail(
            f"The code of schema revision {revision} is not in this checkout's history, and the test of upgrading "
            "needs it: clone the whole repository, or run `git fetch --unshallow`.",
            pytrace=False,
        )
    with tempfile.TemporaryDirectory(prefix=f"code-of-{revision}-") as made:
        archive = _git(repository, "archive", "--format=tar", commit)
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(made, filter="data")
        yield Path(made)


def _last_commit_of(revision: str, repository: Path) -> str | None:
    """The parent of the commit that took this value of REVISION away."""
    line = f'REVISION = "{revision}"'
    found = _git(repository, "log", "--format=%H", f"-S{line}", "--", "mcp_pg_events/schema.py")
    for commit in found.stdout.decode().split():
        before = _git(repository, "show", f"{commit}^:mcp_pg_events/schema.py")
        if before.returncode == 0 and line in before.stdout.decode():
            return f"{commit}^"
    return None


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    # A checkout that belongs to another account is none to git, unless it is told.
    command = ["git", "-c", f"safe.directory={repository}", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=60)
