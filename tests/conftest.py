"""Fixtures for every test: PostgreSQL and databases in it.

Each test gets a database of its own. `migrated` copies a template that was migrated once, because a copy takes a few
tens of milliseconds and a migration more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import create_database, database_name, drop_database, postgres
from tests.support.tools import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

pytest_plugins = ("pytester",)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """The administrator's DSN of the PostgreSQL of this run."""
    with postgres() as dsn:
        yield dsn


@pytest.fixture
def database(postgres_dsn: str) -> Iterator[str]:
    """The DSN of a new, empty database."""
    dsn = create_database(postgres_dsn)
    yield dsn
    drop_database(postgres_dsn, dsn)


@pytest.fixture(scope="session")
def migrated_template(postgres_dsn: str) -> Iterator[str]:
    """The DSN of a migrated database, for copying only: a connection to it makes copies fail."""
    from mcp_pg_events.migrate import upgrade

    dsn = create_database(postgres_dsn)
    try:
        upgrade(dsn)
        yield dsn
    finally:
        drop_database(postgres_dsn, dsn)


@pytest.fixture
def migrated(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """The DSN of a new database with the current schema in `mcp_events`."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    yield dsn
    drop_database(postgres_dsn, dsn)


@pytest.fixture
def other(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """A second database as `migrated` is one."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    yield dsn
    drop_database(postgres_dsn, dsn)


@pytest.fixture(scope="module")
def migrated_once(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """As `migrated`, one for all tests of a module: each has sessions of its own, and leaves the tables as they are."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    yield dsn
    drop_database(postgres_dsn, dsn)
