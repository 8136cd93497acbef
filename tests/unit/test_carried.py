"""What an export carries is what the tables have."""

from __future__ import annotations

import pytest

from mcp_pg_events.operator.carried import FIELDS
from mcp_pg_events.operator.text import plain, shortened
from mcp_pg_events.tables import METADATA

LEFT_OUT = {"streams": {"session_id", "worker", "reader_worker", "adrift_since"}}
"""The file's session, and what means nothing in another database."""


@pytest.mark.parametrize(("kind", "table"), [("session", "sessions"), ("stream", "streams"), ("event", "events")])
def test_every_column_is_carried_or_left_out_on_purpose(kind: str, table: str) -> None:
    columns = {column.name for column in METADATA.tables[table].columns}
    assert set(FIELDS[kind]) - {"shared"} == columns - LEFT_OUT.get(table, set())


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain é 漢 😀", "plain é 漢 😀"),
        ("\x1b[31m\r\n\t\x07\x7f", r"\x1b[31m\r\n\t\x07\x7f"),
        ("\x9b2J \u202e \u2028 \ud800 \u200d", r"\x9b2J \u202e \u2028 \ud800 \u200d"),
    ],
)
def test_text_of_others_is_made_fit_for_a_terminal(given: str, shown: str) -> None:
    assert plain(given) == shown
    assert shortened(given, 3) == shown[:2] + "…"
    assert shortened(given, 1000) == shown
    assert len(shortened("\x1b" * 10, 10)) == 10
