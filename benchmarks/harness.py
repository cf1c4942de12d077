"""What every benchmark shares: fair timing, the machine's name, one line of results.

    python -m benchmarks.noise

prints what it likes and ends with one line of JSON: the benchmark, the machine, and each
metric with its value, its unit, which way is better and, where one is set, its reach.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil


@dataclass(frozen=True, slots=True)
class Metric:
    """One number.

    ``reach`` is the value that it must come to, at most where lower is better and at
    least where higher is; None where it is there to be read only.
    """

    value: float
    unit: str
    better: Literal["lower", "higher"]
    reach: float | None = None


def report(name: str, metrics: Mapping[str, Metric]) -> None:
    """Print the results as the last line of standard output, in JSON."""
    found = {
        metric: {
            "value": float(f"{m.value:.4g}"),
            **({} if m.reach is None else {"reach": m.reach}),
            "better": m.better,
            "unit": m.unit,
        }
        for metric, m in metrics.items()
    }
    print(json.dumps({"benchmark": name, "machine": machine(), "metrics": found}), flush=True)


def no_arguments(doc: str | None) -> None:
    """Refuse every argument but ``--help``, which says what the benchmark is, before it begins."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=doc, formatter_class=raw).parse_args()


def alternate(*functions: Callable[[], object], repeats: int) -> list[float]:
    """The median seconds of each function, run in turn.

    A neighbour on the machine or a falling clock then meets them all alike.  Each runs
    once before, untimed: that call compiles and touches fresh memory.
    """
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def progress(text: str) -> None:
    """For whoever watches; standard output belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on: the processor, the memory, the versions."""
    return {
        "cpu": _processor(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "numpy", "numba")},
    }


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    # Arm kernels give no "model name"; a Jetson names its board under "Model"
    for field in ("model name", "Model"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
