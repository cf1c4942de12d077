"""Memory and seconds by phase."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from node import measure
from node.measure import Phases

MB = 1_000_000
needs_peak = pytest.mark.skipif(
    not measure._reset_peak(), reason="this kernel does not let a process reset its peak"
)


def touch(megabytes: int) -> None:
    np.ones(megabytes * MB, np.uint8)  # written to, hence resident; freed at once


@needs_peak
def test_what_a_phase_allocates_is_in_its_peak_and_in_no_other() -> None:
    phases = Phases()
    with phases("inference"):
        touch(1)
    with phases("train"):
        touch(100)
    with phases("encode"):
        touch(1)
    before, during, after = (cost.rss for cost in phases.take())
    assert before is not None
    assert during is not None
    assert after is not None
    assert 90 * MB < during - before < 120 * MB
    assert abs(after - before) < 10 * MB


@needs_peak
def test_a_peak_is_in_bytes_of_the_whole_process() -> None:
    phases = Phases()
    with phases("load"):
        pass
    (cost,) = phases.take()
    assert cost.rss is not None
    status = Path("/proc/self/statm").read_text().split()
    assert cost.rss == pytest.approx(int(status[1]) * 4096, rel=0.2)


def test_costs_are_taken_once_in_order() -> None:
    phases = Phases()
    with phases("train"):
        pass
    with phases("encode"):
        pass
    assert [cost.phase for cost in phases.take()] == ["train", "encode"]
    assert phases.take() == ()


def test_seconds_are_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases()
    with phases("train"):
        pass
    assert phases.take()[0].seconds == 2.5


def fails() -> None:
    raise MemoryError


def test_a_phase_that_fails_is_counted_too() -> None:
    phases = Phases()
    with pytest.raises(MemoryError), phases("train"):
        fails()
    assert [cost.phase for cost in phases.take()] == ["train"]


def test_a_peak_that_cannot_be_reset_is_absent_and_not_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "no such directory" / "clear_refs")
    phases = Phases()
    with phases("train"):
        pass
    assert phases.take()[0].rss is None


def test_a_status_without_a_peak_is_absent_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "status").write_text("VmRSS:\t 5 kB\n")
    (tmp_path / "clear").write_text("")
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "clear")
    phases = Phases()
    with phases("train"):
        pass
    assert phases.take()[0].rss is None
    assert (tmp_path / "clear").read_text() == "5"  # proc(5): reset the peak


def test_the_peak_is_read_in_kibibytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t 900 kB\nVmHWM:\t     123 kB\n")
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    assert measure._peak_bytes() == 123 * 1024


def test_without_a_device_its_peak_is_absent() -> None:
    phases = Phases("cuda:1")
    with phases("train"):
        pass
    assert phases.take()[0].cuda is None
