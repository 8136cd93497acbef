"""Skips that say what to install, and the pytest hooks that turn them into failures in continuous integration.

A plain `pytest` skips what this machine cannot run. `.ci/run` sets MCP_PG_EVENTS_REQUIRE_TOOLS=1: from then on a skip
is a failure, unless the test skipped by `allow_skip` (for what no installation could change, such as the platform).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from typing import NoReturn

import pytest

REQUIRE = "MCP_PG_EVENTS_REQUIRE_TOOLS"


class AllowedSkip(pytest.skip.Exception):  # type: ignore[name-defined,misc]
    """A skip that stays a skip where tools are required."""


def missing_tool(name: str, how_to_install: str) -> NoReturn:
    """Skip the running test: `name` is not here, and `how_to_install` ends the sentence with what to do."""
    pytest.skip(f"{name} is missing: {how_to_install}")


def require_tool(name: str, how_to_install: str) -> str:
    """The path of the executable `name`; without it, skip the running test with a sentence."""
    return shutil.which(name) or missing_tool(name, how_to_install)


def allow_skip(reason: str) -> NoReturn:
    """Skip the running test, even where tools are required."""
    raise AllowedSkip(reason)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport, call: pytest.CallInfo[object] | None) -> None:
    if os.environ.get(REQUIRE) != "1" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    if call is not None and call.excinfo is not None and isinstance(call.excinfo.value, AllowedSkip):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"Skips are failures with {REQUIRE}=1. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report, call)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report, getattr(report, "call", None))
    return report
