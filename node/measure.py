"""Seconds and memory peaks by phase, each peak reset when its phase begins.

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
from typing import Any

from protocol.messages import Cost, Phase

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Phases:
    """Collects one ``Cost`` per phase.

    Args:
        device: where the model is; a CUDA device's peak is torch's allocator's.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._costs: list[Cost] = []

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Measure what runs inside; phases do not nest."""
        has_peak, device = _reset_peak(), _torch_cuda() if self._device.startswith("cuda") else None
        if device is not None:
            device.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            rss = _peak_bytes() if has_peak else None
            cuda = int(device.max_memory_allocated(self._device)) if device is not None else None
            self._costs.append(Cost(phase, seconds, rss, cuda))

    def take(self) -> tuple[Cost, ...]:
        """The costs so far, which are then forgotten."""
        costs, self._costs = tuple(self._costs), []
        return costs


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int | None:
    match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _torch_cuda() -> Any:
    torch = sys.modules.get("torch")  # measured only once something else has loaded it
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
