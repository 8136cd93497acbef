"""Node and the packages that run in it, for the whole folder."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SharedWorkers, running_workers, shared_workers
from tests.support.node import Node, install_node

__all__ = ["SharedWorkers", "running_workers", "shared_workers"]


@pytest.fixture(scope="session")
def node() -> Node:
    """Node 22 or newer with the conformance suite and the TypeScript SDK."""
    return install_node()
