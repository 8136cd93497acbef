"""The test server with an OpenTelemetry SDK, which keeps what it gets: `uvicorn tests.servers.observed_app:app`.

GET /telemetry gives it as JSON: {"metrics": [[name, unit, kind, attributes, value, count]], "spans": [{...}]}.
"""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mcp_pg_events import telemetry
from mcp_pg_events.takeover import store_of
from tests.servers.common import durable_app, register

reader = InMemoryMetricReader()
exporter = InMemorySpanExporter()
metrics.set_meter_provider(MeterProvider([reader]))
spans = TracerProvider()
spans.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(spans)

server = MCPServer("test-observed")
register(server.tool, Context)


@server.custom_route("/telemetry", methods=["GET"])
async def collected(request: Request) -> JSONResponse:
    """What was recorded so far."""
    data = reader.get_metrics_data()
    points = [
        _point(metric, point)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        if scope.scope.name == telemetry.SCOPE
        for metric in scope.metrics
        for point in metric.data.data_points
    ]
    return JSONResponse({"metrics": points, "spans": [_span(span) for span in exporter.get_finished_spans()]})


@server.custom_route("/drain", methods=["POST"])
async def drain(request: Request) -> JSONResponse:
    """Drain, and stay to tell of it."""
    store = store_of(app)
    assert store is not None
    await store.drain()
    return JSONResponse({})


@server.custom_route("/retention", methods=["POST"])
async def retention(request: Request) -> JSONResponse:
    """What a retention pass of this process records."""
    with telemetry.span("retention"):
        telemetry.retention(0.5, partitions={"dropped": 2, "contended": 1}, rows={"sessions": 3})
    return JSONResponse({})


def _point(metric: Any, point: Any) -> list[Any]:
    if isinstance(point, HistogramDataPoint):
        return [metric.name, metric.unit, "histogram", dict(point.attributes or {}), point.sum, point.count]
    assert isinstance(metric.data, Sum)
    kind = "counter" if metric.data.is_monotonic else "up-down counter"
    return [metric.name, metric.unit, kind, dict(point.attributes or {}), point.value, 1]


def _span(span: ReadableSpan) -> dict[str, Any]:
    return {
        "name": span.name,
        "kind": span.kind.name.lower(),
        "scope": span.instrumentation_scope.name if span.instrumentation_scope else None,
        "trace": f"{span.context.trace_id:032x}" if span.context else None,
        "id": f"{span.context.span_id:016x}" if span.context else None,
        "parent": f"{span.parent.span_id:016x}" if span.parent else None,
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name.lower(),
    }


class Instrumented:
    """What an instrumentation of the ASGI server does, for requests that ask for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (b"x-instrumented", b"1") not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        with trace.get_tracer("instrumentation").start_as_current_span("instrumented", kind=trace.SpanKind.SERVER):
            await self.app(scope, receive, send)


app = durable_app(server.streamable_http_app)
app.add_middleware(Instrumented)
