"""Every statement of the operator's commands, by subject: `{s}` stands for the schema's name.

Percent signs are doubled, and values are given by name, as everywhere in psycopg. None of these is prepared, so that
each is planned with its values, and reads no partition that its bound on `created_at` leaves out.
"""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = ["REVISIONS"]

REVISIONS: Final[LiteralString] = """
    SELECT (SELECT version_num FROM {s}.alembic_version) AS revision,
           (SELECT oldest_worker FROM {s}.settings) AS oldest_worker
"""
