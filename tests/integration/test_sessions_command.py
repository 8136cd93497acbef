"""`mcp-pg-events sessions`: the pages of the list, one session, and what is said of one that there is not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mcp_pg_events.migrate import upgrade
from tests.support.log import NOTE, RESULT, open_call, open_session, query, running, standalone
from tests.support.sessions_command import fill, sessions

HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] \u202e \r\n\x07"


def listed(dsn: str, *arguments: str) -> Any:
    ran = sessions(dsn, "list", "--json", *arguments)
    assert (ran.code, ran.err) == (0, ""), ran
    return json.loads(ran.out)


def ids(dsn: str, *arguments: str) -> list[str]:
    return [each["id"] for each in listed(dsn, *arguments)["sessions"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "1 2 4 5 7 8 10"),
        (["--state", "ended"], "3 6 9"),
        (["--state", "all"], "1 2 3 4 5 6 7 8 9 10"),
        (["--server", "even"], "2 4 8 10"),
        (["--server", "' OR true --"], ""),
        (["--owner", "ann", "--state", "all"], "5 10"),
        (["--owner", '"ann"'], "5 10"),
        (["--owner", '["client", "issuer", "bob"]', "--state", "all"], "1 6"),
        (["--since", "270m"], "1 2 4"),
        (["--until", "270m"], "5 7 8 10"),
        (["--since", "2020-01-01T00:00+01:00", "--until", "2020-01-02"], ""),
        (["--idle", "5m"], "5 7 8 10"),
        (["--idle", "5m", "--state", "all"], "5 7 8 10"),
        (["--running"], "4 5"),
        (["--method", "tools/call"], "4"),
        (["--method", "tools/call", "--running", "--server", "odd"], ""),
    ],
)
def test_a_list_has_the_sessions_that_were_asked_for(migrated: str, arguments: list[str], expected: str) -> None:
    fill(migrated)
    assert ids(migrated, *arguments) == [f"s{n}" for n in expected.split()]


def test_pages_have_every_session_once_also_when_new_ones_come(migrated: str) -> None:
    fill(migrated, 25)
    # One moment for several, so that the id has to break the tie.
    query(migrated, "UPDATE sessions SET created_at = date_trunc('day', created_at)")
    seen: list[str] = []
    after: list[str] = []
    while True:
        page = listed(migrated, "--state", "all", "--limit", "4", *after)
        seen += [each["id"] for each in page["sessions"]]
        if page["next"] is None:
            break
        query(migrated, "INSERT INTO sessions (id, server) VALUES (%s, 'new')", f"new{len(seen)}")
        after = ["--after", page["next"]]
    assert sorted(seen) == sorted(f"s{n}" for n in range(1, 26))
    shown = sessions(migrated, "list", "--limit", "2").out.splitlines()
    assert len(shown) == 4
    assert shown[-1].startswith("There are more: --after ")


def test_a_list_is_a_table_and_counts_calls_and_readers(migrated: str) -> None:
    assert sessions(migrated, "list").out == "There are no such live sessions.\n"
    fill(migrated)
    head, *lines = sessions(migrated, "list").out.splitlines()
    assert head.split() == ["SESSION", "SERVER", "OWNER", "OPENED", "(UTC)", "STATE", "CALLS", "READERS"]
    [four] = [line for line in lines if line.startswith("s4")]
    assert four.endswith("1      1")
    assert "live, idle 4m" in four
    assert "ended (deleted)" in sessions(migrated, "list", "--state", "ended").out


@pytest.mark.parametrize("after", ["", "x", "é", "W10", "WzEsMl0", "W251bGwsICJcdTAwMDAiXQ"])
def test_a_place_that_no_page_named_is_refused(migrated: str, after: str) -> None:
    ran = sessions(migrated, "list", "--after", after)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "mcp-pg-events: --after takes what an earlier page of this list ended with.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--since", "yesterday"],
        ["--idle", "0s"],
        ["--idle", "5m", "--state", "ended"],
        ["--limit", "0"],
        ["--state", "dead"],
    ],
)
def test_an_option_that_cannot_be_read_is_said_with_exit_code_2(migrated: str, arguments: list[str]) -> None:
    ran = sessions(migrated, "list", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("command", ["show", "end", "purge", "list"])
def test_no_escape_sequence_reaches_a_terminal(migrated: str, command: str) -> None:
    query(
        migrated,
        "INSERT INTO sessions (id, server, owner, initialize, ended_reason) VALUES (%s, %s, %s, %s, %s)",
        *(HOSTILE, HOSTILE, HOSTILE, json.dumps({"clientInfo": {"name": HOSTILE, "version": HOSTILE}}), HOSTILE),
    )
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, method) VALUES (%s, %s, 'i1', %s)",
        *(HOSTILE, HOSTILE, HOSTILE),
    )
    arguments = {"list": [], "purge": ["--yes", HOSTILE]}.get(command, [HOSTILE])
    for each in ([command, *arguments], ["list", "--state", "all"], ["show", HOSTILE], ["show", HOSTILE + "?"]):
        ran = sessions(migrated, *each)
        written = ran.out + ran.err
        assert all(character.isprintable() or character == "\n" for character in written), repr(written)
        assert "[bold]" in written or command in ("end", "purge")


def test_show_has_calls_workers_readers_streams_and_sizes(migrated: str) -> None:
    async def story() -> None:
        async with running(migrated, 2) as (store, other):
            key, opened = await open_session(store, owner='"ann"')
            call = await open_call(store, key)
            for _ in range(3):
                await store.log.append(call, NOTE)
            await store.log.append(standalone(key, opened), NOTE)
            await other.log.attach(key, call.number, 1, patience=5)
            ran = sessions(migrated, "show", key.session_id, "--json")
            found = json.loads(ran.out)
            assert (found["id"], found["owner"], found["ended_at"]) == (key.session_id, '"ann"', None)
            assert (found["streams"], found["calls"], found["events"]) == (3, 1, 5)
            assert found["bytes"] == 4 * len(NOTE) + len(RESULT)
            [running_call] = found["running"]
            assert running_call["stream"] == call.number
            assert running_call["method"] == "tools/call"
            assert (running_call["events"], running_call["alive"]) == (3, True)
            assert running_call["worker"] == store.worker_number()
            assert running_call["reader"] == other.worker_number()
            assert [each["last_seq"] for each in found["newest_streams"]] == [3, 1, 1]
            shown = (sessions(migrated, "show", key.session_id)).out
            assert "running calls  1" in shown
            assert "tools/call" in shown
            assert f"worker {other.worker_number()}" in shown

    asyncio.run(story())


def test_show_says_what_is_not_recorded_of_a_session_that_is_proxied(migrated: str) -> None:
    query(
        migrated,
        "INSERT INTO sessions (id, server, initialize, protocol_version, upstream) VALUES "
        "('direct', 'x', '{}', '2025-11-25', NULL), ('proxied', 'x', '{}', '2025-11-25', ''), "
        """('named', 'x', '{"clientInfo": {"name": "claude", "version": "7"}}', '2025-11-25', NULL)""",
    )
    shown = {
        name: [line.split(maxsplit=1)[1] for line in sessions(migrated, "show", name).out.splitlines() if line][3:7]
        for name in ("direct", "proxied", "named")
    }
    nothing = "not recorded (proxied)"
    assert shown["direct"] == ["unknown", "2025-11-25", "level      not set", "0"]
    assert shown["proxied"] == [nothing, "2025-11-25", f"level      {nothing}", nothing]
    assert shown["named"] == ["claude 7", "2025-11-25", "level      not set", "0"]
    assert [json.loads(sessions(migrated, "show", name, "--json").out)["proxied"] for name in shown] == [
        False,
        True,
        False,
    ]


def test_one_of_something_is_no_plural(migrated: str) -> None:
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{}' FROM streams")
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, final_seq) "
        "SELECT 's4', n, n, 0 FROM generate_series(2, 21) n",
    )
    assert "\n... and 1 older stream\n" in sessions(migrated, "show", "s4").out
    assert sessions(migrated, "end", "s4").out == "Ended, and 1 running call with it.\n"
    assert sessions(migrated, "purge", "s5", "--yes").out.startswith(
        "Ended, and 1 running call with it.\nErased 2 events, "
    )
    query(migrated, "INSERT INTO streams (session_id) VALUES ('s7')")
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT max(number), 1, '{}' FROM streams")
    assert sessions(migrated, "purge", "s7", "--yes").out == (
        "Ended, and 0 running calls with it.\nErased 1 event, 2 B.\n"
    )


def test_show_leaves_sizes_out_that_take_too_long(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT 1, n, 'x' FROM generate_series(1, 200000) n")
    monkeypatch.setattr("mcp_pg_events.operator.sessions.SIZE_PATIENCE", 0.002)
    assert "not added up within" in sessions(migrated, "show", "s4").out
    found = json.loads(sessions(migrated, "show", "s4", "--json").out)
    assert (found["events"], found["bytes"]) == (None, None)
    assert found["running"][0]["events"] == 200000


@pytest.mark.parametrize("command", [["show"], ["end"], ["purge", "--yes"]])
@pytest.mark.parametrize("session", ["nobody", "'; DROP TABLE events --", ""])
def test_a_session_that_there_is_not_is_said(migrated: str, command: list[str], session: str) -> None:
    ran = sessions(migrated, *command, "--", session)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"mcp-pg-events: There is no session {session!r} in schema mcp_events; ")


def test_a_schema_may_have_any_name(migrated: str) -> None:
    schema = 'it\'s "we"ird" {0} %s %% \x7f'.replace("\x7f", "é")
    upgrade(migrated, schema=schema)
    assert listed(migrated, "--schema", schema, "--server", "x", "--idle", "5m") == {"sessions": [], "next": None}
    ran = sessions(migrated, "purge", "--schema", schema, "--yes", "nobody")
    assert ran.err.startswith(f"mcp-pg-events: There is no session 'nobody' in schema {schema};")
