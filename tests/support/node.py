"""Node.js 22, the official conformance suite, the TypeScript SDK and its example server, which npm installs once into
the user's cache.

`tests/conformance/package-lock.json` names the exact packages. Where the machine's own Node is older than 22, one comes
from npm too. No script of a package is run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tests.support.tools import missing_tool, require_tool

LOCK = Path(__file__).parents[1] / "conformance" / "package-lock.json"
NODE_VERSION = "22.23.3"
EVERYTHING_VERSION = "2026.8.31"
ESBUILD_VERSION = "0.25.12"
INSTALL_TIMEOUT = 240.0
"""Seconds that npm may take for one installation; from an empty cache both took 25 s together."""


@dataclass(frozen=True, slots=True)
class Node:
    """The binary, and the folder with `node_modules` that scripts resolve their imports in."""

    binary: str
    folder: Path

    @property
    def conformance(self) -> list[str]:
        """The beginning of a command line of the conformance suite."""
        return [self.binary, str(self.folder / "node_modules/@modelcontextprotocol/conformance/dist/index.js")]


def install_node() -> Node:
    """Install what is not there yet; skips the test where that cannot be done."""
    npm = require_tool("npm", "install Node.js 22 or newer with npm, or Debian's package npm.")
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    folder = _installed(npm, f"conformance-{digest}", ["ci"], [LOCK.with_name("package.json"), LOCK])
    return Node(_recent_node() or _node_from_npm(npm), folder)


def install_everything() -> list[str]:
    """The command line of `@modelcontextprotocol/server-everything`; its argument says how it speaks, `stdio` say."""
    npm = require_tool("npm", "install Node.js 22 or newer with npm, or Debian's package npm.")
    package = "@modelcontextprotocol/server-everything"
    folder = _installed(npm, f"everything-{EVERYTHING_VERSION}", ["install", f"{package}@{EVERYTHING_VERSION}"], [])
    return [_recent_node() or _node_from_npm(npm), str(folder / "node_modules" / package / "dist/index.js")]


def bundle(node: Node, script: Path) -> bytes:
    """A module with all that it imports, for a browser, by esbuild."""
    npm = require_tool("npm", "install Node.js 22 or newer with npm, or Debian's package npm.")
    package = f"esbuild@{ESBUILD_VERSION}"
    folder = _installed(npm, f"esbuild-{ESBUILD_VERSION}", ["install", package], [])
    command = [
        *(node.binary, str(folder / "node_modules/esbuild/bin/esbuild"), str(script), "--bundle", "--format=esm"),
        *("--platform=browser", "--target=es2022", "--log-level=warning"),
    ]
    # The script's imports are found in the folder of the packages, wherever the script itself is.
    environment = {**os.environ, "NODE_PATH": str(node.folder / "node_modules")}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    return done.stdout


def _recent_node() -> str | None:
    """The machine's own Node, if it is recent enough."""
    if (node := shutil.which("node")) is None:
        return None
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    major = version.removeprefix("v").partition(".")[0]
    return node if major.isdigit() and int(major) >= 22 else None


def _node_from_npm(npm: str) -> str:
    arch = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    prefix = "node-bin" if (sys.platform, arch) == ("darwin", "arm64") else "node"
    package = f"{prefix}-{sys.platform}-{arch}"
    folder = _installed(npm, f"{package}-{NODE_VERSION}", ["install", f"{package}@{NODE_VERSION}"], [])
    return str(folder / "node_modules" / package / "bin" / "node")


def _installed(npm: str, name: str, arguments: list[str], manifests: list[Path]) -> Path:
    """The folder `name` in the cache, made by npm with these manifests unless it is there."""
    cache = platformdirs.user_cache_path("mcp-pg-events") / "node"
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there when it is whole: two test runs may install at once, and one may be killed.
    with tempfile.TemporaryDirectory(dir=cache, prefix="new-", ignore_cleanup_errors=True) as made:
        for manifest in manifests:
            shutil.copy(manifest, made)
        command = [npm, *arguments, "--prefix", made, "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        environment = {**os.environ, "NODE_OPTIONS": ""}
        try:
            subprocess.run(
                command,
                cwd=made,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            output = str(error.stderr or error)[-2000:]
            missing_tool(name, f"npm must be able to install it from its registry, and said: {output}")
        try:
            Path(made).rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
