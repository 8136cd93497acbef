"""Skips: a sentence by default, a failure where tools are required."""

from __future__ import annotations

import pytest

SAMPLE = """
import pytest
from tests.support.tools import allow_skip, require_tool

def test_missing():
    require_tool("no-such-program", "run `install it`.")

def test_silent():
    pytest.skip("just so")

def test_allowed():
    allow_skip("There is no such signal on this platform.")

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail():
    assert False

def test_passes():
    assert require_tool("python3", "install Python.")
"""

COLLECTED = """
import pytest
pytest.importorskip("no_such_module")
"""


def test_a_missing_tool_is_a_skip_that_says_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCP_PG_EVENTS_REQUIRE_TOOLS", raising=False)
    pytester.makepyfile(SAMPLE)
    result = pytester.runpytest_inprocess("-p", "tests.support.tools", "-rs")
    result.assert_outcomes(passed=1, skipped=3, xfailed=1)
    result.stdout.fnmatch_lines(["*no-such-program is missing: run `install it`.*"])


def test_every_other_skip_fails_where_tools_are_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_PG_EVENTS_REQUIRE_TOOLS", "1")
    pytester.makepyfile(SAMPLE)
    result = pytester.runpytest_inprocess("-p", "tests.support.tools")
    result.assert_outcomes(passed=1, failed=2, skipped=1, xfailed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*Skips are failures with MCP_PG_EVENTS_REQUIRE_TOOLS=1.*no-such-program*"])


def test_a_module_that_is_skipped_whole_fails_too(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_PG_EVENTS_REQUIRE_TOOLS", "1")
    pytester.makepyfile(COLLECTED)
    result = pytester.runpytest_inprocess("-p", "tests.support.tools")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*Skips are failures*no_such_module*"])
