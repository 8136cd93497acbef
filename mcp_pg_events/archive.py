"""Writes the events of one partition to a file before it goes: JSON Lines, compressed with gzip.

A line has `stream`, `seq`, `created_at` and `payload`, the JSON-RPC message as a string. The file gets its name when it
is whole, on disk, and has as many lines as the table has rows. Next: `retention.py` drops the partition.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql

from .errors import ConfigurationError, Error

__all__ = ["archive"]

_ROWS: Final = sql.SQL("""
    COPY (SELECT json_build_object('stream', stream, 'seq', seq, 'created_at', created_at, 'payload', payload)
            FROM {table} ORDER BY stream, seq)
      TO STDOUT (FORMAT csv, QUOTE E'\\x01', DELIMITER E'\\x02')
""")


def archive(connection: psycopg.Connection[Any], schema: str, partition: str, directory: Path) -> Path:
    """Write the events of `partition` to `directory`; the file.

    Raises:
        ConfigurationError: nothing can be written there.
        Error: the file does not have what the table has.
    """
    table = sql.Identifier(schema, partition)
    path = directory / f"{partition}.jsonl.gz"
    unfinished = path.with_name(path.name + ".part")
    lines = 0
    try:
        with unfinished.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
            with connection.cursor() as cursor, cursor.copy(_ROWS.format(table=table)) as copy:
                for block in copy:
                    lines += bytes(block).count(b"\n")
                    file.write(block)
            file.close()
            os.fsync(raw.fileno())
        row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
        if row is None or row[0] != lines or _lines(unfinished) != lines:
            raise Error(f"The archive of {partition} does not have what the partition has, which is therefore kept.")
        unfinished.replace(path)
        _sync(directory)
    except OSError as error:
        raise ConfigurationError(f"The archive {path} cannot be written ({error.strerror}).") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _lines(path: Path) -> int:
    """Read back, since what counts is what is there."""
    with gzip.open(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
