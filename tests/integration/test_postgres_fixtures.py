"""The databases that the other tests stand on."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.postgres import create_database, drop_database, dsn_url


def test_a_test_gets_an_empty_database_of_its_own(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname !~ '^(pg_|information)'").fetchone()
    assert row == (0,)


def test_a_migrated_database_is_a_copy_of_the_template(migrated: str, migrated_template: str) -> None:
    assert migrated != migrated_template
    with psycopg.connect(migrated, autocommit=True) as connection:
        row = connection.execute("SELECT version_num FROM mcp_events.alembic_version").fetchone()
    assert row is not None


def test_dropping_a_database_ends_its_connections(postgres_dsn: str) -> None:
    dsn = create_database(postgres_dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        drop_database(postgres_dsn, dsn)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


@pytest.mark.parametrize(
    "dsn", ["postgresql://u:p@h:5433/d?application_name=a", "host=/run/pg port=5433 user=u dbname=d"]
)
def test_a_dsn_becomes_a_url_with_the_same_parts(dsn: str) -> None:
    assert conninfo_to_dict(dsn_url(dsn, dbname="other")) == conninfo_to_dict(dsn) | {"dbname": "other"}
