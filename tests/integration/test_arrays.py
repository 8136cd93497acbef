"""Binary arrays, held against what PostgreSQL itself makes of the same values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcp_pg_events import arrays
from mcp_pg_events.arrays import Int8Array, TextArray

INT8 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))

per_example = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def connection(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        arrays.register(connection.adapters)
        yield connection


def row(connection: psycopg.Connection[Any], statement: str, *parameters: Any, prepare: bool | None = None) -> Any:
    return connection.execute(statement.encode(), parameters, prepare=prepare).fetchone()


@given(st.lists(INT8))
@example([])
@example([0])
@example([-(2**63), 2**63 - 1])
@per_example
def test_integers_are_byte_for_byte_what_postgresql_sends(
    connection: psycopg.Connection[Any], values: list[int]
) -> None:
    sent, back = row(connection, "SELECT array_send(%s::bigint[]), %b::bigint[]", values, Int8Array(values))
    assert back == values
    assert arrays._Int8ArrayDumper(Int8Array).dump(Int8Array(values)) == sent


@given(st.lists(TEXT))
@example([])
@example([""])
@example(["NULL", "null", "{}", '"', "\\", ",", " ", "\u2028", "\U0001f9ea", "x" * 100_000])
@per_example
def test_texts_are_byte_for_byte_what_postgresql_sends(connection: psycopg.Connection[Any], values: list[str]) -> None:
    array = TextArray(value.encode() for value in values)
    sent, back = row(connection, "SELECT array_send(%s::text[]), %b::text[]", values, array)
    assert back == values
    assert arrays._TextArrayDumper(TextArray).dump(array) == sent


def test_types_stay_whatever_the_values_are(connection: psycopg.Connection[Any]) -> None:
    """Lists of small and of large integers would be of two types, and the statement would be prepared twice."""
    connection.prepare_threshold = 0
    statement = "/* types stay */ SELECT pg_typeof(%b)::text, pg_typeof(%b)::text"
    for numbers, texts in ([], []), ([1], [b"a"]), ([2**40], [b"x" * 1000]):
        assert row(connection, statement, Int8Array(numbers), TextArray(texts)) == ("bigint[]", "text[]")
    (prepared,) = row(connection, "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '/* types stay %%'")
    assert prepared == 1


def test_any_iterable_will_do_and_is_read_once(connection: psycopg.Connection[Any]) -> None:
    array = Int8Array(number for number in range(3))
    for _ in range(2):
        assert row(connection, "SELECT %b::bigint[]", array) == ([0, 1, 2],)


def test_what_is_no_utf8_or_has_a_nul_is_refused_by_postgresql(connection: psycopg.Connection[Any]) -> None:
    for value in (b"\xff", b"a\0b", "\ud800".encode("utf-8", "surrogatepass")):
        with pytest.raises(psycopg.DataError):
            row(connection, "SELECT %b::text[]", TextArray([value]))
