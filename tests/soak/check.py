"""What the database must look like in the end, and what each fault did to the calls that ran at that moment."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from tests.soak.clients import outcome_of
from tests.soak.stage import Fault, Stage, now
from tests.support.resuming import split_id

QUIET = 60.0
"""How long (seconds) after the last call an open stream may still be there."""
BLOCKED = timedelta(seconds=5)
"""Within which time a worker may be declared dead whose connections were ended while its loop was blocked."""
EVER = timedelta(seconds=1)
"""How far the moments that a fault is noted at may be off."""

_BROKEN = {
    "gaps in seq, or numbers given twice": """
        SELECT stream, count(*), min(seq), max(seq) FROM mcp_events.events
         GROUP BY stream HAVING min(seq) <> 1 OR max(seq) <> count(*) OR count(DISTINCT seq) <> count(*)
    """,
    "events after a final": """
        SELECT e.stream, e.seq, t.final_seq FROM mcp_events.events e JOIN mcp_events.streams t ON t.number = e.stream
         WHERE e.seq > t.final_seq
    """,
    "ended streams without their final": """
        SELECT number, final_seq FROM mcp_events.streams t
         WHERE request_key IS NOT NULL AND final_seq IS NOT NULL
           AND NOT EXISTS (SELECT FROM mcp_events.events e WHERE e.stream = t.number AND e.seq = t.final_seq)
    """,
    "second finals": """
        SELECT t.number, count(*) FROM mcp_events.streams t JOIN mcp_events.events e ON e.stream = t.number
         WHERE t.request_key IS NOT NULL AND e.payload::json ->> 'method' IS NULL
         GROUP BY t.number HAVING count(*) > 1 OR max(e.seq) IS DISTINCT FROM max(t.final_seq)
    """,
    "events without a stream": """
        SELECT DISTINCT stream FROM mcp_events.events e
         WHERE NOT EXISTS (SELECT FROM mcp_events.streams t WHERE t.number = e.stream)
    """,
}
_OPEN = """
    SELECT t.number, t.request_id, t.worker, w.pid, w.ended_reason FROM mcp_events.streams t
      LEFT JOIN mcp_events.workers w ON w.number = t.worker
     WHERE t.request_key IS NOT NULL AND t.final_seq IS NULL
"""


@dataclass(slots=True)
class Ended:
    """One call as the database knows it."""

    stream: int
    pid: int
    began: datetime
    ended: datetime
    outcome: str


@dataclass(slots=True)
class Effect:
    """What became of the calls that ran when a fault came; seconds from the fault to the last of their ends."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: list[float] = field(default_factory=list)
    times: int = 0


@dataclass(slots=True)
class Findings:
    """Checks by name with how much of what was forbidden they found, totals, and effects by kind of fault."""

    checks: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    complaints: Counter[str] = field(default_factory=Counter)


async def quiet(stage: Stage) -> None:
    """Return when no call is open, or has been for too long."""
    for _ in range(int(QUIET / 0.5)):
        if not await stage.server.execute(_OPEN):
            return
        await asyncio.sleep(0.5)


async def examine(stage: Stage) -> Findings:
    """Everything that can be asked of the database while the workers live."""
    findings = Findings()

    async def forbidden(name: str, rows: Sequence[Any]) -> None:
        findings.checks[name] = len(rows)
        for row in rows[:5]:
            stage.violation(f"{name}: {row}")

    for name, query in _BROKEN.items():
        await forbidden(name, await stage.server.execute(query))
    await forbidden("open calls", await stage.server.execute(_OPEN))
    for name in ("sessions", "streams", "events", "workers", "inbox"):
        [(findings.totals[name],)] = await stage.server.execute(f"SELECT count(*) FROM mcp_events.{name}")
    calls = await _ended_calls(stage)
    await forbidden("answers that differ from the log", list(_different(stage, calls)))
    for fault in stage.faults:
        _attribute(fault, calls.values(), findings.effects.setdefault(fault.kind, Effect()))
    return findings


