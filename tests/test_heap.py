"""What is asked of the C library, by its own account (malloc_info(3))."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from protocol import heap

COUNT = """
import ctypes, sys, threading
from protocol import heap

if sys.argv[1] == "shared":
    heap.share()
all_here, kept = threading.Barrier(4), []

def allocate():
    kept.append(bytearray(100_000))
    all_here.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A C library without glibc's calls."""
    heap._glibc.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    yield
    heap._glibc.cache_clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_threads_share_one_heap_when_told_to_and_not_before() -> None:
    def heaps(how: str) -> int:
        command = [sys.executable, "-c", COUNT, how]
        return subprocess.run(command, capture_output=True, check=True).stdout.count(b"<heap ")

    assert heaps("apart") > 1
    assert heaps("shared") == 1


@pytest.mark.usefixtures("elsewhere")
def test_without_glibc_nothing_is_asked() -> None:
    heap.share()
    heap.give_back()
