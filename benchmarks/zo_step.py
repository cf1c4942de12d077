"""A zeroth-order step over the forward passes in it: SmolLM2-135M's shape, all parameters.

    python -m benchmarks.zo_step

One step is f(x + eps z), f(x - eps z) and x <- x - eta g z, batch 4 x 128.  Ours never
changes x but for the last of these (``node.shift``); MeZO's way, four passes over the
weights with ``torch.randn``, runs beside it.  Memory is the process's resident peak, reset
before each.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a node does, before torch is loaded

import numpy as np
import torch

from benchmarks.harness import Metric, alternate, no_arguments, num_cores, progress, report
from node import model
from node.data import Examples
from node.measure import Phases
from node.oracle import TorchOracle
from node.task import Batch, TextTask
from protocol import kernels, noise
from protocol.experiment import Data, Model, Peft
from protocol.noise import Direction

EPS, REPEATS = 1e-3, 7
DATA = Data(
    id="none",
    task="prompt",
    template="{text} It was",
    words=(" terrible", " great"),
    max_length=128,
)


def mezo_step(
    oracle: TorchOracle, w: torch.Tensor, batch: Batch, parts: list[torch.Tensor]
) -> None:
    """As published: z is drawn four times, the weights are moved four times."""

    def move(scale: float) -> None:
        generator = torch.Generator().manual_seed(7)
        for part in parts:
            part.add_(torch.randn(part.shape, generator=generator) * scale)

    move(EPS)
    plus = oracle.loss(w, batch)
    move(-2 * EPS)
    minus = oracle.loss(w, batch)
    move(EPS)
    move(-1e-9 * (plus - minus) / (2 * EPS))


def main() -> None:
    """Load, time in turn, report."""
    no_arguments(__doc__)
    torch.set_num_threads(num_cores())
    kernels.use_threads(num_cores())
    trained = model.load(
        Model(id="random:smollm2-135m"),
        Peft(kind="full"),
        DATA,
        2,
        device="cpu",
        seed=0,
    )
    task = TextTask(trained, DATA, ("0", "1"))
    oracle = TorchOracle(trained, task)
    w = oracle.start(oracle.initial())
    texts = Examples(["so it goes, on and on, " * 9] * 4, np.array([0, 1, 1, 0]))
    batch = task.batch(task.tokenise(texts), range(4))
    parts = list(torch.split(w, [p.numel() for p in trained.parameters]))
    direction = Direction(noise.key("direction", 0), ((0, len(w)),))
    progress(f"{len(w):,} parameters, batch {tuple(batch.inputs['input_ids'].shape)}")

    def two_passes() -> None:
        oracle.loss(w, batch)
        oracle.loss(w, batch)

    def pair() -> None:
        oracle.losses(w, [direction], (EPS, -EPS), batch)

    def step() -> None:
        plus, minus = oracle.losses(w, [direction], (EPS, -EPS), batch)[0]
        oracle.add_(w, -1e-9 * (plus - minus) / (2 * EPS), direction)

    plain, ours, both, mezo = alternate(
        two_passes,
        step,
        pair,
        lambda: mezo_step(oracle, w, batch, parts),
        repeats=REPEATS,
    )
    phases = Phases()
    for function in (two_passes, step, lambda: mezo_step(oracle, w, batch, parts)):
        with phases("inference"):
            function()
    peaks = [cost.rss or 0 for cost in phases.take()]
    for name, seconds in (("two passes", plain), ("step", ours), ("MeZO's step", mezo)):
        progress(f"{name}: {seconds:.3f} s, {seconds / plain:.3f} of two passes")
    progress(f"peaks in MB: {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)}")
    metrics = {
        "step_over_two_passes": Metric(ours / plain, "ratio", "lower", 1.10),
        "losses_over_two_passes": Metric(both / plain, "ratio", "lower"),
        "mezo_over_two_passes": Metric(mezo / plain, "ratio", "lower"),
        "pass": Metric(plain / 2, "s", "lower"),
    }
    if all(peaks):  # absent where the system has no peak to reset
        metrics["peak_over_inference"] = Metric(peaks[1] / peaks[0], "ratio", "lower", 1.15)
        metrics["mezo_peak_over_inference"] = Metric(peaks[2] / peaks[0], "ratio", "lower")
    report("zo_step", metrics)


if __name__ == "__main__":
    main()
