"""`python -m tests.benchmarks [names] [--rounds N] [--json FILE] [--short] [--docs]`: see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import charts
from tests.benchmarks.environment import ROOT, Bench, bench
from tests.benchmarks.figures import Report

NAMES = ("storing", "latency", "calls", "flatout", "replay", "growth", "idle", "scaling", "startup", "observing")
DOCS = ROOT / "docs" / "benchmarks"


def measure(running: Bench, name: str) -> Report:
    """Run one benchmark."""
    module = importlib.import_module(f"tests.benchmarks.{name}")
    report = Report(name, module.TITLE)
    module.run(running, report)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Benchmarks against the peers.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which ones (default: all): {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=None, help="rounds, in which the subjects alternate (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--short", action="store_true", help="storing and latency alone, under a minute")
    parser.add_argument("--docs", action="store_true", help=f"write tables and charts to {DOCS.relative_to(ROOT)}/")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"there is no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    names = given.names or (NAMES[:2] if given.short else NAMES)
    reports = []
    with bench(given.rounds or 3, given.short) as running:
        facts = running.describe()
        print(describe(facts), flush=True)
        for name in names:
            start = time.monotonic()
            reports.append(measure(running, name))
            print("\n".join((f"\n## {reports[-1].title}\n", *reports[-1].lines())))
            print(f"\n({name}: {time.monotonic() - start:.0f} s)", flush=True)
    if given.json is not None:
        document = facts | {"rounds": running.rounds, "benchmarks": [report.as_json() for report in reports]}
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    if given.docs:
        write_docs(facts, running.rounds, reports)
    return 0


def describe(facts: dict[str, Any]) -> str:
    """Machine, versions and settings in a few lines."""
    settings = ", ".join(f"{name} {value}" for name, value in facts["postgresql"].items() if name != "server_version")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        f"{facts['machine']}; Python {facts['python']}; PostgreSQL {facts['postgresql']['server_version']} "
        f"({settings}); {packages}."
    )


def write_docs(facts: dict[str, Any], rounds: int, reports: list[Report]) -> None:
    """`docs/benchmarks/index.md` and its charts."""
    DOCS.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        f"`python -m tests.benchmarks --docs` made this page: {describe(facts)}",
        "",
        f"Medians of {rounds} round{'s' * (rounds != 1)}, in which the subjects alternate; least and greatest in "
        "brackets. Ratios are taken round by round. Figures drift from machine to machine, ratios less so.",
    ]
    for report in reports:
        lines += ["", f"## {report.title}", "", *report.lines()]
        for number, chart in enumerate(report.charts, 1):
            file = f"{report.name}-{number}.svg"
            (DOCS / file).write_text(charts.bars(report, chart))
            lines += ["", f"![{chart.title}]({file})"]
    (DOCS / "index.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
