"""An oracle whose work is shared among the ranks of a group.

What a single process computes one after another, the ranks compute side by side: the
points of zeroth-order methods, the directions of forward mode, the micro-batches of
both.  Only scalars cross, and are put together in the single process's order; so
zeroth order, each of whose losses one rank computes by the same code, has the same bits.

For backpropagation each rank takes some rows of the mini-batch; gradients are added in
fp32, each weighted by what its rows count: examples, or scored tokens.  This is what
torch's DDP does, in one bucket.  DDP itself would be in the way: it listens to
``parameter.grad``, which we do not fill, averages by ranks and not by tokens, and knows of
no rank without rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedalgos.method import Batch, Oracle, Vector
from node.group import Group, gathered
from protocol.noise import Direction
from protocol.payload import Flat

Ranges = Sequence[tuple[int, int]]


class SharedOracle:
    """Implements ``fedalgos.method.Oracle``; every rank has to call it alike.

    Args:
        inner: this rank's own, over the same model.
        group: of the ranks.
        micro_batch: as of the experiment's [compute].
    """

    def __init__(self, inner: Oracle, group: Group, micro_batch: int = 0) -> None:
        self._inner, self._group, self._micro_batch = inner, group, micro_batch

    def start(self, x: Flat) -> Vector:
        return self._inner.start(x)

    def array(self, x: Flat) -> Vector:
        return self._inner.array(x)

    def numpy(self, x: Vector) -> Flat:
        return self._inner.numpy(x)

    def add_(self, x: Vector, alpha: float, direction: Direction) -> None:
        self._inner.add_(x, alpha, direction)

    def loss(self, x: Vector, batch: Batch) -> float:
        parts = list(batch.shares(self._micro_batch))
        own = parts[slice(*span(len(parts), self._group))]
        found = gathered(self._group, lambda: [self._inner.loss(x, part) for part, _ in own])
        return _mean(found, parts)

    def losses(
        self, x: Vector, directions: Sequence[Direction], offsets: Sequence[float], batch: Batch
    ) -> list[tuple[float, ...]]:
        parts = list(batch.shares(self._micro_batch))
        p, s = len(parts), len(offsets)

        def compute() -> list[float]:
            found: list[float] = []
            for at, own in self._runs(len(directions) * p, s):
                some, part = [offsets[i] for i in own], parts[at % p][0]
                found += self._inner.losses(x, [directions[at // p]], some, part)[0]
            return found

        # (directions, parts, offsets), so that a rank draws a direction once for both its points
        found = np.array(gathered(self._group, compute)).reshape(-1, p, s)
        return [tuple(_mean(points.tolist(), parts) for points in each.T) for each in found]

    def jvp(
        self, x: Vector, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        parts = list(batch.shares(self._micro_batch))
        k = len(directions)

        def compute() -> list[float]:
            found: list[float] = []
            for at, own in self._runs(len(parts), k):
                loss, slopes = self._inner.jvp(x, [directions[i] for i in own], parts[at][0])
                found += [value for slope in slopes for value in (loss, slope)]
            return found

        # (parts, directions, loss and slope)
        found = np.array(gathered(self._group, compute)).reshape(len(parts), k, 2)
        slopes = [_mean(each.tolist(), parts) for each in found[:, :, 1].T]
        return _mean(found[:, 0, 0].tolist(), parts), slopes

    def grad(self, x: Vector, batch: Batch, ranges: Ranges | None = None) -> tuple[float, Vector]:
        gradient = None

        def compute() -> list[float]:
            nonlocal gradient
            loss, gradient = self._own_grad(x, batch, ranges)
            return [loss]

        loss = sum(gathered(self._group, compute))
        self._add_up_(torch.as_tensor(gradient), ranges)  # the same memory, of numpy too
        return loss, gradient

    def _own_grad(self, x: Vector, batch: Batch, ranges: Ranges | None) -> tuple[float, Vector]:
        """Loss and gradient of this rank's rows, times what they count of the whole."""
        start, stop = span(len(batch), self._group)
        if start == stop:  # more ranks than rows
            return 0.0, self._inner.array(np.zeros(len(x), np.float32))
        part = batch.rows(start, stop)
        share = part.weight / batch.weight
        loss, gradient = self._inner.grad(x, part, ranges)
        gradient *= share
        return loss * share, gradient

    def _add_up_(self, gradient: torch.Tensor, ranges: Ranges | None) -> None:
        """Over the ranks, on the ranges: elsewhere all have zeros."""
        if ranges is None:
            self._group.sum_(gradient)
            return
        cuts = [gradient[a:b] for a, b in ranges]
        together = torch.cat(cuts)
        self._group.sum_(together)
        for cut, part in zip(cuts, torch.split(together, [len(c) for c in cuts]), strict=True):
            cut.copy_(part)

    def _runs(self, rows: int, width: int) -> Iterator[tuple[int, range]]:
        """This rank's share of a table: of each row that it has a part of, which columns."""
        start, stop = span(rows * width, self._group)
        for row in range(rows):
            own = range(max(start - row * width, 0), min(stop - row * width, width))
            if own:
                yield row, own


def span(count: int, group: Group) -> tuple[int, int]:
    """This rank's share of so many items in order: as even as can be, perhaps none."""
    bounds = [count * i // group.size for i in range(group.size + 1)]
    return list(itertools.pairwise(bounds))[group.rank]


def _mean(values: Sequence[float], parts: Sequence[tuple[Batch, float]]) -> float:
    """Over the micro-batches, as a single process adds them up."""
    return sum(value * share for value, (_, share) in zip(values, parts, strict=True))
