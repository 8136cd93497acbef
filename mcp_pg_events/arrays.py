"""PostgreSQL arrays in binary, built in one pass.

A batch of events travels as three parallel arrays. psycopg dumps lists element by element and picks the smallest
integer type that fits, so that the statement's parameter types (and with them its prepared form) change with the
values; these two types are always `bigint[]` and `text[]`, and a payload that is bytes already stays bytes.
Layout: PostgreSQL's `array_send`, that is dimensions, null flag, element oid, length, lower bound, then the elements.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from psycopg import adapt, pq

__all__ = ["Int8Array", "TextArray", "dump_int8_array", "dump_text_array", "register"]

_INT8_OID, _INT8_ARRAY_OID = 20, 1016
_TEXT_OID, _TEXT_ARRAY_OID = 25, 1009
_HEADER = struct.Struct("!iiIii")
_LENGTH = struct.Struct("!i")
_NULL = _LENGTH.pack(-1)


class Int8Array:
    """The values of one `bigint[]` parameter."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[int]) -> None:
        self.values = list(values)


class TextArray:
    """The values of one `text[]` parameter, each UTF-8 already, or None for NULL."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[bytes | None]) -> None:
        self.values = list(values)


def dump_int8_array(array: Int8Array) -> bytes:
    """The binary form of a `bigint[]`."""
    count = len(array.values)
    if not count:
        return struct.pack("!iiI", 0, 0, _INT8_OID)
    flat: list[int] = []
    for value in array.values:
        flat += (8, value)
    return _HEADER.pack(1, 0, _INT8_OID, count, 1) + struct.pack("!" + "iq" * count, *flat)


def dump_text_array(array: TextArray) -> bytes:
    """The binary form of a `text[]`."""
    if not array.values:
        return struct.pack("!iiI", 0, 0, _TEXT_OID)
    parts = [_HEADER.pack(1, int(None in array.values), _TEXT_OID, len(array.values), 1)]
    for value in array.values:
        parts += (_NULL,) if value is None else (_LENGTH.pack(len(value)), value)
    return b"".join(parts)


class _Int8ArrayDumper(adapt.Dumper):
    format = pq.Format.BINARY
    oid = _INT8_ARRAY_OID

    def dump(self, obj: Int8Array) -> bytes:
        return dump_int8_array(obj)


class _TextArrayDumper(adapt.Dumper):
    format = pq.Format.BINARY
    oid = _TEXT_ARRAY_OID

    def dump(self, obj: TextArray) -> bytes:
        return dump_text_array(obj)


def register(adapters: adapt.AdaptersMap) -> None:
    """Teach a connection's adapters the two array types."""
    adapters.register_dumper(Int8Array, _Int8ArrayDumper)
    adapters.register_dumper(TextArray, _TextArrayDumper)
