"""The tables that a soak ends with, in Markdown, so that a page can hold them as they are."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from tests.soak.check import Findings, middle, streams_of
from tests.soak.stage import Stage

PACKAGES = ("mcp", "psycopg", "uvicorn", "starlette")


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells] + [""]


def lines(stage: Stage, findings: Findings) -> list[str]:
    """Everything, as lines."""
    return [*_faults(stage, findings), *_calls(stage), *_counts(stage, findings), *_checks(stage, findings)]


def versions(postgresql: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, PostgreSQL {postgresql}, {packages}"


def _faults(stage: Stage, findings: Findings) -> list[str]:
    rows = []
    for kind, effect in sorted(findings.effects.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in effect.outcomes.most_common())
        slowest = f"{middle(effect.slowest):.1f} / {max(effect.slowest, default=0.0):.1f}"
        rows.append([kind, effect.times, sum(effect.outcomes.values()), outcomes, slowest])
    head = ["Fault", "Times", "Calls that ran", "How they ended", "Last end after (median / worst, s)"]
    return table(head, rows)


def _calls(stage: Stage) -> list[str]:
    rows = []
    for operation in sorted({call.operation for call in stage.calls}):
        calls = [call for call in stage.calls if call.operation == operation]
        outcomes = Counter(call.outcome for call in calls)
        seconds = sorted(call.seconds for call in calls)
        ended = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        rows.append([operation, len(calls), ended, f"{middle(seconds):.1f} / {seconds[-1]:.1f}"])
    return table(["Calls", "Number", "Outcomes", "Seconds (median / longest)"], rows)


def _counts(stage: Stage, findings: Findings) -> list[str]:
    followed = [call.following for call in stage.calls if call.following is not None]
    counts = {
        "calls": len(stage.calls),
        "events that clients were given in answers": streams_of(stage.calls),
        "responses that clients cut themselves": sum(following.cuts for following in followed),
        "responses that ended cleanly": sum(clean for each in followed for _, clean in each.ends),
        "responses that were cut": sum(not clean for each in followed for _, clean in each.ends),
        "resumes": sum(following.resumes for following in followed),
        "attempts that nobody took": sum(following.refusals for following in followed),
        **stage.counts,
        **{f"rows of `{name}`": count for name, count in findings.totals.items()},
    }
    return table(["What", "Number"], [[name, count] for name, count in counts.items()])


def _checks(stage: Stage, findings: Findings) -> list[str]:
    rows: list[list[Any]] = [[name, found] for name, found in findings.checks.items()]
    rows.append(["promises broken, of all kinds", len(stage.violations)])
    complaints = [[f"`{text}`", count] for text, count in findings.complaints.most_common(40)]
    return [*table(["Forbidden", "Found"], rows), *table(["What workers wrote", "Times"], complaints)]
