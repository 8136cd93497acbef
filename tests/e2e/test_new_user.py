"""Every command as somebody tries it for the first time: without a database, with a wrong one, with an empty one, in a
pipe, and on a terminal."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from psycopg import sql

from mcp_pg_events.cli import app as command_line
from tests.support.command import ROOT, Ran, mcp_pg_events, without_settings
from tests.support.log import query
from tests.support.postgres import PASSWORD, database_name, dsn_url

SESSION = "5f0c2a60c9b94d0ab1c7f5a3c2a1b6de"
FILE = "FILE"
"""In the place of a file that an export wrote."""

COMMANDS: dict[str, list[str]] = {
    "migrate": [],
    "retention": ["--ttl", "7d"],
    "doctor": [],
    "stats": [],
    "tail": [SESSION, "--no-follow"],
    "export": [SESSION],
    "import": [FILE],
    "sessions list": ["--state", "all"],
    "sessions show": [SESSION],
    "sessions end": [SESSION],
    "sessions purge": [SESSION, "--yes"],
}
ELSEWHERE = {"serve", "proxy", "demo"}
"""Those that run servers have tests of their own."""

OF_A_SESSION = ["tail", "export", "sessions show", "sessions end", "sessions purge"]

HEADER = {
    **{"type": "header", "format": "mcp-pg-events session", "version": 1, "revision": "0008", "exported_at": "x"},
    "session": {
        **{"id": SESSION, "server": "x", "owner": None, "initialize": None, "protocol_version": None},
        **{"log_level": None, "subscriptions": [], "worker": None, "told": 0, "upstream": None, "ended_reason": None},
        **{"created_at": "2026-01-01T00:00:00+00:00", "seen_at": "2026-01-01T00:00:00+00:00", "ended_at": None},
    },
}


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(command_line)
    found = {}
    for name, each in group.commands.items():
        for second, command in getattr(each, "commands", {"": each}).items():
            found[f"{name} {second}".strip()] = command
    return found


def has(name: str, option: str) -> bool:
    return any(option in each.opts for each in commands()[name].params)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """`run(name, *more, **environment)`: a command with the arguments that it needs."""
    file = tmp_path / "session.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, {"type": "end", "streams": 0, "events": 0})))

    def run_it(name: str, *more: str, **environment: str) -> Ran:
        arguments = [str(file) if each == FILE else each for each in COMMANDS[name]]
        return mcp_pg_events(*name.split(), *arguments, *more, **environment)

    return run_it


def in_one_sentence(ran: Ran, *says: str) -> None:
    assert (ran.code, ran.out) == (1, ""), ran
    assert re.fullmatch(r"mcp-pg-events: [^\n]+\n", ran.err), ran.err
    assert all(each in ran.err for each in says), ran.err
    assert PASSWORD not in ran.err


def plain(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_every_command_is_tried_here_or_elsewhere() -> None:
    assert sorted(commands()) == sorted([*COMMANDS, *ELSEWHERE])


@pytest.mark.parametrize("name", sorted([*COMMANDS, *ELSEWHERE]))
def test_it_explains_itself(name: str) -> None:
    ran = mcp_pg_events(*name.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"mcp-pg-events {name}" in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_database_it_says_how_to_give_one(name: str, run: Any) -> None:
    in_one_sentence(run(name), "No database was given; set MCP_PG_EVENTS_DSN or pass --dsn")
    in_one_sentence(run(name, MCP_PG_EVENTS_DSN=""), "No database was given")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dsn_that_cannot_be_read_is_not_repeated(name: str, run: Any) -> None:
    in_one_sentence(run(name, "--dsn", f"nonsense {PASSWORD}"), "neither a postgresql:// URI")


@pytest.mark.parametrize("change", [{"port": 1}, {"password": "wrong-" + PASSWORD}, {"dbname": "nowhere"}], ids=str)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_database_that_lets_nobody_in_is_said(
    name: str, run: Any, postgres_dsn: str, change: dict[str, str | int]
) -> None:
    ran = run(name, MCP_PG_EVENTS_DSN=dsn_url(postgres_dsn, **change))
    if name == "doctor":
        assert (ran.code, ran.err) == (1, "")
        assert ran.out.startswith("fail  connection") and PASSWORD not in ran.out
    else:
        who = "the migration" if name == "migrate" else f"`mcp-pg-events {name}`"
        in_one_sentence(ran, f"PostgreSQL did not let {who} in: ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("migrate", "doctor")])
def test_a_role_without_rights_is_said(name: str, run: Any, migrated: str) -> None:
    role = f"nobody_{database_name(migrated)}"
    query(migrated, sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(PASSWORD)))
    try:
        ran = run(name, MCP_PG_EVENTS_DSN=dsn_url(migrated, user=role, password=PASSWORD))
        in_one_sentence(ran, f"The role that runs `mcp-pg-events {name}` lacks a right: permission denied for ")
    finally:
        query(migrated, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "migrate"])
def test_a_database_without_the_tables_is_said(name: str, run: Any, database: str, migrated: str) -> None:
    for ran in (run(name, MCP_PG_EVENTS_DSN=database), run(name, "--schema", "other", MCP_PG_EVENTS_DSN=migrated)):
        if name == "doctor":
            assert (ran.code, "fail  schema" in ran.out) == (1, True)
        else:
            in_one_sentence(ran, "run `mcp-pg-events migrate`")
    in_one_sentence(run(name, "--schema", "pg_mine", MCP_PG_EVENTS_DSN=migrated), "reserved by PostgreSQL")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("migrate", "doctor", "retention")])
def test_tables_of_another_time_are_said(name: str, run: Any, migrated: str) -> None:
    query(migrated, "UPDATE alembic_version SET version_num = '0001'")
    in_one_sentence(run(name, MCP_PG_EVENTS_DSN=migrated), "is at revision 0001", "run `mcp-pg-events migrate`")
    query(migrated, "UPDATE alembic_version SET version_num = '9999'")
    query(migrated, "UPDATE settings SET oldest_worker = '9999'")
    in_one_sentence(run(name, MCP_PG_EVENTS_DSN=migrated), "from revision 9999 on", "upgrade mcp_pg_events")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_database_is_fine(name: str, run: Any, migrated: str) -> None:
    ran = run(name, MCP_PG_EVENTS_DSN=migrated)
    if name in OF_A_SESSION:
        in_one_sentence(ran, f"There is no session '{SESSION}' in schema mcp_events")
    else:
        assert (ran.code, ran.err) == (0, ""), ran
        assert ran.out and plain(ran.out), "no colours where there is no terminal"


@pytest.mark.parametrize("name", [name for name in COMMANDS if has(name, "--json")])
def test_its_json_is_json_and_nothing_else(name: str, run: Any, migrated: str) -> None:
    if name in OF_A_SESSION:
        query(migrated, "INSERT INTO sessions (id, server) VALUES (%s, 'x')", SESSION)
        query(
            migrated,
            "INSERT INTO streams (session_id, request_id, request_key, method) VALUES (%s, '1', 'i1', 'tools/call')",
            SESSION,
        )
        query(migrated, "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{\"a\": 1}' FROM streams")
    ran = run(name, "--json", MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.isascii()
    if name == "tail":
        assert [json.loads(line)["type"] for line in ran.out.splitlines()] == ["message"]
    else:
        [line] = ran.out.splitlines()
        assert isinstance(json.loads(line), dict)


# --- pipes and terminals ----------------------------------------------------------------------------------------------


def program(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mcp_pg_events", *name.split(), *arguments]


def test_a_pipe_that_nobody_reads_any_more_is_no_failure(migrated: str) -> None:
    query(
        migrated,
        "INSERT INTO sessions (id, server) "
        "SELECT md5(n::text) || repeat('x', 500), 'x' FROM generate_series(1, 1000) n",
    )
    query(migrated, "INSERT INTO streams (session_id) VALUES ('s')")
    query(migrated, "INSERT INTO sessions (id, server) VALUES ('s', 'x')")
    query(
        migrated,
        "INSERT INTO events (stream, seq, payload) SELECT 1, n, repeat('x', 1000) FROM generate_series(1, 1000) n",
    )
    for arguments in (["sessions list", "--limit", "1000"], ["export", "s"], ["tail", "s"]):
        process = subprocess.Popen(
            program(*arguments),
            cwd=ROOT,
            env=without_settings(MCP_PG_EVENTS_DSN=migrated),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""
        process.stderr.close()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["stats --help"], ["migrate"], ["migrate", "--sql"]),
        *(["doctor"], ["doctor", "--json"], ["stats"], ["stats", "--json"], ["retention"], ["sessions list"]),
        *(["demo", "--events", "1", "--seconds", "1", "--cuts", "0"], ["import", FILE]),
    ],
    ids=" ".join,
)
def test_a_pipe_that_nobody_reads_from_the_beginning_is_no_failure(
    arguments: list[str], migrated: str, run: Any, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            program(*(str(tmp_path / "session.jsonl") if each == FILE else each for each in arguments)),
            cwd=ROOT,
            env=without_settings(MCP_PG_EVENTS_DSN=migrated),
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctor"], b"mcp-pg-events: No database was given"),
        (["doctor", "--dsn", "DSN", "--schema", "nobodys"], b""),
        (["doctor", "--dsn", "DSN", "--schema", "nobodys", "--json"], b""),
        (["proxy", "--upstream", "http://127.0.0.1:9/mcp", "--check"], b""),
    ],
)
def test_a_failure_is_one_also_where_nobody_reads(arguments: list[str], said: bytes, migrated: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    given = [migrated if each == "DSN" else each for each in arguments]
    ran = subprocess.run(program(*given), cwd=ROOT, env=without_settings(), stdout=writer, stderr=-1, check=False)
    os.close(writer)
    assert ran.returncode == 1 and ran.stderr.startswith(said) and (said or not ran.stderr), ran


def on_a_terminal(dsn: str, name: str, *arguments: str, answer: str = "") -> tuple[int, str]:
    """Exit code and all that was written of a command on a terminal, to which somebody typed `answer`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        program(name, *arguments),
        cwd=ROOT,
        env=without_settings(MCP_PG_EVENTS_DSN=dsn, TERM="xterm-256color", COLUMNS="80"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    if answer:
        os.write(ours, answer.encode())
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError as error:
        # Linux says so when the other side has closed.
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    return process.wait(20), written.decode()


def test_a_terminal_has_colours_and_is_asked_before_a_purge(migrated: str) -> None:
    hostile = "\x1b[31m]"
    query(migrated, "INSERT INTO sessions (id, server) VALUES ('s', %s)", hostile)
    query(migrated, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, 'x')")
    code, written = on_a_terminal(migrated, "stats")
    assert (code, "█" in written, "\x1b[36m" in written) == (0, True, True)
    code, written = on_a_terminal(migrated, "sessions list")
    assert (code, "\\x1b[31m]" in written, hostile in written) == (0, True, False)
    for answer in ("n\n", "\n", "\x04"):
        code, written = on_a_terminal(migrated, "sessions purge", "s", answer=answer)
        assert code == 1
        assert "Erase the payloads of this session? It lives, and is ended first. [y/N]" in written
        assert hostile not in written
        assert query(migrated, "SELECT ended_at FROM sessions") == [(None,)]
    code, written = on_a_terminal(migrated, "sessions purge", "s", answer="y\n")
    assert (code, "Erased 0 events" in written) == (0, True)
    assert query(migrated, "SELECT ended_reason FROM sessions") == [("deleted",)]
    code, written = on_a_terminal(migrated, "import")
    assert (code, "Give a file" in written) == (2, True)
