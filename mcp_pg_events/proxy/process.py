"""One program that speaks MCP on its standard input and output, and what it takes to start and to end it.

What it writes goes in lines to whoever started it, who slows it down by taking his time; what it is to read waits
here, within bounds. It has a process group of its own, and ends as a whole (specification, 2025-11-25, "Lifecycle":
close its input, wait, SIGTERM, wait, SIGKILL). Next: `stdio_session.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import SubprocessStreamProtocol
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError
from .stderr import StderrLog

__all__ = ["Command", "Keeper", "ServerProcess"]

logger = logging.getLogger(__name__)

READ: Final = 256 * 1024
STDIN_BYTES: Final = 8 * 1024 * 1024
"""What may wait for a program to read it; a larger message passes when nothing else waits."""
EXIT_GRACE: Final = 1.0
"""How long what a program wrote last may take to come, after its end, in seconds."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, with which environment, and how it is treated. Times in seconds, sizes in bytes."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    max_message_size: int
    stop_timeout: float

    @classmethod
    def checked(
        cls, arguments: Sequence[str], *, extra: Mapping[str, str], max_message_size: int, stop_timeout: float
    ) -> Command:
        """The command with this process's environment, less what is the proxy's own: its settings, and those of libpq,
        which may hold the database's password. `extra` comes on top.

        Raises:
            ConfigurationError: there is no such program.
        """
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MCP_PG_EVENTS_") and not (name.startswith("PG") and name.isupper())
        } | dict(extra)
        if isinstance(arguments, str) or not arguments or not all(arguments[:1]):
            raise ConfigurationError("The command is a list of words, its program first: ['npx', '-y', 'some-server']")
        if any("\0" in word for word in arguments):
            raise ConfigurationError("A word of the command contains U+0000")
        found = shutil.which(arguments[0], path=environment.get("PATH"))
        if found is None:
            raise ConfigurationError(
                f"There is no program {arguments[0]!r} that could be run; give its path, or install it"
            )
        return cls((found, *arguments[1:]), environment, max_message_size, stop_timeout)


class Keeper:
    """The process that ends what a killed proxy leaves behind; started with the first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ready(self) -> None:
        """Have it run. Raises OSError when it cannot."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("keeper.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)

    def add(self, group: int) -> None:
        self._tell(b"+%d\n" % group)

    def remove(self, group: int) -> None:
        self._tell(b"-%d\n" % group)

    def _tell(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line)
        except OSError as error:
            logger.warning("The keeper of programs cannot be reached, so a killed proxy may leave some: %s", error)

    async def stop(self) -> None:
        """Every program has ended."""
        if (process := self._process) is not None:
            self._process = None
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.to_thread(process.wait)


