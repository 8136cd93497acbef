"""Calls that stream as fast as they are taken: all begin at once, and all readers sit on one worker.

Events per second from the beginning to the end of the last response. The peers read on the worker that runs the calls,
since nothing of theirs reaches a reader on another one.
"""

from __future__ import annotations

import contextlib
import time

from tests.benchmarks.environment import Bench, Worker, workers
from tests.benchmarks.figures import MEMORY, OURS, PERSIST, Chart, Report, rotated
from tests.benchmarks.wire import Client, read_all, start_calls

TITLE = "Flat out: calls that stream as fast as they are taken"
SAME, OTHER = f"{OURS}, same worker", f"{OURS}, other worker"
CALLS, SIZE = 50, 150
CASE = f"{CALLS} calls"


def run(bench: Bench, report: Report) -> None:
    events = 40 if bench.short else 200
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        a, b = stack.enter_context(workers(OURS, dsn, 2))
        others = () if bench.short else (PERSIST, MEMORY)
        peers = {subject: stack.enter_context(workers(subject, dsn))[0] for subject in others}
        for worker in (a, *peers.values()):
            pour([worker], 10, 10)
        for turn in range(bench.rounds):
            for subject in rotated((SAME, OTHER, *others), turn):
                producer = peers.get(subject, a)
                rate = pour([producer], CALLS, events, b if subject == OTHER else None)
                report.add(CASE, subject, rate_per_s=rate)
    report.compare(
        "other worker against same worker", (CASE, OTHER, "rate_per_s"), (CASE, SAME, "rate_per_s"), "at least", 0.6
    )
    report.charts.append(Chart("Flat out, events per second", "rate_per_s"))


def pour(producers: list[Worker], calls: int, events: int, reader: Worker | None = None) -> float:
    """Events per second that reach the sockets, with the calls spread over sessions and workers."""
    clients = [Client(worker.url, worker.subject) for worker in producers for _ in range(-(-calls // 10))]
    for client in clients[:: -(-calls // 10)]:
        client.call("ready").finish()
    arguments = [{"n": events, "size": SIZE}] * (calls * len(producers))
    streams = start_calls(clients, "pour", arguments, reader.url if reader else None)
    start = time.perf_counter()
    for client in clients[:: -(-calls // 10)]:
        client.call("go").finish()
    read_all(streams)
    taken = time.perf_counter() - start
    expected = calls * events * len(producers)
    arrived = sum(stream.data.count(b"notifications/progress") for stream in streams)
    if arrived != expected:
        raise RuntimeError(f"{arrived} of {expected} events arrived")
    return expected / taken
