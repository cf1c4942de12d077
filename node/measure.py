"""Seconds, memory peaks and joules by phase, each peak reset when its phase begins.

Linux keeps the resident high-water mark of a process and lets it be reset (``5`` into
``/proc/self/clear_refs``, proc(5)).  Where that is not so the peak is absent, never zero.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from node.energy import Meter
from protocol import heap
from protocol.parts import Cost, Limits, Phase

MIN_WAIT_SECONDS = 0.05  # a shorter wait is not worth its bytes yet
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class _Mark(NamedTuple):
    at: float
    joules: float | None


class LimitError(Exception):
    """A task takes more than was said that it may take here."""


class Phases:
    """Collects one ``Cost`` per phase, and one of ``wait`` for the time between phases.

    Args:
        device: where the model is; a CUDA device's peaks are torch's allocator's.
        meter: of energy, if there is one.
    """

    def __init__(self, device: str = "cpu", meter: Meter | None = None) -> None:
        self._device, self._meter = device, meter
        self._costs: list[Cost] = []
        self._ended: _Mark | None = None  # the last phase
        self._began, self._has_peak = _Mark(0.0, None), False  # the phase that runs
        self._waited = _Mark(0.0, 0.0)

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Measure what runs inside; phases do not nest."""
        start = self._mark()
        if self._ended is not None:
            self._waited = _plus(self._waited, self._ended, start)
        has_peak, cuda = _reset_peak(), _torch_cuda() if self._device.startswith("cuda") else None
        self._began, self._has_peak = start, has_peak
        if cuda is not None:
            cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self._ended = end = self._mark()
            seconds, joules = _plus(_Mark(0.0, 0.0), start, end)
            rss = _peak_bytes() if has_peak else None
            allocated, reserved = _cuda_peaks(cuda, self._device)
            self._costs.append(Cost(phase, seconds, rss, allocated, reserved, joules))

    def check(self, limits: Limits) -> None:
        """See that the phase that runs is within its limits.

        Raises:
            LimitError: it is not.
        """
        seconds = time.perf_counter() - self._began.at
        if limits.seconds is not None and seconds > limits.seconds:
            raise LimitError(f"{seconds:.3g} s, and --max-seconds is {limits.seconds:g}")
        if limits.memory is None or not self._has_peak:
            return
        peak = _peak_bytes()
        if peak is not None and peak > limits.memory:
            raise LimitError(
                f"{peak / 1e6:.0f} MB resident, and --max-memory is {limits.memory / 1e6:.0f} MB"
            )

    def take(self) -> tuple[Cost, ...]:
        """The costs so far, which are then forgotten; the wait between them comes last."""
        costs, self._costs = self._costs, []
        if self._waited.at >= MIN_WAIT_SECONDS:
            costs.append(Cost("wait", self._waited.at, joules=self._waited.joules))
            self._waited = _Mark(0.0, 0.0)
        return tuple(costs)

    def _mark(self) -> _Mark:
        return _Mark(time.perf_counter(), self._meter.joules() if self._meter else None)


def _plus(total: _Mark, start: _Mark, end: _Mark) -> _Mark:
    """A sum of spans and one more; their joules are unknown as soon as one's are."""
    seconds = total.at + end.at - start.at
    if total.joules is None or start.joules is None or end.joules is None:
        return _Mark(seconds, None)
    return _Mark(seconds, total.joules + max(0.0, end.joules - start.joules))


def _reset_peak() -> bool:
    heap.give_back()  # or one phase's memory is in the next one's peak
    try:
        with _CLEAR.open("wb", buffering=0) as file:
            file.write(b"5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int | None:
    with _STATUS.open("rb", buffering=0) as file:
        match = re.search(rb"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _torch_cuda() -> Any:
    torch = sys.modules.get("torch")  # measured only once something else has loaded it
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _cuda_peaks(cuda: Any, device: str) -> tuple[int | None, int | None]:
    """Of tensors, and of what torch's allocator holds for them."""
    if cuda is None:
        return None, None
    return int(cuda.max_memory_allocated(device)), int(cuda.max_memory_reserved(device))