class ServerProcess:
    """One run of a command. `on_lines` gets what it writes, in order, and is waited for; `on_exit` is called once, when
    it has ended by itself, with its exit code."""

    def __init__(
        self,
        command: Command,
        keeper: Keeper,
        session_id: str,
        *,
        on_lines: Callable[[list[bytes]], Awaitable[None]],
        on_exit: Callable[[str], None],
    ) -> None:
        self._command = command
        self._keeper = keeper
        self._session_id = session_id
        self._on_lines = on_lines
        self._on_exit = on_exit
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._work = asyncio.Event()
        self._ending = False
        self._taking = False
        self._fault: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Run it.

        Raises:
            OSError: it cannot be run.
        """
        self._keeper.ready()
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(
            lambda: _Protocol(READ, loop),
            *self._command.arguments,
            env=self._command.environment,
            start_new_session=True,
        )
        self._transport = transport
        self._protocol = protocol
        self._group = transport.get_pid()
        self._keeper.add(self._group)
        self._tasks = [
            asyncio.create_task(self._read_stdout(), name="mcp_pg_events.stdout"),
            asyncio.create_task(self._read_stderr(), name="mcp_pg_events.stderr"),
            asyncio.create_task(self._write_stdin(), name="mcp_pg_events.stdin"),
            asyncio.create_task(self._watch(), name="mcp_pg_events.exit"),
        ]

    # --- in and out ---------------------------------------------------------------------------------------------------

    def write(self, message: bytes) -> bool:
        """Give it a message, one line of JSON; False when too much waits to be read by it already."""
        if self._waiting_bytes and self._waiting_bytes + len(message) > STDIN_BYTES:
            return False
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        self._work.set()
        return True

    async def _write_stdin(self) -> None:
        stdin = self._protocol.stdin
        assert stdin is not None
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while self._waiting:
                    message = self._waiting.popleft()
                    stdin.write(message + b"\n")
                    await stdin.drain()
                    self._waiting_bytes -= len(message)
        except (BrokenPipeError, ConnectionResetError):
            # It can be told nothing any more, so that it is over, whether it has ended or not.
            self._fault = self._fault or "closed its input"
            self._waiting.clear()

    async def _read_stdout(self) -> None:
        stdout = self._protocol.stdout
        assert stdout is not None
        begun: list[bytes] = []
        size = 0
        while data := await stdout.read(READ):
            *lines, rest = data.split(b"\n")
            if lines:
                lines[0] = b"".join((*begun, lines[0]))
                begun, size = [], 0
                await self._hand_on(lines)
            begun.append(rest)
            size += len(rest)
            if size > self._command.max_message_size:
                self._fault = f"wrote a message of more than {self._command.max_message_size} bytes"
                return
        await self._hand_on([b"".join(begun)])

    async def _hand_on(self, lines: list[bytes]) -> None:
        self._taking = True
        await self._on_lines(lines)
        self._taking = False

    async def _read_stderr(self) -> None:
        stderr = self._protocol.stderr
        assert stderr is not None
        log = StderrLog(self._session_id, logger)
        try:
            while data := await stderr.read(READ):
                log.feed(data)
        finally:
            log.close()

    # --- its end ------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """It is over when its output is, or soon after it ended or closed its input: a child that it leaves may hold
        its output open."""
        reading, _, writing, _ = self._tasks
        exited = asyncio.ensure_future(self._protocol.exited.wait())
        try:
            await asyncio.wait((reading, exited, writing), return_when=asyncio.FIRST_COMPLETED)
            # What it wrote last comes first, however long the log takes for it.
            while not (reading.done() and exited.done()):
                await asyncio.wait((reading, exited), timeout=EXIT_GRACE, return_when=asyncio.ALL_COMPLETED)
                if not self._taking:
                    break
        finally:
            exited.cancel()
        if reading.done() and not reading.cancelled() and (error := reading.exception()) is not None:
            logger.error("Session %s: what its program wrote could not be handled", self._session_id, exc_info=error)
        if not self._ending:
            code = self._transport.get_returncode()
            self._on_exit(self._fault if code is None and self._fault else _how(code))

    async def end(self) -> None:
        """Let it end, and see to it that it does, with all that it started. What it still writes is dropped."""
        self._ending = True
        if not self._tasks:
            return
        reading, errors, writing, watching = self._tasks
        for task in (reading, writing, watching):
            task.cancel()
        await asyncio.gather(reading, writing, watching, return_exceptions=True)
        assert self._protocol.stdin is not None and self._protocol.stdout is not None
        self._protocol.stdin.close()
        dropping = asyncio.create_task(self._drop_output())
        if not await self._gone(self._command.stop_timeout):
            self._signal(signal.SIGTERM)
            if not await self._gone(self._command.stop_timeout):
                logger.warning("Session %s: its program did not end when asked to, and is killed", self._session_id)
                self._signal(signal.SIGKILL)
        await self._protocol.exited.wait()
        self._keeper.remove(self._group)
        await asyncio.wait((errors,), timeout=EXIT_GRACE)
        for task in (errors, dropping):
            task.cancel()
        await asyncio.gather(errors, dropping, return_exceptions=True)
        self._transport.close()

    async def _drop_output(self) -> None:
        """So that nothing keeps it from ending."""
        assert self._protocol.stdout is not None
        while await self._protocol.stdout.read(READ):
            pass

    async def _gone(self, timeout: float) -> bool:
        """Whether the program, and the group that it was the first of, have ended within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._protocol.exited.wait()
                while self._signal(0):  # noqa: ASYNC110 (nobody tells of the end of a group)
                    await asyncio.sleep(0.02)
                return True
        return False

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self._group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


class _Protocol(SubprocessStreamProtocol):
    """Says when the process has ended, also while others hold its output open."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit, loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


def _how(code: int | None) -> str:
    """How a program ended, for people."""
    if code is None:
        return "closed its output"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
