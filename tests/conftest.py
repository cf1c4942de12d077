"""Hypothesis profiles: ``dev`` here, ``ci`` (the same examples every time) where CI is set.

And keys of the tests' own: no test may see or touch those of whoever runs it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None)  # machines are busy
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


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
