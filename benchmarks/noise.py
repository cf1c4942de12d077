"""Making noise and adding it: the published way against ours, on 2^26 fp32 numbers.

    python -m benchmarks.noise

The published way (MeZO and those built on it) seeds torch's generator, draws z with
``torch.randn`` and adds alpha z.  torch draws on one thread whatever it is given, and its
numbers depend on the device; ours are the same bits everywhere.  The floor is what memory
alone takes: one pass over x.  Apart from that: what the first job of a process takes, which loads
numba, where nothing is compiled yet and where it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import torch

from benchmarks.harness import Metric, alternate, no_arguments, num_cores, progress, report
from protocol import kernels, noise
from protocol.noise import Flat, Kind

SIZE = 1 << 26
PART = 1 << 20  # for the reference, which is there to be read
KEY, ALPHA = noise.key("direction", 0), 1e-3


def published(x: torch.Tensor, generator: torch.Generator) -> None:
    """As MeZO does it, with a generator of its own."""
    generator.manual_seed(KEY)
    x.add_(ALPHA * torch.randn(x.shape, generator=generator))


def ours(x: Flat, threads: int, kind: Kind) -> None:
    kernels.use_threads(threads)
    kernels.add_(x, [KEY], [ALPHA], kind=kind)


def reference(x: Flat, kind: Kind) -> None:
    noise.add(x, 0, np.array([KEY], np.uint64), np.array([ALPHA], np.float32), kind)


FIRST = """
import json, time
import numpy as np, psutil
from protocol import kernels
x, process = np.ones(1 << 20, np.float32), psutil.Process()
before, start = process.memory_info().rss, time.perf_counter()
kernels.add_(x, [1], [1e-3])
print(json.dumps([time.perf_counter() - start, process.memory_info().rss - before]))
"""


def first_job(cache: str) -> tuple[float, float]:
    """Seconds and resident bytes of a new process's first job, by its cache of compiled code."""
    line = [sys.executable, "-c", FIRST]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    told = subprocess.run(line, env=environment, stdout=subprocess.PIPE, check=True).stdout
    seconds, grown = json.loads(told)
    return seconds, grown


def main() -> None:
    no_arguments(__doc__)
    cores = num_cores()
    torch.set_num_threads(cores)
    tensor = torch.zeros(SIZE)
    x: Flat = tensor.numpy()  # the same memory for all
    jobs: dict[str, Callable[[], object]] = {
        "torch": partial(published, tensor, torch.Generator()),
        "memory": partial(tensor.add_, 1.0),
    }
    for kind in get_args(Kind):
        jobs[kind] = partial(ours, x, cores, kind)
        jobs[f"{kind}_1_thread"] = partial(ours, x, 1, kind)
    progress(f"{SIZE} numbers, {cores} threads; nanoseconds for each:")
    seconds = dict(zip(jobs, alternate(*jobs.values(), repeats=5), strict=True))
    ns = {name: 1e9 * taken / SIZE for name, taken in seconds.items()}
    (slow,) = alternate(partial(reference, x[:PART], "normal"), repeats=3)
    ns["reference"] = 1e9 * slow / PART
    for name, value in ns.items():
        progress(f"  {name:18}{value:8.3f}")
    reach = {"normal": 0.9}
    metrics = {
        f"{name}_ns": Metric(value, "ns/element", "lower", reach.get(name))
        for name, value in ns.items()
    }
    with tempfile.TemporaryDirectory() as cache:
        compiled, _ = first_job(cache)
        loaded, grown = first_job(cache)
    metrics |= {
        "first_job_compiled": Metric(compiled, "s", "lower"),
        "first_job_loaded": Metric(loaded, "s", "lower"),
        "first_job_memory": Metric(grown / 1e6, "MB", "lower"),
    }
    metrics["torch_over_normal"] = Metric(ns["torch"] / ns["normal"], "x", "higher", reach=5)
    report("noise", metrics)


if __name__ == "__main__":
    main()
