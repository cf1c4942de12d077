"""FedKSeed and FedKSeed-Pro: a model that is its start and K accumulated scalars.

Qin et al., ICML 2024, arXiv:2312.06353.  K candidate directions are fixed for the run.
Each local step picks one of them, estimates the derivative along it from two losses and
moves; the server adds eta w_i g to that candidate's accumulator G, and everyone rebuilds

    x = x_0 - sum_j G_j z_j      (fp32, in the candidates' order)

from the frozen start.  A node away for any number of rounds needs the newest G alone.
Pro picks candidates by the size of the derivatives seen so far (equations in ``tilt``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Method,
    NonNegative,
    Oracle,
    Positive,
    Settings,
    Work,
)
from fedalgos.replay import Path, replay
from fedalgos.robust import Common
from fedalgos.space import ParamSpace
from fedalgos.zeroth import OWN_DIRECTIONS, walk, wants_scalars
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Flat, Payload, Run, Scalars, Sparse, spec_of

LARGEST = 1000.0  # Pro clips the derivatives it weighs; the accumulators are not clipped


class FedKSeed(Settings, frozen=True, kw_only=True, tag="fedkseed"):
    """Settings of FedKSeed.

    Attributes:
        candidates: K.
        lr, eps: eta and the distance of the two points.
        pro: pick candidates by what they have shown, not uniformly.
        skip_above: leave a step out where the two losses differ by more; 0: never.
    """

    candidates: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    lr: Positive = 1e-4
    eps: Positive = 5e-4
    pro: bool = False
    skip_above: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.pro and not 1 <= self.steps <= 8192:
            raise ValueError("pro needs steps from 1 to 8192: the coordinator picks for each")

    @property
    def common(self) -> Common:
        return OWN_DIRECTIONS


@dataclass(frozen=True)
class State:
    """Of every candidate: G, and for Pro the sum and number of its clipped |g|.

    The published history of each candidate starts with one zero; so does the count.
    """

    g: Flat
    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


def tilt(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Pro's probabilities: softmax of the mean |g|, scaled to [0, 1]; max / min is at most e."""
    a = sums / counts
    p = np.exp((a - a.min()) / ((a.max() - a.min()) + 1e-10))
    return np.asarray(p / p.sum())


@dataclass(frozen=True)
class Setup:
    """What the coordinator and every node know alike: settings, space, and seed of the run."""

    o: FedKSeed
    space: ParamSpace
    seed: int

    def key(self, candidate: int) -> int:
        """Of a candidate's direction, the same in every round."""
        return noise.key("pool", self.seed, candidate)

    def draws(self, round: int, client: int, count: int) -> npt.NDArray[np.uint64]:
        """32 random bits for each step."""
        lanes = noise.bits(noise.key("pick", self.seed, round, client), 0, 2 * count)
        return lanes[0::2].astype(np.uint64) | lanes[1::2].astype(np.uint64) << np.uint64(16)

    def picked(self, round: int, assignment: Assignment, count: int) -> list[int]:
        """The candidate of each step: Pro's are in the task; else uniform, with replacement.

        The latter are known to both sides, so the indices cost no bytes.
        """
        if self.o.pro:
            return list(assignment.picks[:count])
        scaled = self.draws(round, assignment.client, count) * np.uint64(self.o.candidates)
        found: list[int] = (scaled >> np.uint64(32)).astype(np.int64).tolist()
        return found


def fedkseed(o: FedKSeed, space: ParamSpace, seed: int) -> Method[State]:
    """Build FedKSeed over a parameter space; ``seed`` is the run's."""
    f, k = Setup(o, space, seed), o.candidates
    return Method(
        init=lambda x: (State(np.zeros(k, np.float32), np.zeros(k), np.ones(k, np.int64)), None),
        plan=partial(plan, f),
        local=partial(local, f),
        accepts=lambda assignment, payload: wants_scalars(assignment, payload, o.steps),
        aggregate=partial(aggregate, f),
        apply=partial(apply, f),
        onto="initial",
    )


def plan(f: Setup, s: State, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """Pro picks the candidate of every step; without it there is nothing to say."""
    if not f.o.pro:
        return tuple(Assignment(client) for client in cohort)
    edges = np.cumsum(tilt(s.sums, s.counts))

    def picks(client: int) -> tuple[int, ...]:
        u = (f.draws(round, client, f.o.steps) + 0.5) / 2**32 * edges[-1]
        return tuple(np.searchsorted(edges, u).tolist())

    return tuple(Assignment(client, picks=picks(client)) for client in cohort)


def local(
    f: Setup, x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
) -> tuple[Payload, float]:
    """A walk along one candidate in each step; its derivatives are sent."""

    def directions(step: int) -> tuple[Direction]:
        if step >= len(picks):  # one pass over the data: as many steps as that takes
            picks[:] = f.picked(work.round, work.assignment, 2 * step + 1)
        return (Direction(f.key(picks[step]), f.space.ranges()),)

    picks = f.picked(work.round, work.assignment, f.o.steps)
    end = walk(oracle, x, batches, directions, f.o.lr, f.o.eps, skip_above=f.o.skip_above)
    return end.payload(work.assignment.client), end.loss


def aggregate(
    f: Setup, s: State, x: Flat, round: int, contributions: Iterable[Contribution]
) -> tuple[State, Payload]:
    """G with the clients' derivatives added, each by its share of the examples."""
    del x  # the model is x_0 and G
    got = list(contributions)  # a few scalars each
    total = sum(c.examples for c in got)
    g, sums, counts = s.g.copy(), s.sums.copy(), s.counts.copy()
    for c in got:
        values = c.payload.values
        where = f.picked(round, c.assignment, len(values))
        np.add.at(g, where, np.float32(f.o.lr * c.examples / total) * values)
        np.add.at(sums, where, np.minimum(np.abs(values), LARGEST))
        is_skipped = (values == 0) & bool(f.o.skip_above)  # leaves no trace, as published
        np.add.at(counts, where, ~is_skipped)
    return State(g, sums, counts), _shortest(g)


def apply(f: Setup, x: Flat, round: int, step: Payload) -> Flat:
    """x_0 - sum_j G_j z_j; ``x`` is x_0."""
    del round
    size = step.size if isinstance(step, Sparse) else len(step.values)
    if size != f.o.candidates:  # before memory of that size is taken
        raise ValueError(f"{size} accumulators for {f.o.candidates} candidates")
    g = step.dense() if isinstance(step, Sparse) else step.values
    (touched,) = np.nonzero(g)
    return replay(x, (Path([f.key(j) for j in touched.tolist()], -g[touched]),))


def _shortest(g: Flat) -> Payload:
    """All K accumulators, or the touched ones with their places, whichever is fewer bytes."""
    (touched,) = np.nonzero(g)
    if len(touched) < len(g):
        some = Sparse(len(g), touched, g[touched])
        if spec_of(some).nbytes < 4 * len(g):
            return some
    return Scalars((Run(0, len(g)),), g)
