"""The worker processes of `tests/e2e`, for tests that hurt them."""

from tests.e2e.conftest import running_workers, shared_workers, start_workers

__all__ = ["running_workers", "shared_workers", "start_workers"]