async def examine_ends(stage: Stage, findings: Findings) -> None:
    """And once they have ended: who was declared dead without a reason, and what the workers wrote."""
    rows = await stage.server.execute(
        "SELECT number, pid, started_at, ended_at, ended_reason FROM mcp_events.workers ORDER BY number"
    )
    wrong = [row for row in rows if not _deserved(stage, *row[1:])]
    findings.checks["workers declared dead without cause, or never"] = len(wrong)
    for row in wrong[:5]:
        before = [
            f"{fault.kind} {(row[3] - fault.began).total_seconds():.1f} s before"
            for fault in stage.faults
            if row[3] is not None and fault.pid in (None, row[1]) and timedelta() < row[3] - fault.began < 6 * BLOCKED
        ]
        stage.violation(f"worker {row[0]} (process {row[1]}) ended at {row[3]} with {row[4]!r}; {', '.join(before)}")
    signalled = {fault.pid for fault in stage.faults if fault.kind.startswith("SIG")}
    crashed = [
        worker
        for worker in stage.workers.members
        if worker.pid not in signalled | stage.failed_starts and worker.process.returncode not in (0, -15)
    ]
    findings.checks["workers that ended by themselves"] = len(crashed)
    for worker in crashed:
        stage.violation(f"process {worker.pid} ended with {worker.process.returncode}:\n{worker.output()[-2000:]}")
    tracebacks = 0
    for worker in stage.workers.members:
        output = worker.output()
        if worker.pid not in stage.failed_starts and re.search(r"Traceback|never retrieved|was destroyed", output):
            tracebacks += 1
            at = output.index("Traceback") if "Traceback" in output else 0
            stage.violation(f"process {worker.pid} wrote:\n{output[max(0, at - 500) : at + 3000]}")
        findings.complaints.update(_complaints(output))
    findings.checks["workers that wrote a traceback"] = tracebacks


async def _ended_calls(stage: Stage) -> dict[int, tuple[Ended, Any]]:
    rows = await stage.server.execute(
        """
        SELECT t.number, w.pid, t.created_at, e.created_at, e.payload
          FROM mcp_events.streams t JOIN mcp_events.workers w ON w.number = t.worker
          JOIN mcp_events.events e ON e.stream = t.number AND e.seq = t.final_seq
        """
    )
    calls = {}
    for stream, pid, began, ended, payload in rows:
        final = json.loads(payload)
        calls[stream] = Ended(stream, pid, began, ended, outcome_of(final)), final
    return calls


def _different(stage: Stage, calls: dict[int, tuple[Ended, Any]]) -> Any:
    """Calls whose client was given something else than what is stored."""
    for call in stage.calls:
        if call.final is None or call.following is None:
            continue
        stored = calls.get(call.following.stream)
        if stored is None or stored[1] != call.final:
            yield call.client, call.request_id, call.following.cursor, call.outcome


def _attribute(fault: Fault, calls: Any, effect: Effect) -> None:
    """Add what the calls that ran at the moment of a fault, on its worker or on all, ended with."""
    effect.times += 1
    slowest = 0.0
    for call, _ in calls:
        if call.began <= fault.began < call.ended and fault.pid in (None, call.pid):
            effect.outcomes[call.outcome] += 1
            slowest = max(slowest, (call.ended - fault.began).total_seconds())
    if slowest:
        effect.slowest.append(slowest)


def _deserved(stage: Stage, pid: int, started: datetime, ended: datetime | None, reason: str | None) -> bool:
    """Whether there was a cause for a worker's end as the database tells it."""
    if ended is None:
        return False
    mine = [fault for fault in stage.faults if fault.pid == pid]
    if reason == "worker_lost":
        return (
            pid in stage.failed_starts
            or any(
                fault.kind == "SIGKILL"
                # Frozen: for too long, or while PostgreSQL had ended the connection that shows its life.
                or (fault.kind.startswith("SIGSTOP") and fault.began - EVER < ended < (fault.ended or now()) + EVER)
                or (fault.kind == "SIGTERM" and _went_without_a_database(stage, fault))
                for fault in mine
            )
            or any(
                # While a tool blocked its loop, so that it could not say for a second that it lives.
                fault.kind == "pg_terminate_backend" and timedelta() < ended - fault.began < BLOCKED
                for fault in stage.faults
            )
        )
    if reason == "outage":
        return any("longer than" in fault.kind for fault in stage.faults)
    return reason == "shutdown"


def _went_without_a_database(stage: Stage, fault: Fault) -> bool:
    """Whether a process that drained ended while PostgreSQL was away, so that it could not say so."""
    end = (fault.ended or now()) + EVER
    return any(
        away.kind.startswith("PostgreSQL") and away.began - EVER < end and fault.began < (away.ended or now()) + EVER
        for away in stage.faults
    )


def _complaints(output: str) -> list[str]:
    """Warnings and errors, without what differs from one to the next."""
    lines = [line for line in output.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    texts = (re.sub(r"^\[[^]]*\]|\S+\.py:\d+|\"[^\"]*\"", "", line) for line in lines)
    return [re.sub(r"[0-9a-f]{32}|\d+(\.\d+)?", "N", " ".join(text.split()))[:150] for text in texts]


def middle(values: Sequence[float]) -> float:
    """The median, or 0 of nothing."""
    return statistics.median(values) if values else 0.0


def streams_of(calls: Sequence[Any]) -> int:
    """How many events clients were given on the streams of their calls."""
    return sum(split_id(call.following.cursor)[1] for call in calls if call.following and call.following.cursor)
