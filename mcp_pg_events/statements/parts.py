"""What statements of several modules share. `{s}` is the schema's name, quoted; see `queries.py` for the parameters."""

from __future__ import annotations

from typing import Final

__all__ = ["LIVE", "OWNER", "TOUCHED", "Statements"]


class Statements(dict[str, str]):
    """The statements of one module, by name: called with a name and a text, it takes them in."""

    def __call__(self, name: str, text: str) -> None:
        self[name] = text


LIVE: Final = """
    id = %(session)s AND server = %(server)s AND owner IS NOT DISTINCT FROM %(owner)s AND ended_at IS NULL
    AND (%(idle)s::float8 IS NULL OR seen_at > now() - make_interval(secs => %(idle)s::float8))
"""
"""The conditions under which a session lives and is the asker's."""

OWNER: Final = """
    owner AS (SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL FOR KEY SHARE)"""
"""Whoever opens a stream locks its own row too: a worker that is being declared dead opens none that nobody would end,
and the epoch that comes back tells whether somebody ended it since."""

TOUCHED: Final = """
    touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    )"""
"""What is asked of a session keeps it from its idle time-out; written now and then only."""
