"""`docs/benchmarks/`: the page and its charts, made from `results.json` beside them, and the README's five lines.

The results of one benchmark take the place of its earlier ones, so that a run in pieces gives the same page. What a
table cannot say, why a target is missed and what was tried, is in `remarks.md` beside the page, written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from tests.benchmarks import charts
from tests.benchmarks.environment import ROOT
from tests.benchmarks.figures import Report, short

__all__ = ["DOCS", "describe", "keep", "write"]

DOCS: Final = ROOT / "docs" / "benchmarks"
README: Final = ROOT / "README.md"
BETWEEN: Final = re.compile(r"(?<=<!-- benchmarks -->\n).*?(?=<!-- /benchmarks -->)", re.DOTALL)

# What the README says, by benchmark and the label of a ratio.
LINES: Final = (
    (
        "Storing from 100 callers, each acknowledged after its commit",
        (
            ("storing", "rate, 100 callers", "the rate of mcp-persist's PostgreSQL store"),
            ("storing", "p99, 100 callers", "its p99"),
        ),
    ),
    (
        "Short tool calls over HTTP, 16 connections",
        (
            ("calls", "rate, 16 connections, against SDK, events in memory", "the SDK with its events in memory"),
            ("calls", "rate, 16 connections, against mcp-persist, PostgreSQL", "mcp-persist with PostgreSQL"),
        ),
    ),
    (
        "From a tool's event to the socket of a client on the other worker",
        (("latency", "other worker, p50", "p50"), ("latency", "other worker, p99", "p99")),
    ),
    ("Replay of 1,000 events", (("replay", None, "mcp-persist's rate"),)),
    ("Resuming with 10,000,000 events stored, against 100,000", (("growth", None, "the latency"),)),
)


def keep(facts: dict[str, Any], rounds: int, reports: Sequence[Report]) -> None:
    """Put reports in the place of the earlier ones of the same benchmarks."""
    file = DOCS / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for report in reports:
        results[report.name] = {"facts": facts, "rounds": rounds, "report": report.as_json()}
    DOCS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def describe(facts: dict[str, Any]) -> str:
    """Machine, versions and settings in a few lines."""
    settings = ", ".join(f"{name} {value}" for name, value in facts["postgresql"].items() if name != "server_version")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        f"{facts['machine']}; Python {facts['python']}; PostgreSQL {facts['postgresql']['server_version']} "
        f"({settings}); {packages}."
    )


def write(names: Sequence[str]) -> None:
    """Make the page, its charts and the README's lines from what is kept, the benchmarks in the order of `names`."""
    results = json.loads((DOCS / "results.json").read_text())
    kept = [results[name] for name in names if name in results]
    reports = [Report.from_json(result["report"]) for result in kept]
    machines = list(dict.fromkeys(describe(result["facts"]) for result in kept))
    lines = [
        "# Benchmarks",
        "",
        "`python -m tests.benchmarks --docs` made this page, and measures all of it anew; with the names of benchmarks "
        "(`python -m tests.benchmarks storing --docs`) it measures those alone.",
        "",
        *(f"Measured on: {machine}" for machine in machines),
        "",
        "Medians of the rounds, in which the subjects alternate; least and greatest in brackets. Ratios are taken "
        "round by round. Figures drift from machine to machine, ratios less so.",
        "",
        "## Targets",
        "",
        "What is missed, by how much and why, is in the [remarks](remarks.md).",
        "",
        "| | measured | target | |",
        "|---|---:|---|---|",
    ]
    for report in reports:
        for ratio in report.ratios:
            verdict = "met" if ratio.met else "**missed**"
            lines.append(
                f"| {report.title}: {ratio.label} | {short(ratio.value)} {ratio.unit} "
                f"| {ratio.relation} {short(ratio.target)} {ratio.unit} | {verdict} |"
            )
    for result, report in zip(kept, reports, strict=True):
        rounds = result["rounds"]
        lines += ["", f"## {report.title}", "", f"{rounds} round{'s' * (rounds != 1)}.", "", *report.lines()]
        for number, chart in enumerate(report.charts, 1):
            file = f"{report.name}-{number}.svg"
            (DOCS / file).write_text(charts.bars(report, chart))
            lines += ["", f"![{chart.title}]({file})"]
    (DOCS / "index.md").write_text("\n".join(lines) + "\n")
    _write_readme({report.name: report for report in reports})


def _write_readme(reports: dict[str, Report]) -> None:
    rows = ["| | |", "|---|---|"]
    for what, figures in LINES:
        said = []
        for name, label, against in figures:
            found = [r for r in reports[name].ratios if label is None or r.label == label] if name in reports else []
            if found and found[0].unit == "x":
                said.append(f"{short(found[0].value)} x {against}")
            elif found:
                said.append(f"{against} {short(found[0].value)} {found[0].unit}")
        if said:
            rows.append(f"| {what} | {', '.join(said)} |")
    text = README.read_text(encoding="utf-8")
    README.write_text(BETWEEN.sub(lambda _: "\n".join(rows) + "\n", text), encoding="utf-8")
