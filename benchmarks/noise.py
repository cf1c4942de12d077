"""Making noise and adding it: the published way against ours, on 2^26 fp32 numbers.

    python -m benchmarks.noise

The published way (MeZO and those built on it) seeds torch's generator, draws z with
``torch.randn`` and adds alpha z.  torch draws on one thread whatever it is given, and its
numbers depend on the device; ours are the same bits everywhere.  The floor is what memory
alone takes: one pass over x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import torch

from benchmarks.harness import Metric, alternate, num_cores, progress, report
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


def main() -> None:
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
    metrics["torch_over_normal"] = Metric(ns["torch"] / ns["normal"], "x", "higher", reach=5)
    report("noise", metrics)


if __name__ == "__main__":
    main()
