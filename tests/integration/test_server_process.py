"""One program, without a session around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mcp_pg_events.proxy.process import Command, Keeper, ServerProcess
from tests.support.processes import gone
from tests.support.until import until

pytestmark = pytest.mark.anyio


class Heard:
    """What a program wrote, and how it ended, in the order in which that came."""

    def __init__(self, slowness: float = 0.0) -> None:
        self.all: list[str] = []
        self.over = asyncio.Event()
        self._slowness = slowness

    async def lines(self, lines: list[bytes]) -> None:
        await asyncio.sleep(self._slowness)
        self.all += [line.decode() for line in lines if line]

    def exit(self, how: str) -> None:
        self.all.append(how)
        self.over.set()


@asynccontextmanager
async def running(script: str, heard: Heard, limit: int = 2**20) -> AsyncIterator[ServerProcess]:
    keeper = Keeper()
    command = Command.checked(["sh", "-c", script], extra={}, max_message_size=limit, stop_timeout=1.0)
    process = ServerProcess(command, keeper, "session", on_lines=heard.lines, on_exit=heard.exit)
    await process.start()
    try:
        yield process
    finally:
        await process.end()
        await keeper.stop()


async def test_what_it_wrote_last_comes_before_its_end_however_long_it_takes() -> None:
    heard = Heard(slowness=2.5)
    async with running("echo one; echo two; exit 3", heard), asyncio.timeout(10):
        await heard.over.wait()
    assert heard.all == ["one", "two", "ended with exit code 3"]


async def test_a_line_that_comes_in_pieces_and_one_without_an_end_are_whole() -> None:
    heard = Heard()
    script = "printf on; sleep 0.1; printf 'e\\ntwo\\r\\nth'; sleep 0.1; printf ree"
    async with running(script, heard), asyncio.timeout(10):
        await heard.over.wait()
    assert heard.all == ["one", "two\r", "three", "ended with exit code 0"]


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("kill -9 $$", "was ended by SIGKILL"),
        ("exec >&-; sleep 60", "closed its output"),
        ("head -c 3000000 /dev/zero; sleep 60", "wrote a message of more than 1048576 bytes"),
        ("sleep 60 & exit 4", "ended with exit code 4"),
    ],
)
async def test_each_end_has_its_name(script: str, how: str) -> None:
    heard = Heard()
    async with running(script, heard), asyncio.timeout(10):
        await heard.over.wait()
    assert heard.all == [how]


async def test_it_is_told_to_end_by_its_input_first() -> None:
    heard = Heard()
    async with running("cat; echo by itself; exit 0", heard) as process:
        assert process.write(b"hello")
        async with asyncio.timeout(5):
            while heard.all != ["hello"]:  # noqa: ASYNC110 (a test's)
                await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
        await process.end()
        assert asyncio.get_running_loop().time() - began < 0.9
    assert heard.all == ["hello"]


@pytest.mark.parametrize("rest", ["cat", "trap '' TERM; while :; do sleep 1; done"], ids=["polite", "stubborn"])
async def test_nothing_of_its_group_is_left(rest: str) -> None:
    heard = Heard()
    script = f"(trap '' TERM; sleep 60) & echo $$ $!; {rest}"
    async with running(script, heard), asyncio.timeout(10):
        while not heard.all:  # noqa: ASYNC110 (a test's)
            await asyncio.sleep(0.01)
    await until(lambda: gone(*map(int, heard.all[0].split())))
