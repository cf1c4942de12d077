"""What the zeroth-order methods share: estimates from losses, and the checks of scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedalgos.method import Assignment, Batch, Oracle, Vector
from fedalgos.replay import alphas
from fedalgos.robust import Common
from protocol.noise import Direction
from protocol.payload import Flat, Payload, Run, Scalars

COMMON = -1  # stands for the client in the keys of directions that all clients share
Scheme = Literal["central", "forward"]
OWN_DIRECTIONS = Common("norms", "each client's scalars are along directions of its own")


def differences(
    oracle: Oracle,
    x: Vector,
    directions: Sequence[Direction],
    eps: float,
    batch: Batch,
    scheme: Scheme,
) -> tuple[list[np.float32], float]:
    """Directional derivatives at x by finite differences, and a loss to report.

    Central: (f(x + eps z) - f(x - eps z)) / (2 eps), exact on quadratics; the loss is the
    mean over both points and all directions.  Forward: (f(x + eps z) - f(x)) / eps, one
    pass fewer for each direction but the first, biased by eps z^T H z / 2; the loss is f(x).

    Returns:
        The derivatives, rounded to fp32 as they are sent, and the loss.
    """
    if scheme == "central":
        pairs = oracle.losses(x, directions, (eps, -eps), batch)
        return [np.float32((a - b) / (2 * eps)) for a, b in pairs], float(np.mean(pairs))
    base = oracle.loss(x, batch)
    ahead = oracle.losses(x, directions, (eps,), batch)
    return [np.float32((a - base) / eps) for (a,) in ahead], base


def at_one_point(
    batches: Iterable[Batch],
    derivatives: Callable[[Batch], tuple[Sequence[float] | Sequence[np.float32], float]],
) -> tuple[Flat, float]:
    """The mean of several batches' derivatives, in fp64 and rounded once, and their mean loss.

    Args:
        batches: each counts the same.
        derivatives: of a batch along the same directions every time, and its loss.
    """
    found = [derivatives(batch) for batch in batches]
    mean = sum(np.array(g, np.float64) for g, _ in found) / len(found)
    return np.asarray(mean, np.float32), float(np.mean([loss for _, loss in found]))


@dataclass(frozen=True, slots=True)
class Walk:
    """What a local run found: where it ended, its scalars step by step, its mean loss."""

    w: Vector
    scalars: Flat
    loss: float

    def payload(self, client: int) -> Scalars:
        """As it is sent."""
        return Scalars((Run(client, len(self.scalars)),), self.scalars)


def walk(
    oracle: Oracle,
    x: Flat,
    batches: Iterable[Batch],
    directions: Callable[[int], Sequence[Direction]],
    rate: float,
    eps: float,
    scheme: Scheme = "central",
    *,
    skip_above: float = 0.0,
    to_the_end: bool = False,
) -> Walk:
    """Take one step per batch: estimate along the step's directions, then move along each.

    Args:
        oracle: of the client.
        x: the shared parameters.
        batches: one for each step.
        directions: of a step, by its number.
        rate: the step size for each single direction.
        eps: distance of the points.
        scheme: see ``differences``.
        skip_above: do not move where a difference of losses is larger; 0 means always move.
        to_the_end: also take the last step, which only who sends ``w`` needs.
    """
    w = oracle.start(x)
    scalars: list[np.float32] = []
    losses = []
    owed: list[tuple[Direction, float]] = []
    for step, batch in enumerate(batches):
        for z, alpha in owed:
            oracle.add_(w, alpha, z)
        along = directions(step)
        g, loss = differences(oracle, w, along, eps, batch, scheme)
        if skip_above:
            reach = eps * (2 if scheme == "central" else 1)
            g = [np.float32(0) if abs(d) * reach > skip_above else d for d in g]
        owed = list(zip(along, alphas(rate, np.array(g)).tolist(), strict=True))
        scalars += g
        losses.append(loss)
    if to_the_end:
        for z, alpha in owed:
            oracle.add_(w, alpha, z)
    return Walk(w, np.array(scalars, np.float32), float(np.mean(losses)))


def wants_scalars(assignment: Assignment, payload: Payload, count: int) -> str | None:
    """Why the payload is not one run of ``count`` scalars (0: any number), or None."""
    if not isinstance(payload, Scalars) or len(payload.runs) != 1:
        return "want one run of scalars"
    run = payload.runs[0]
    if run != Run(assignment.client, run.count):
        return "a run of another client, scale or weight, or with picks"
    if count and run.count != count:
        return f"another size: {run.count} scalars, want {count}"
    return None
