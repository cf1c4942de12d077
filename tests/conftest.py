"""Hypothesis profiles: ``dev`` here, ``ci`` (the same examples every time) where CI is set.

And keys of the tests' own: no test may see or touch those of whoever runs it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Files whose tests start processes that load torch.  With `make test` a file goes to whichever
# process is free: they start first, so that none is left over at the end.
LONG = ["test_cluster", "test_cluster_guide", "test_group_processes", "test_memory", "test_push"]
LONG += ["test_run", "test_launchers", "test_notify"]

settings.register_profile("dev", max_examples=50, deadline=None)  # machines are busy
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, and tests/faults; in the order that they are collected in."""
    items.sort(key=lambda item: item.path.stem not in LONG and item.path.parent.name != "faults")


@pytest.fixture(scope="session", autouse=True)
def _own_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDWIRE_KEYS", str(tmp_path_factory.mktemp("keys")))
        yield


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Commands take SIGINT and SIGTERM for their process, which is the tests' own here."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
