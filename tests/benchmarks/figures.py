"""What a benchmark measured: figures per round, their medians, and the ratios that its targets speak of.

Absolute figures drift with the machine, so subjects alternate within each round and ratios are taken round by round.
`Report` goes to the terminal, to JSON, and to `docs/benchmarks/`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

OURS = "mcp_pg_events"
PERSIST = "mcp-persist, PostgreSQL"
PERSIST_SQLITE = "mcp-persist, SQLite"
FASTMCP = "FastMCP's event store, memory"
BARE = "SDK, no event store"
MEMORY = "SDK, events in memory"
PROXY = "mcp_pg_events' proxy"
PERSIST_PROXY = "mcp-persist's proxy, PostgreSQL"

Key = tuple[str, str, str]
"""Case, subject, metric."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rotated(subjects: Sequence[str], turn: int) -> list[str]:
    """The subjects in another order each round, so that none always comes first."""
    start = turn % len(subjects)
    return [*subjects[start:], *subjects[:start]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure against another: the median of the rounds' ratios, the least and the greatest, and what is asked."""

    label: str
    value: float
    low: float
    high: float
    relation: Literal["at least", "at most"]
    target: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.relation == "at least" else self.value <= self.target


@dataclass(slots=True)
class Chart:
    """Bars of one metric: a group for each case, a bar for each subject."""

    title: str
    metric: str
    logarithmic: bool = False


@dataclass(slots=True)
class Report:
    """The figures of one benchmark."""

    name: str
    title: str
    values: dict[Key, list[float]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)

    def add(self, case: str, subject: str, **metrics: float) -> None:
        """Figures of one round; the unit is the last word of the metric's name (`p50_ms`)."""
        for metric, value in metrics.items():
            self.values.setdefault((case, subject, metric), []).append(value)

    def median(self, case: str, subject: str, metric: str) -> float:
        return statistics.median(self.values[case, subject, metric])

    def compare(self, label: str, figure: Key, against: Key, relation: Any, target: float) -> Ratio:
        """State the ratio of two figures, round by round, and what is asked of it."""
        ratios = [a / b for a, b in zip(self.values[figure], self.values[against], strict=True)]
        return self._state(label, ratios, relation, target, "x")

    def bound(self, label: str, figure: Key, relation: Any, target: float, unit: str) -> Ratio:
        """State an absolute figure and what is asked of it."""
        return self._state(label, self.values[figure], relation, target, unit)

    def _state(self, label: str, values: Sequence[float], relation: Any, target: float, unit: str) -> Ratio:
        ratio = Ratio(label, statistics.median(values), min(values), max(values), relation, target, unit)
        self.ratios.append(ratio)
        return ratio

    def cases(self) -> list[str]:
        return list(dict.fromkeys(case for case, _, _ in self.values))

    def as_json(self) -> dict[str, Any]:
        figures = [
            {"case": case, "subject": subject, "metric": metric, "median": statistics.median(values), "rounds": values}
            for (case, subject, metric), values in self.values.items()
        ]
        ratios = [asdict(ratio) | {"met": ratio.met} for ratio in self.ratios]
        charts = [asdict(chart) for chart in self.charts]
        return {
            "name": self.name,
            "title": self.title,
            "figures": figures,
            "ratios": ratios,
            "notes": self.notes,
            "charts": charts,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """The report that `as_json` wrote."""
        report = cls(document["name"], document["title"], notes=document["notes"])
        for figure in document["figures"]:
            report.values[figure["case"], figure["subject"], figure["metric"]] = figure["rounds"]
        for ratio in document["ratios"]:
            report.ratios.append(Ratio(**{name: value for name, value in ratio.items() if name != "met"}))
        report.charts = [Chart(**chart) for chart in document["charts"]]
        return report

    def lines(self) -> Iterator[str]:
        """Markdown: a table of figures, the ratios, the notes."""
        metrics = list(dict.fromkeys(metric for _, _, metric in self.values))
        yield from (
            "| | | " + " | ".join(title(metric) for metric in metrics) + " |",
            "|---|---|" + "---:|" * len(metrics),
        )
        for case, subject in dict.fromkeys((case, subject) for case, subject, _ in self.values):
            cells = [spread(self.values.get((case, subject, metric), [])) for metric in metrics]
            yield f"| {case} | {subject} | " + " | ".join(cells) + " |"
        if self.ratios:
            yield from ("", "| ratio | measured | spread | target | |", "|---|---:|---|---|---|")
        for r in self.ratios:
            target = f"{r.relation} {short(r.target)} {r.unit}"
            verdict = "met" if r.met else "**missed**"
            measured = f"{short(r.value)} {r.unit} | {short(r.low)} to {short(r.high)}"
            yield f"| {r.label} | {measured} | {target} | {verdict} |"
        for note in self.notes:
            yield from ("", note)


def title(metric: str) -> str:
    """`p50_ms` → `p50, ms`; `rate_per_s` → `rate, /s`."""
    name, _, unit = metric.rpartition("_")
    if name.endswith("_per"):
        name, unit = name.removesuffix("_per"), f"/{unit}"
    return f"{name.replace('_', ' ')}, {unit.replace('percent', '%')}" if name else unit


def short(value: float) -> str:
    """Three significant digits, and thousands apart."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


def spread(values: Sequence[float]) -> str:
    """The median, and least and greatest where there were several rounds."""
    if not values:
        return ""
    middle = short(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({short(min(values))} to {short(max(values))})"
