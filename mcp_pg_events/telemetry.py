"""Every instrument and every span of this package, through the OpenTelemetry API.

Without an OpenTelemetry SDK all of this does nothing, and costs next to nothing: what is stored is recorded by the
batch, what is sent by the response's write. With one, whatever reader and exporter the process was given get it; none
is made here. Attributes are few and of few values: never a session, an owner or a payload.

Names follow OpenTelemetry's semantic conventions ("Metrics", "HTTP Spans"); `docs/reference/metrics.md` lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal, NamedTuple

from mcp_types import JSONRPCMessage
from opentelemetry import context, metrics, propagate, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = [
    "INSTRUMENTS",
    "Counts",
    "Instrument",
    "Replay",
    "Traced",
    "delivered",
    "notified",
    "observe",
    "reaped",
    "received",
    "resumed",
    "retention",
    "retention_step",
    "span",
    "stored",
]

SCOPE: Final = "mcp_pg_events"

try:
    _VERSION = version("mcp-pg-events")
except PackageNotFoundError:  # run from a copy of the sources
    _VERSION = ""

_meter = metrics.get_meter(SCOPE, _VERSION)
_tracer = trace.get_tracer(SCOPE, _VERSION)

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Instrument(NamedTuple):
    """What the reference says of an instrument."""

    name: str
    kind: Literal["counter", "histogram", "up-down counter"]
    unit: str
    description: str
    attributes: tuple[str, ...]


INSTRUMENTS: Final[list[Instrument]] = []


def _counter(name: str, unit: str, description: str, *attributes: str) -> metrics.Counter:
    INSTRUMENTS.append(Instrument(f"{SCOPE}.{name}", "counter", unit, description, attributes))
    return _meter.create_counter(f"{SCOPE}.{name}", unit, description)


def _histogram(
    name: str, unit: str, description: str, *attributes: str, bounds: Iterable[float] = _SECONDS
) -> metrics.Histogram:
    INSTRUMENTS.append(Instrument(f"{SCOPE}.{name}", "histogram", unit, description, attributes))
    return _meter.create_histogram(
        f"{SCOPE}.{name}", unit, description, explicit_bucket_boundaries_advisory=tuple(bounds)
    )


def _observed(name: str, unit: str, description: str, field: Literal["sessions", "calls", "readers"]) -> None:
    INSTRUMENTS.append(Instrument(f"{SCOPE}.{name}", "up-down counter", unit, description, ()))

    def observe(options: CallbackOptions) -> list[Observation]:
        return [Observation(sum(getattr(counts(), field) for counts in _workers))]

    _meter.create_observable_up_down_counter(f"{SCOPE}.{name}", [observe], unit, description)


# --- appends ----------------------------------------------------------------------------------------------------------

_appended = _counter("append.events", "{event}", "Events that were stored")
_batches = _histogram("append.batch.size", "{event}", "Events that one commit stored", bounds=_SIZES)
_appending = _histogram(
    "append.duration", "s", "From the append of the event that waited longest to the commit of its batch"
)
_notifications = _counter("wake.notifications", "{notification}", "Notifications that woke other workers' readers")


def stored(events: int, seconds: float) -> None:
    """A batch was committed, `seconds` after the first of its events was appended."""
    _appended.add(events)
    _batches.record(events)
    _appending.record(seconds)


def notified(notifications: int) -> None:
    """Other workers were told that streams which are read there have grown."""
    _notifications.add(notifications)


# --- readers ----------------------------------------------------------------------------------------------------------

_delivering = _histogram(
    "delivery.duration", "s", "From an event's append, on whichever worker, to its hand-over to the client's connection"
)
_resumes = _counter("resume.requests", "{request}", "Requests with a Last-Event-ID", f"{SCOPE}.resume.outcome")
_replays = _histogram(
    "replay.size", "{event}", "Events that a resumed response brought from the log before it was live", bounds=_SIZES
)

Outcome = Literal["resumed", "complete", "expired", "unknown", "malformed"]


def delivered(seconds: float) -> None:
    """An event was written to a live response, `seconds` after it was appended."""
    _delivering.record(seconds)


def resumed(outcome: Outcome | str) -> None:
    """A client came back with a `Last-Event-ID`."""
    _resumes.add(1, {f"{SCOPE}.resume.outcome": outcome})


class Replay:
    """A response that resumed, until it is live or over; `counted` is False for one that named no event."""

    def __init__(self, counted: bool = True) -> None:
        self.events = 0
        self._span: Span | None = None
        self._over = not counted
        if counted:
            resumed("resumed")
            self._span = _tracer.start_span(f"{SCOPE}.replay")

    def over(self) -> None:
        """It is live, or it ended. Once counts."""
        if self._over:
            return
        self._over = True
        _replays.record(self.events)
        if self._span is not None:
            self._span.set_attribute(f"{SCOPE}.replay.events", self.events)
            self._span.end()


# --- workers ----------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What a worker has at the moment."""

    calls: int
    readers: int
    sessions: int


# Replaced whenever it changes, and never changed: whoever collects metrics does so in a thread.
_workers: tuple[Callable[[], Counts], ...] = ()

