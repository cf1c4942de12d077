"""Joules of an NVIDIA GPU by its own counter, through NVML: ``pip install "seedwire[nvml]"``."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

log = logging.getLogger(__name__)


class Gpu:
    """One GPU, of Volta or later.

    Args:
        library: ``pynvml``, initialised.
        handle: of the device.

    Raises:
        library.NVMLError: this one does not count.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._start = self._millijoules()

    def joules(self) -> float | None:
        """Since this was made; None once it cannot be read."""
        try:
            return (self._millijoules() - self._start) / 1e3
        except self._library.NVMLError as error:
            log.warning("no joules of the GPU: %s", error)
            return None

    def close(self) -> None:
        """Nothing to end."""

    def _millijoules(self) -> int:
        return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def find(device: str) -> Gpu | None:
    """The meter of a CUDA device as torch calls it; None without one, or without the package."""
    if not device.startswith("cuda"):
        return None
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        return Gpu(library, _handle(library, device))
    except (library.NVMLError, IndexError, ValueError) as error:
        log.info("no joules of %s: %s", device, error)
        return None


def _handle(library: Any, device: str) -> Any:
    """NVML counts all devices, torch those that ``CUDA_VISIBLE_DEVICES`` lets it see."""
    number = device.partition(":")[2] or "0"
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        number = visible.split(",")[int(number)].strip()
    if number.startswith(("GPU-", "MIG-")):
        return library.nvmlDeviceGetHandleByUUID(number)
    return library.nvmlDeviceGetHandleByIndex(int(number))
