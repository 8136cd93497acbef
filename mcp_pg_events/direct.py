"""Statements straight over libpq, for the few that run all the time: prepared once, binary both ways, no cursor.

A cursor's work for one statement (its text, the types of its parameters, a task or two to wait for the socket) takes
longer here than PostgreSQL's own. The connection stays psycopg's, whose methods may run between two of these. Next: the
rows, as Python values; text stays bytes.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import errors, pq

from .arrays import Int8Array, TextArray, dump_int8_array, dump_text_array
from .database import Connection

__all__ = ["Direct"]

_PLACEHOLDER: Final = re.compile(rb"%\((\w+)\)[sb]|%%")
_INT8: Final = struct.Struct("!q")
_FLOAT8: Final = struct.Struct("!d")
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


def _dump_moment(value: datetime) -> bytes:
    return _INT8.pack((value - _EPOCH) // timedelta(microseconds=1))


_DUMPERS: Final[dict[type, tuple[int, Callable[[Any], bytes]]]] = {
    int: (20, _INT8.pack),
    float: (701, _FLOAT8.pack),
    str: (25, str.encode),
    datetime: (1184, _dump_moment),
    Int8Array: (1016, dump_int8_array),
    TextArray: (1009, dump_text_array),
}
"""Type in PostgreSQL and binary form, by the type here."""

_LOADERS: Final[dict[int, Callable[[bytes], Any]]] = {
    16: lambda value: value == b"\1",
    20: lambda value: _INT8.unpack(value)[0],
    1184: lambda value: _EPOCH + timedelta(microseconds=_INT8.unpack(value)[0]),
}
"""Value from the binary form, by the type in PostgreSQL; others stay bytes, which is right for text and json."""


class _Prepared:
    __slots__ = ("dumpers", "formats", "loaders", "name", "names", "oids", "text")

    def __init__(self, statement: bytes, parameters: Mapping[str, Any], name: bytes) -> None:
        self.name = name
        self.names: list[str] = []
        self.text = _PLACEHOLDER.sub(self._place, statement)
        types = [_DUMPERS[type(parameters[parameter])] for parameter in self.names]
        self.oids = [oid for oid, _ in types]
        self.dumpers = [dump for _, dump in types]
        self.formats = [pq.Format.BINARY] * len(types)
        self.loaders: list[Callable[[bytes], Any] | None] | None = None

    def _place(self, match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            return b"%"
        name = match[1].decode()
        if name not in self.names:
            self.names.append(name)
        return b"$%d" % (self.names.index(name) + 1)


class Direct:
    """One connection, on which one such statement runs at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._prepares = connection.prepare_threshold is not None
        self._statements: dict[bytes, _Prepared] = {}
        self._results: list[pq.abc.PGresult] = []
        self._answered: asyncio.Future[None]
        self._socket = -1

    async def fetch(
        self, statement: bytes, parameters: Mapping[str, Any], *, alone: bool = False
    ) -> list[tuple[Any, ...]]:
        """Run a statement with named parameters, each time of the same types, and its rows. `alone` says that this
        connection needs no other one: it is forgotten when another takes its place.

        Raises:
            psycopg.Error: as psycopg would. When the caller is cancelled meanwhile, the connection is closed.
        """
        pgconn = self._pgconn
        if (prepared := self._statements.get(statement)) is None:
            if alone and self._statements:
                self._statements.clear()
                if self._prepares:
                    await self._connection.execute("DEALLOCATE mcp_pg_events_0")
            prepared = _Prepared(statement, parameters, b"mcp_pg_events_%d" % len(self._statements))
            if self._prepares:
                pgconn.send_prepare(prepared.name, prepared.text, prepared.oids)
                await self._answer()
            self._statements[statement] = prepared
        values = [dump(parameters[name]) for dump, name in zip(prepared.dumpers, prepared.names, strict=True)]
        if self._prepares:
            pgconn.send_query_prepared(prepared.name, values, prepared.formats, pq.Format.BINARY)
        else:
            pgconn.send_query_params(prepared.text, values, prepared.oids, prepared.formats, pq.Format.BINARY)
        result = await self._answer()
        if prepared.loaders is None:
            prepared.loaders = [_LOADERS.get(result.ftype(column)) for column in range(result.nfields)]
        get = result.get_value
        columns = list(enumerate(prepared.loaders))
        return [
            tuple(
                value if (value := get(row, column)) is None or load is None else load(value)
                for column, load in columns
            )
            for row in range(result.ntuples)
        ]

    async def _answer(self) -> pq.abc.PGresult:
        loop = asyncio.get_running_loop()
        self._answered = answered = loop.create_future()
        self._results = []
        unsent = self._pgconn.flush()
        self._socket = self._pgconn.socket
        loop.add_reader(self._socket, self._read)
        if unsent:
            loop.add_writer(self._socket, self._write)
        try:
            await answered
        except asyncio.CancelledError:
            if answered.cancelled():
                # What was sent is still on its way, and so is its answer.
                self._stop_waiting()
                self._pgconn.finish()
            raise
        for result in self._results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result, self._connection.info.encoding)
        return self._results[-1]

    def _read(self) -> None:
        pgconn = self._pgconn
        try:
            pgconn.consume_input()
            while not pgconn.is_busy():
                if (result := pgconn.get_result()) is None:
                    self._stop_waiting()
                    if not self._answered.done():
                        self._answered.set_result(None)
                    return
                self._results.append(result)
        except psycopg.Error as error:
            self._fail(error)

    def _write(self) -> None:
        try:
            # What the server says meanwhile has to be read, or neither side goes on.
            self._pgconn.consume_input()
            if not self._pgconn.flush():
                asyncio.get_running_loop().remove_writer(self._socket)
        except psycopg.Error as error:
            self._fail(error)

    def _fail(self, error: psycopg.Error) -> None:
        self._stop_waiting()
        if not self._answered.done():
            self._answered.set_exception(error)

    def _stop_waiting(self) -> None:
        # At once where libpq has closed the socket: the next one that is opened here has the same number.
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)
