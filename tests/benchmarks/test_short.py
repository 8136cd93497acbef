"""The short form: fails on a gross regression of a ratio, never on an absolute time.

The bounds are far from what is measured, since a test run shares its machine, and a neighbour that wakes up can only
spoil a round: subjects alternate within a round, the best round counts, and a benchmark that fails is run once more.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks import flatout, latency, sizing
from tests.benchmarks.environment import ROOT, Bench, bench
from tests.benchmarks.figures import OURS, PERSIST, Ratio, Report
from tests.support.tools import missing_tool


@pytest.fixture(scope="module")
def running() -> Iterator[Bench]:
    try:
        with bench(rounds=2, short=True) as started:
            yield started
    except SystemExit as unsuitable:
        missing_tool("A PostgreSQL for benchmarks", str(unsuitable))


Benchmark = Callable[[Bench, Report], None]


def again_unless(good: Callable[[Report], bool], run: Benchmark, running: Bench) -> None:
    """Run a benchmark until its report is good, twice at most; fail with the report when it is not."""
    report = Report("short", "")
    for _ in range(2):
        report.ratios.clear()
        run(running, report)
        if good(report):
            return
    pytest.fail("\n".join(report.lines()), pytrace=False)


def ratio(report: Report, label: str) -> Ratio:
    return next(ratio for ratio in report.ratios if ratio.label == label)


def test_storing_from_100_callers_is_several_times_the_peers_rate(running: Bench) -> None:
    for module in ("mcp_persist", "asyncpg"):
        if importlib.util.find_spec(module) is None:
            missing_tool(module, "run `pip install 'mcp-persist[postgres]'`.")
    from tests.benchmarks import storing

    def good(report: Report) -> bool:
        # On a machine with more work than processors, hand-overs between the store and its one connection take most of
        # the time, and batches cannot help that. Processor time tells the same without it.
        ours, peer = (report.values["100 callers", subject, "cpu_us"] for subject in (OURS, PERSIST))
        return ratio(report, "rate, 100 callers").high >= 5 or min(peer) >= 5 * min(ours)

    again_unless(good, storing.run, running)


def test_an_event_reaches_the_clients_socket_within_a_few_commits(running: Bench) -> None:
    def good(report: Report) -> bool:
        # Measured: 2 and 6. A wake-up that is lost waits for the next poll, which is thousands.
        same = ratio(report, "same worker, p50 against a commit's")
        other = ratio(report, "other worker, p50 against a commit's")
        return same.low <= 10 and other.low <= 30

    again_unless(good, latency.run, running)


def test_readers_on_the_other_worker_keep_up(running: Bench) -> None:
    again_unless(lambda report: ratio(report, "other worker against same worker").high >= 0.3, flatout.run, running)


@pytest.mark.slow
def test_the_guide_to_sizing_says_what_an_event_takes(running: Bench) -> None:
    text = (ROOT / "docs/how-to/sizing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (an? [^|]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    said = {case: int(disk.replace(",", "")) for case, disk, _ in rows}
    report = Report("short", "")
    sizing.run(running, report)
    assert list(said) == report.cases()
    for case, disk in said.items():
        # Short tables end in half-filled pages, and calls and sessions in room that is used again.
        if case.startswith("an event"):
            assert report.median(case, OURS, "disk_bytes") == pytest.approx(disk, rel=0.15), case
