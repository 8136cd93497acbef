"""`python -m tests.benchmarks [names] [--rounds N] [--json FILE] [--short] [--docs]`: see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from tests.benchmarks import page
from tests.benchmarks.environment import ROOT, Bench, bench
from tests.benchmarks.figures import Report

NAMES = (
    *("storing", "latency", "calls", "flatout", "replay", "growth", "idle", "scaling", "startup", "observing"),
    *("retention", "sizing", "operating", "proxy"),
)


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
    parser.add_argument(
        "--docs", action="store_true", help=f"put what was measured into {page.DOCS.relative_to(ROOT)}/"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"there is no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    names = given.names or (NAMES[:2] if given.short else NAMES)
    reports = []
    with bench(given.rounds or 3, given.short) as running:
        facts = running.describe()
        print(page.describe(facts), flush=True)
        for name in names:
            start = time.monotonic()
            reports.append(measure(running, name))
            print("\n".join((f"\n## {reports[-1].title}\n", *reports[-1].lines())))
            print(f"\n({name}: {time.monotonic() - start:.0f} s)", flush=True)
    if given.json is not None:
        document = facts | {"rounds": running.rounds, "benchmarks": [report.as_json() for report in reports]}
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    if given.docs:
        page.keep(facts, running.rounds, reports)
        page.write(NAMES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
