"""The README and docs/ say what the code says: links, programs, options, defaults, reasons, tables, variables.

A Python block is a program, to be imported here, when `<!-- program -->` stands above it; the others have to compile.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcp_types
import pytest
import typer

from mcp_pg_events import Health, PostgresStore, durable, errors
from mcp_pg_events.cli import app as command_line
from mcp_pg_events.finals import MESSAGES as _MESSAGES
from mcp_pg_events.finals import final_error
from mcp_pg_events.proxy.http import proxy_app
from mcp_pg_events.proxy.stdio import stdio_app
from mcp_pg_events.store import StoreOptions
from mcp_pg_events.tables import METADATA
from mcp_pg_events.telemetry import INSTRUMENTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PACKAGE = ROOT / "mcp_pg_events"

FENCE = re.compile(r"^(<!-- program -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"\bMCP_PG_EVENTS_[A-Z][A-Z_]*[A-Z]\b")
MACHINE = re.compile(r"(?<![\w.])/(?:home|mnt|opt|private|root|srv|tmp|Users|work)/|file://")

ANSWERING = ("http.py", "answers.py", "responses.py", "proxy/http.py", "proxy/endpoint.py")
README_COMMANDS = ["pip install -e '.[embedded]' && mcp-pg-events demo", "pip install -e '.[dev]' && pytest"]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    program: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[2] in languages:
                line = text.count("\n", 0, match.start(3)) + 1
                found.append(Block(page, line, match[2], match[3], match[1] is not None))
    return found


def section(page: str, heading: str) -> str:
    """What follows a heading, up to the next one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"{page} has no heading {heading!r}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a text's first table, without its head."""
    match = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert match is not None, "no table"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in match[0].splitlines()[2:]]


def names(text: str) -> list[str]:
    """The first cells of a table, without their back quotes."""
    return [row[0].split("`")[1] for row in table(text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- links and texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leads out of the project"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_index() -> None:
    reached = {DOCS / "index.md"}
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert sorted(set(DOCS.rglob("*.md")) - reached) == [], "Link these pages from docs/index.md."


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_path_of_somebodys_machine(page: Path) -> None:
    assert MACHINE.findall(page.read_text(encoding="utf-8")) == []


def test_the_readme_has_its_two_commands_each_on_a_line_and_stays_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in README_COMMANDS] == README_COMMANDS
    assert len(lines) <= 200


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_programs_import(block: Block) -> None:
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    if block.program:
        exec(code, types.ModuleType("program").__dict__)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


def test_there_are_programs() -> None:
    assert sum(block.program for block in blocks("python")) >= 3


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_the_commands_that_are_shown_exist(block: Block) -> None:
    for line in re.findall(r"mcp-pg-events [^|&>\n]*", block.text):
        words = shlex.split(line.partition(" -- ")[0])
        length = 3 if " ".join(words[:3]) in commands() else 2
        known = options(commands()[" ".join(words[:length])])
        arguments = words[length:]
        assert [word for word in arguments if word.startswith("-") and word not in known] == [], line


# --- the command line -------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """The commands that `--help` shows, by their names; Typer brings its own Click."""
    group: Any = typer.main.get_command(command_line)
    found = {"mcp-pg-events": group}
    for name, each in group.commands.items():
        inner = getattr(each, "commands", {"": each})
        found |= {f"mcp-pg-events {name} {second}".strip(): command for second, command in inner.items()}
    return found


def options(command: Any) -> dict[str, Any]:
    return {name: each for each in command.params for name in each.opts if name.startswith("--")}


def test_the_reference_has_the_commands_that_there_are() -> None:
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(.*)`$", text, re.MULTILINE) == list(commands())


@pytest.mark.parametrize("name", list(commands()))
def test_the_reference_has_the_options_and_defaults_that_there_are(name: str) -> None:
    documented = {row[0].split("`")[1]: row[1] for row in table(section("reference/cli.md", f"`{name}`"))}
    documented.pop("--help", None)
    known = options(commands()[name])
    assert sorted(documented) == sorted(known)
    for option, parameter in known.items():
        if parameter.default is not None and not isinstance(parameter.default, bool):
            assert documented[option] == f"`{parameter.default}`", option


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "page"),
    [(durable, "durable"), (PostgresStore, "store"), (stdio_app, "proxy"), (proxy_app, "proxy")],
    ids=["durable", "store", "stdio_app", "proxy_app"],
)
def test_the_reference_has_the_parameters_and_defaults_that_there_are(function: object, page: str) -> None:
    rows = table(section(f"reference/{page}.md", f"`{function.__name__}`"))  # type: ignore[attr-defined]
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    expected = {
        each.name: "" if each.default is each.empty else f"`{each.default!r}`"
        for each in parameters
        if each.kind is not each.VAR_KEYWORD
    }
    assert {row[0].strip("`"): row[1] for row in rows} == expected


def test_durable_takes_the_options_of_a_store() -> None:
    parameters = inspect.signature(PostgresStore).parameters.values()
    assert set(StoreOptions.__annotations__) == {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_the_reference_has_every_instrument() -> None:
    documented = [tuple(row) for row in table(section("reference/metrics.md", "Metrics"))]
    assert documented == [
        (f"`{each.name}`", each.kind, f"`{each.unit}`", each.description, ", ".join(f"`{a}`" for a in each.attributes))
        for each in INSTRUMENTS
    ]


def test_the_reference_has_every_field_of_health() -> None:
    assert tuple(names(section("reference/store.md", "`Health`"))) == Health._fields


def test_the_reference_has_every_reason() -> None:
    text = section("reference/errors.md", "A call ends with an error")
    assert set(names(text)) == set(_MESSAGES)
    [example] = [block for block in blocks("json") if block.page == DOCS / "reference/errors.md"]
    assert json.loads(example.text)["error"] == final_error("worker_lost")


def test_the_reference_has_every_status_and_code() -> None:
    text = section("reference/errors.md", "HTTP statuses")
    documented = {(row[0], row[1]) for row in table(text)}
    used = set()
    trees = [ast.parse((PACKAGE / name).read_text(encoding="utf-8")) for name in ANSWERING]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "error_response":
            status, _, *code = node.args
            assert isinstance(status, ast.Constant)
            name = code[0].id if code and isinstance(code[0], ast.Name) else "INVALID_REQUEST"
            used.add((str(status.value), str(getattr(mcp_types, name))))
    assert len(used) > 5
    assert used <= documented


def test_the_reference_has_every_exception() -> None:
    assert sorted(names(section("reference/errors.md", "Exceptions"))) == sorted(errors.__all__)


@pytest.mark.parametrize("name", list(METADATA.tables))
def test_the_reference_has_every_column(name: str) -> None:
    assert names(section("reference/schema.md", f"`{name}`")) == [
        column.name for column in METADATA.tables[name].columns
    ]


def test_the_reference_has_every_variable() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "migrations").rglob("*.py"), *(ROOT / "tests" / "support").glob("*.py")]
    used = {name for path in sources for name in VARIABLE.findall(path.read_text(encoding="utf-8"))}
    documented = set(VARIABLE.findall((DOCS / "reference/settings.md").read_text(encoding="utf-8")))
    assert documented == used
