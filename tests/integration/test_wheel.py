"""The wheel carries its migrations and SQL: it is built, installed elsewhere, and migrates from there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mcp_pg_events import migrate
from mcp_pg_events.schema import REVISION

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """By way of the sdist, as a package index would get it; without isolation, so that nothing is downloaded."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    return built


def test_an_installed_wheel_migrates(wheel: Path, tmp_path: Path, database: str) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "mcp_pg_events/py.typed" in names
    for source in [*(ROOT / "migrations").rglob("*.py"), *(ROOT / "sql").glob("*.sql")]:
        assert f"mcp_pg_events/_{source.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith(("tests", "migrations", "sql"))]

    # Dependencies come from here by a .pth file; the package itself, which may be installed here too, from its wheel.
    home = tmp_path / "elsewhere"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"

    where = run(python, "-c", "import mcp_pg_events.migrate as m; print(m.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    said = run(python, "-m", "mcp_pg_events", "migrate", cwd=tmp_path, MCP_PG_EVENTS_DSN=database)
    assert said == f"Schema mcp_events is at revision {REVISION}.\n"
    assert migrate.current(database) == REVISION
    assert "CREATE TABLE settings" in run(python, "-m", "mcp_pg_events", "migrate", "--sql", cwd=tmp_path)