_observed("session.count", "{session}", "Sessions with an object in this process", "sessions")
_observed("call.count", "{call}", "Calls that run in this process", "calls")
_observed("reader.count", "{response}", "Responses that are open in this process", "readers")
_reaped = _counter(
    "reaped.calls", "{call}", "Calls that the server ended with an error, in place of a result", "error.type"
)


def observe(counts: Callable[[], Counts]) -> Callable[[], None]:
    """A worker has started; the result says that it has stopped."""
    global _workers
    _workers = (*_workers, counts)

    def stop() -> None:
        global _workers
        _workers = tuple(other for other in _workers if other is not counts)

    return stop


def reaped(calls: int, reason: str) -> None:
    """Calls were ended with an error; `reason` is the one that their clients are told."""
    if calls > 0:
        _reaped.add(calls, {"error.type": reason})


# --- retention --------------------------------------------------------------------------------------------------------

_passes = _histogram("retention.duration", "s", "Duration of a retention pass")
_partitions = _counter(
    "retention.partitions", "{partition}", "Partitions by what became of them", f"{SCOPE}.retention.result"
)
_removed = _counter("retention.rows", "{row}", "Rows that a retention pass removed", f"{SCOPE}.retention.table")


def retention(seconds: float, *, partitions: Mapping[str, int], rows: Mapping[str, int]) -> None:
    """A retention pass: how many partitions by result (`dropped`, `contended`, ...), how many rows by table."""
    _passes.record(seconds)
    for result, number in partitions.items():
        _partitions.add(number, {f"{SCOPE}.retention.result": result})
    for table, number in rows.items():
        _removed.add(number, {f"{SCOPE}.retention.table": table})


def retention_step(seconds: float, rows: Iterable[tuple[str, str]]) -> None:
    """What a call of `drop_expired` said: partitions and what became of them, kinds of rows and how many went."""
    said = list(rows)
    results = [result for _, result in said if not result.isdecimal()]
    retention(
        seconds,
        partitions={result: results.count(result) for result in results},
        rows={what: int(result) for what, result in said if result.isdecimal()},
    )


# --- spans ------------------------------------------------------------------------------------------------------------


def span(name: str) -> AbstractContextManager[Span]:
    """Something that this package does by itself: `reap`, `drain`, `retention`."""
    return _tracer.start_as_current_span(f"{SCOPE}.{name}")


class Traced:
    """An ASGI app whose every request has one span.

    Where something before it (an instrumentation of the ASGI server) has one for the request, this is a child of that.
    Otherwise it is the server's span, and goes on with the `traceparent` of the request's headers or, in a client that
    has none there, with the one of the message's `_meta`. The SDK's own span for the message goes on with the latter
    alone, and is else a child of this one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            await self._app(scope, receive, send)
            return
        request = scope[_KEY] = _Request(scope)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as error:
            request.end(error)
            raise
        request.end()


def received(scope: Scope, message: JSONRPCMessage) -> None:
    """What a POST says is known: it may carry the context of its client's trace."""
    request: _Request | None = scope.get(_KEY)
    if request is not None and request.span is None:
        params = getattr(message, "params", None)
        request.begin(_context(params.get("_meta") if isinstance(params, dict) else None))


_KEY: Final = "mcp_pg_events.trace"


class _Request:
    """The span of a request. A POST without a context in its headers gets its span when its message is read."""

    def __init__(self, scope: Scope) -> None:
        self.span: Span | None = None
        self.status = 0
        self._scope = scope
        self._began = time.time_ns()
        self._token: Any = None
        if trace.get_current_span().get_span_context().is_valid:
            self.begin(None, SpanKind.INTERNAL)
            return
        fields = {name.encode("latin-1"): name for name in propagate.get_global_textmap().fields}
        carrier = {fields[name]: value.decode("latin-1") for name, value in scope["headers"] if name in fields}
        if (parent := _context(carrier)) is not None or scope["method"] != "POST":
            self.begin(parent)

    def begin(self, parent: context.Context | None, kind: SpanKind = SpanKind.SERVER) -> None:
        method = self._scope["method"]
        self.span = _tracer.start_span(
            f"{SCOPE}.request" if kind is SpanKind.INTERNAL else method,
            parent,
            kind,
            {"http.request.method": method, "url.path": self._scope["path"], "url.scheme": self._scope["scheme"]},
            start_time=self._began,
        )
        self._token = context.attach(trace.set_span_in_context(self.span, parent))

    def end(self, error: BaseException | None = None) -> None:
        if self.span is None:
            self.begin(None)
        assert self.span is not None
        context.detach(self._token)
        if self.status:
            self.span.set_attribute("http.response.status_code", self.status)
        if error is not None or self.status >= 500:
            self.span.set_attribute("error.type", str(self.status) if error is None else type(error).__qualname__)
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


def _context(carrier: object) -> context.Context | None:
    """The context that a request carries; None where there is none, so that what surrounds it is gone on with."""
    if not isinstance(carrier, dict) or "traceparent" not in carrier:
        return None
    found = propagate.extract({name: value for name, value in carrier.items() if isinstance(value, str)})
    return found if trace.get_current_span(found).get_span_context().is_valid else None
