"""The model as methods see it: losses and derivatives of one flat fp32 vector.

The trained parameters are views of one flat buffer.  A local run trains that buffer in
place (``start``); asking about any other vector copies it there first.  Directions leave
it alone: perturbed inference (``node.shift``) and forward mode (``node.forward``).

With micro-batches a mini-batch goes through the model in parts, whose means are averaged
by their weights; directions go in groups.  Both change memory and rounding, nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from node import checkpointing, device
from node.forward.engine import Forward
from node.model import TrainedModel
from node.shift import Shifter
from node.task import Batch, Task
from protocol.experiment import Compute
from protocol.noise import Direction
from protocol.payload import Flat

Ranges = Sequence[tuple[int, int]]


class TorchOracle:
    """Implements ``fedalgos.method.Oracle`` for a model and a task."""

    def __init__(self, trained: TrainedModel, task: Task, compute: Compute | None = None) -> None:
        self._compute = compute or Compute()
        self._task = task
        self._parameters = trained.parameters
        self._shapes = [tuple(p.shape) for p in self._parameters]
        self._sizes = [p.numel() for p in self._parameters]
        flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self._hold(flat)
        self._starts = list(itertools.accumulate(self._sizes, initial=0))
        pairs = zip(self._parameters, self._starts, strict=False)
        self._offsets = {id(p): start for p, start in pairs}
        self._model, self._device = trained.model, trained.device
        if self._compute.checkpointing:
            checkpointing.enable(trained.model)
        self._shifter = Shifter(trained.model, self._offsets, task.label_rows)

    def deal(self, mesh: Any) -> None:
        """Leave each rank of a group its part of the frozen weights."""
        from node import fsdp  # few need it, and it takes a while

        self._forward  # noqa: B018  # looks at whole weights, for the last time
        fsdp.deal(self._model, mesh, self._device)
        self._hold(self._flat.to(self._device))

    def _hold(self, flat: torch.Tensor) -> None:
        """Have this buffer: from here on the model's own tensors are views of it."""
        self._flat = flat
        for parameter, part in zip(self._parameters, self._parts(flat), strict=True):
            parameter.data = part

    @cached_property
    def _forward(self) -> Forward:
        """Made when it is first asked for: it tries modules of the model out."""
        return Forward(self._model, self._offsets)

    def initial(self) -> Flat:
        """The parameters that the model was loaded with, (size,); ask before anything else."""
        return self.numpy(self._flat).copy()

    def load(self, x: Flat) -> None:
        """Put parameters into the model for good, e.g. before it is scored or saved."""
        self._put(torch.from_numpy(x))

    def start(self, x: Flat) -> torch.Tensor:
        """The model's own buffer, set to ``x``."""
        self.load(x)
        return self._flat

    def array(self, x: Flat) -> torch.Tensor:
        return torch.tensor(x, device=self._flat.device)  # copies

    def numpy(self, x: torch.Tensor) -> Flat:
        out: Flat = x.detach().cpu().numpy()
        return out

    @torch.no_grad()
    def loss(self, x: torch.Tensor, batch: Batch) -> float:
        self._put(x)
        return self._mean_loss(batch)

    def grad(
        self, x: torch.Tensor, batch: Batch, ranges: Ranges | None = None
    ) -> tuple[float, torch.Tensor]:
        self._put(x)
        gradient = torch.zeros_like(self._flat)
        with self._differentiating(ranges) as (wanted, spans):
            losses = []
            if not wanted:
                return self.loss(x, batch), gradient
            for part, share in batch.shares(self._compute.micro_batch):
                loss = self._loss(part)
                losses.append((float(loss.detach()), share))
                for (start, stop), g in zip(
                    spans, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
                ):
                    if g is not None:
                        gradient[start:stop].add_(g.reshape(-1), alpha=share)
        return _mean(losses), gradient

    def jvp(
        self, x: torch.Tensor, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        """Forward mode: tangents only on the tensors that the directions touch.

        Raises:
            ModelError: the model uses an operation without a forward rule.
        """
        self._put(x)
        losses: list[tuple[float, float]] = []
        slopes = [0.0] * len(directions)
        for part, share in batch.shares(self._compute.micro_batch):
            for at in range(0, len(directions), self._compute.directions):
                group = directions[at : at + self._compute.directions]
                loss, along = self._forward.run(self._flat, group, partial(self._loss, part))
                for k, slope in enumerate(along):
                    slopes[at + k] += share * slope
                if at == 0:
                    losses.append((loss, share))
        return _mean(losses), slopes

    @torch.no_grad()
    def losses(
        self,
        x: torch.Tensor,
        directions: Sequence[Direction],
        offsets: Sequence[float],
        batch: Batch,
    ) -> list[tuple[float, ...]]:
        """As ``Oracle.losses``.

        Raises:
            ModelError: the model reads a trained tensor outside of the module that owns it.
        """
        return [
            self._shifter.run(x, direction, offsets, lambda: self._mean_loss(batch))
            for direction in directions
        ]

    def add_(self, x: torch.Tensor, alpha: float, direction: Direction) -> None:
        device.add_(x, alpha, direction)

    @torch.no_grad()
    def _put(self, x: torch.Tensor) -> None:
        if x.data_ptr() != self._flat.data_ptr():
            self._flat.copy_(x)

    def _parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _loss(self, batch: Batch) -> torch.Tensor:
        return self._task.loss(batch)

    def _mean_loss(self, batch: Batch) -> float:
        shares = batch.shares(self._compute.micro_batch)
        return _mean((float(self._loss(part)), share) for part, share in shares)

    @contextmanager
    def _differentiating(
        self, ranges: Ranges | None
    ) -> Iterator[tuple[list[torch.nn.Parameter], list[tuple[int, int]]]]:
        """Ask autograd for the tensors within ``ranges`` alone; it keeps less for fewer."""
        spans = list(itertools.pairwise(self._starts))
        inside = [
            ranges is None or any(a <= start and stop <= b for a, b in ranges)
            for start, stop in spans
        ]
        for parameter, is_inside in zip(self._parameters, inside, strict=True):
            parameter.requires_grad_(is_inside)
        try:
            yield (
                list(itertools.compress(self._parameters, inside)),
                list(itertools.compress(spans, inside)),
            )
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    return sum(value * share for value, share in pairs)
