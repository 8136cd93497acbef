"""What the demo looks like: a live table on a terminal, plain lines elsewhere. It only shows; `run` counts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .watch import Stream

__all__ = ["Screen", "View"]

_COLOURS = ("cyan", "magenta")


@dataclass(slots=True)
class View:
    """Everything on the screen."""

    events: int
    pids: list[int] = field(default_factory=list[int])
    requests: list[int] = field(default_factory=lambda: [0, 0])
    streams: Sequence[Stream] = ()
    received: int = 0
    cuts: int = 0
    connected_to: int | None = None
    """The worker (an index) at the other end of the client's connection for the call; None while it is cut."""


class Screen:
    """Shows a `View` until left, and every `say` in it (the last few) or as a line."""

    def __init__(self, console: Console, view: View) -> None:
        self._console = console
        self._view = view
        self._started = time.monotonic()
        self._said: deque[Text] = deque(maxlen=9)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line about something that happened just now; markup is rich's."""
        line = Text.from_markup(f"[dim]{time.monotonic() - self._started:5.1f} s[/]  {text}")
        self._said.append(line)
        if self._live is None:
            self._console.print(line, soft_wrap=True)
        self.refresh()

    def tick(self, text: str) -> None:
        """One line about something that a live view shows anyway."""
        if self._live is None:
            self.say(text)

    def worker(self, index: int) -> str:
        """The name of a worker, in its colour."""
        return f"[{_COLOURS[index % len(_COLOURS)]}]worker {'AB'[index]}[/]"

    def refresh(self) -> None:
        """Show the view as it is now."""
        if self._live is not None:
            self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        view = self._view
        workers = Table("worker", "process", "requests", "the call", box=None, padding=(0, 2), header_style="dim")
        running = next((stream for stream in view.streams if stream.method == "tools/call"), None)
        for index, pid in enumerate(view.pids):
            does = []
            if running is not None and running.runs_on == pid and not running.ended:
                does.append("runs it")
            if view.connected_to == index:
                does.append("[bold]streams it to the client[/]")
            workers.add_row(self.worker(index), str(pid), str(view.requests[index]), ", ".join(does))
        streams = Table(
            "stream", "what", "runs on", "read from", "events stored", box=None, padding=(0, 2), header_style="dim"
        )
        for stream in view.streams:
            state = " [dim](ended)[/]" if stream.ended else ""
            streams.add_row(
                str(stream.number),
                stream.method + state,
                self._by_pid(stream.runs_on),
                self._by_pid(stream.read_from),
                str(stream.stored),
            )
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            "client received",
            ProgressBar(total=view.events, completed=view.received, width=40),
            f"{view.received} of {view.events}, {view.cuts} cuts",
        )
        title = "[bold]mcp-pg-events demo[/]: one call, two workers, a connection that keeps breaking"
        body = Group(workers, Text(), streams, Text(), bar, Text(), *self._said)
        return Panel(body, title=title, title_align="left", border_style="dim", padding=(1, 2))

    def _by_pid(self, pid: int | None) -> str:
        if pid is None:
            return "[dim]nobody[/]"
        return self.worker(self._view.pids.index(pid)) if pid in self._view.pids else str(pid)
