"""Writes the events of one partition to a file before it goes: JSON Lines, compressed with gzip.

A line has `stream`, `seq`, `created_at` and `payload`, the JSON-RPC message as a string. The file gets its name when it
is whole, on disk, and has as many lines as the table has rows. It never takes the place of another one: partitions of
two schemas have the same names. Next: `retention.py` drops the partition.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
from collections.abc import Iterator
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

_BLOCK: Final = 1 << 20


def archive(connection: psycopg.Connection[Any], schema: str, partition: str, directory: Path) -> Path:
    """Write the events of `partition` to `directory`; the file.

    Raises:
        ConfigurationError: nothing can be written there, or there is a file of that name with other events.
        Error: the file does not have what the table has.
    """
    table = sql.Identifier(schema, partition)
    path = directory / f"{partition}.jsonl.gz"
    unfinished = path.with_name(path.name + ".part")
    try:
        with _alone(directory) as descriptor:
            try:
                _write(connection, table, partition, unfinished)
                if path.exists() and not _same(unfinished, path):
                    raise ConfigurationError(
                        f"The archive {path} exists already, with other events in it; give each schema and each "
                        "database a directory of its own."
                    )
                unfinished.replace(path)
                os.fsync(descriptor)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The archive {path} cannot be written ({error.strerror or error}).") from None
    return path


def _write(connection: psycopg.Connection[Any], table: sql.Identifier, partition: str, path: Path) -> None:
    lines = 0
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        with connection.cursor() as cursor, cursor.copy(_ROWS.format(table=table)) as copy:
            for block in copy:
                lines += bytes(block).count(b"\n")
                file.write(block)
        file.close()
        os.fsync(raw.fileno())
    row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
    if row is None or row[0] != lines or _lines(path) != lines:
        raise Error(f"The archive of {partition} does not have what the partition has, which is therefore kept.")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[int]:
    """Wait for other passes that write into this directory; its descriptor."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems lock no directory
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _same(one: Path, other: Path) -> bool:
    """Whether two archives have the same events, as after a pass that was killed before it dropped them."""
    try:
        with gzip.open(one) as first, gzip.open(other) as second:
            while block := first.read(_BLOCK):
                if second.read(_BLOCK) != block:
                    return False
            return not second.read(1)
    except (EOFError, gzip.BadGzipFile):
        return False


def _lines(path: Path) -> int:
    """Read back, since what counts is what is there."""
    with gzip.open(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
