"""What the proxy makes of a program's output, its complaints and its command, without a program."""

from __future__ import annotations

import json
import logging

import pytest
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from mcp_pg_events.errors import ConfigurationError
from mcp_pg_events.proxy import stderr
from mcp_pg_events.proxy.messages import answer, one_line, read_line
from mcp_pg_events.proxy.process import Command
from mcp_pg_events.proxy.stderr import StderrLog
from mcp_pg_events.proxy.stdio import stdio_app

# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', JSONRPCResponse),
        (b'{"jsonrpc":"2.0","id":"1","error":{"code":1,"message":""}}', JSONRPCError),
        (b'  {"jsonrpc":"2.0","method":"x", "extra":1}\r', JSONRPCNotification),
        (b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":"\\u0000"}}', JSONRPCRequest),
    ],
)
def test_a_message_goes_on_as_it_was_written(line: bytes, kind: type) -> None:
    written = read_line(line)
    assert written is not None
    assert isinstance(written.message, kind)
    assert written.payload == line.strip()


@pytest.mark.parametrize(
    "line",
    [b"", b"hello", b"{}", b"[]", b"7", b"\xff", b'{"jsonrpc":"2.0","method":"x","params":NaN}', b"[" * 100_000],
)
def test_what_is_no_message_is_nothing(line: bytes) -> None:
    assert read_line(line) is None


@pytest.mark.parametrize(
    "rest", [b'"result":{"x":NaN}', b'"result":{"x":"\\ud800"}', b'"result":7', b'"error":"no"', b'"error":{}']
)
def test_an_answer_that_cannot_be_passed_on_is_an_error_under_its_id(rest: bytes) -> None:
    written = read_line(b'{"jsonrpc":"2.0","id":"a",' + rest + b"}")
    assert written is not None
    assert isinstance(written.message, JSONRPCError)
    assert json.loads(written.payload)["id"] == "a"


def test_an_answer_gets_the_id_that_its_client_gave() -> None:
    line = b'{"jsonrpc":"2.0","id":"7","result":{"z":1,"a":2.50}}'
    written = read_line(line)
    assert written is not None
    assert answer(written, "7").payload == line
    assert json.loads(answer(written, 7).payload) == {"jsonrpc": "2.0", "id": 7, "result": {"z": 1, "a": 2.5}}


def test_a_message_over_several_lines_becomes_one() -> None:
    message = json.dumps({"text": "a\nb\r\nc", "n": [1, 2]}, indent=2).encode().replace(b"\n", b"\r\n")
    line = one_line(message)
    assert b"\n" not in line and b"\r" not in line
    assert json.loads(line) == json.loads(message)


# --- standard error ---------------------------------------------------------------------------------------------------


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_lines_are_put_together_cut_and_escaped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = StderrLog("s", logging.getLogger("test"))
    for piece in (
        b"one",
        b" line\ntw",
        b"o\n\n\r\n",
        b"x" * 5000,
        b"x" * 5000,
        b"\n",
        b"\x1b[31mred\rINFO f\xff\xc3\xa9",
    ):
        log.feed(piece)
    log.close()
    assert lines_of(caplog) == [
        "Session s, stderr: one line",
        "Session s, stderr: two",
        f"Session s, stderr: {'x' * stderr.LINE_BYTES} ...",
        "Session s, stderr: \\x1b[31mred\\rINFO f\ufffdé",
    ]


def test_lines_that_come_too_fast_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    log = StderrLog("s", logging.getLogger("test"), clock=lambda: now)
    log.feed(b"x\n" * (stderr.BURST + 50))
    assert len(caplog.records) == stderr.BURST
    now = 0.1
    log.feed(b"y\n" * 3)
    log.close()
    assert lines_of(caplog)[stderr.BURST :] == [
        "Session s, stderr: 50 lines were left out, since they came too fast",
        "Session s, stderr: y",
        "Session s, stderr: y",
        "Session s, stderr: 1 lines were left out, since they came too fast",
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str, **extra: str) -> Command:
    return Command.checked(arguments, extra=extra, max_message_size=1, stop_timeout=1)


def test_a_program_gets_the_environment_less_what_is_the_proxys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MCP_PG_EVENTS_DSN", "PGPASSWORD", "PGHOST", "Pgname", "OTHER"):
        monkeypatch.setenv(name, "x")
    environment = command("sh", PGHOST="given", MORE="1").environment
    assert {name: environment.get(name) for name in ("PGHOST", "Pgname", "OTHER", "MORE")} == {
        "PGHOST": "given",
        "Pgname": "x",
        "OTHER": "x",
        "MORE": "1",
    }
    assert "MCP_PG_EVENTS_DSN" not in environment and "PGPASSWORD" not in environment


@pytest.mark.parametrize("arguments", [("no-such-program-anywhere",), ("/no/such/program",), (), ("",), ("sh", "a\0b")])
def test_a_command_that_cannot_run_is_refused_at_once(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError):
        stdio_app(arguments, "postgresql://nowhere.invalid/db")


@pytest.mark.parametrize(
    "option",
    [
        {"start_timeout": 0},
        {"stop_timeout": -1},
        {"idle_timeout": 0},
        {"keep_alive": float("inf")},
        {"max_processes": 0},
        {"max_message_size": 0},
        {"name": ""},
        {"path": "mcp"},
    ],
)
def test_an_option_that_cannot_work_is_refused_at_once(option: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        stdio_app(["sh"], "postgresql://nowhere.invalid/db", **option)  # type: ignore[arg-type]
