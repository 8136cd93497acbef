"""Bar charts as SVG, written by hand: no library, readable on light and dark pages."""

from __future__ import annotations

import math
from html import escape

from tests.benchmarks.figures import OURS, Chart, Report, short, title

COLOURS = ("#b07aa1", "#f28e2b", "#9c755f", "#76b7b2", "#edc948")
OUR_COLOURS = ("#4e79a7", "#86b0d8", "#2f4b6e")
LABELS, BAR, GAP, WIDTH = 250, 18, 14, 760


def bars(report: Report, chart: Chart) -> str:
    """The chart of a report's medians."""
    rows = [(case, subject) for case, subject, metric in report.values if metric == chart.metric]
    medians = {row: report.median(*row, chart.metric) for row in rows}
    colours = _colours(list(dict.fromkeys(subject for _, subject in rows)))
    room, top = WIDTH - LABELS - 90, max(medians.values())
    least = min(value for value in medians.values() if value > 0) / 2
    parts, y = [], 34
    for case in dict.fromkeys(case for case, _ in rows):
        y += GAP
        parts.append(f'<text x="0" y="{y + 2}" class="case">{escape(case)}</text>')
        y += 8
        for subject in (subject for group, subject in rows if group == case):
            value = medians[case, subject]
            share = math.log(value / least) / math.log(top / least) if chart.logarithmic and value else value / top
            width = max(1.0, room * share)
            parts.append(f'<text x="{LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(subject)}</text>')
            parts.append(
                f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR - 3}" fill="{colours[subject]}"/>'
            )
            parts.append(f'<text x="{LABELS + width + 6:.1f}" y="{y + 13}">{short(value)}</text>')
            y += BAR
    unit = title(chart.metric).rpartition(", ")[2]
    scale = f"{unit}, logarithmic scale" if chart.logarithmic else unit
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" role="img">',
            "<style>text{font:12px system-ui,sans-serif;fill:#555}.title{font-weight:600;font-size:14px}"
            ".case{font-weight:600}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>",
            f'<text x="0" y="16" class="title">{escape(chart.title)} ({scale})</text>',
            *parts,
            "</svg>\n",
        )
    )


def _colours(subjects: list[str]) -> dict[str, str]:
    ours = [subject for subject in subjects if subject.startswith(OURS)]
    others = [subject for subject in subjects if subject not in ours]
    return {subject: OUR_COLOURS[place % len(OUR_COLOURS)] for place, subject in enumerate(ours)} | {
        subject: COLOURS[place % len(COLOURS)] for place, subject in enumerate(others)
    }
