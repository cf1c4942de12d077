"""FedMeZO: local zeroth-order steps with shared seeds.

Ling et al., KDD 2024, arXiv:2402.05926, with the two-point estimator of MeZO (Malladi
et al., NeurIPS 2023, arXiv:2305.17333, Algorithm 1).  Client i takes H local steps

    g_h = (f(x + eps z_h) - f(x - eps z_h)) / (2 eps),   x <- x - eta_i g_h z_h

and the server averages the results by examples.  As the z_h are known to everyone, the H
scalars say all, and replaying them gives the very bits that the dense weights would have
(``wire = "weights"``, the published form).  The learning rate of a client follows its
``signal`` (section 5.4): eta_i = eta (1 + spread Phi_i), see ``fedalgos.rates``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np

from fedalgos import rates
from fedalgos.fedavg import wants_dense
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Fraction,
    Method,
    Oracle,
    Positive,
    Settings,
    Work,
    mean_of,
)
from fedalgos.rates import Rates, Signal
from fedalgos.replay import Path, alphas, replay
from fedalgos.robust import Common
from fedalgos.space import ParamSpace
from fedalgos.zeroth import OWN_DIRECTIONS, walk, wants_scalars
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Dense, Flat, Payload, Run, Scalars


class FedMezo(Settings, frozen=True, kw_only=True, tag="fedmezo"):
    """Settings of FedMeZO; ``steps`` is the paper's H, ``spread`` its alpha over eta_0."""

    lr: Positive = 1e-4  # eta_0
    eps: Positive = 1e-3
    wire: Literal["scalars", "weights"] = "scalars"
    signal: Signal = "frozen"
    spread: Fraction = 0.5

    @property
    def common(self) -> Common:
        return Common() if self.wire == "weights" else OWN_DIRECTIONS


@dataclass(frozen=True)
class Setup:
    """What the coordinator and every node know alike: settings, space, and seed of the run."""

    o: FedMezo
    space: ParamSpace
    seed: int

    def direction(self, round: int, client: int, step: int) -> int:
        """The key of z_h, with ``step`` h."""
        return noise.key("direction", self.seed, round, client, step, 0)

    def rate(self, assignment: Assignment) -> float:
        """A client's eta_i."""
        return self.o.lr if assignment.lr is None else assignment.lr

    def distance(self, w: Flat, mean: Flat) -> float:
        """By tensor, of a client's own end from the mean one."""
        return rates.distance(self.space, w, mean)


def fedmezo(o: FedMezo, space: ParamSpace, seed: int) -> Method[Rates]:
    """Build FedMeZO over a parameter space; ``seed`` is the run's."""
    known, is_dense = Setup(o, space, seed), o.wire == "weights"
    return Method(
        init=lambda x: (Rates(), None),
        plan=partial(plan, known),
        local=partial(local, known),
        accepts=partial(accepts, known),
        aggregate=partial(average if is_dense else gather, known),
        apply=partial(apply, known),
        onto="nothing" if is_dense else "previous",
        origin=lambda x, assignment: x if is_dense else None,
    )


def plan(f: Setup, s: Rates, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """Every client's rate, by its signal."""
    if f.o.signal == "frozen":
        return tuple(Assignment(client) for client in cohort)
    phi = rates.phi(s, f.o.signal, f.seed, round, cohort)
    return tuple(Assignment(c, lr=f.o.lr * (1 + f.o.spread * phi[c])) for c in cohort)


def local(
    f: Setup, x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
) -> tuple[Payload, float]:
    """The walk; its scalars, or where it ends."""
    client, is_dense = work.assignment.client, f.o.wire == "weights"

    def directions(h: int) -> tuple[Direction]:
        return (Direction(f.direction(work.round, client, h), f.space.ranges()),)

    eta = f.rate(work.assignment)
    end = walk(oracle, x, batches, directions, eta, f.o.eps, to_the_end=is_dense)
    if is_dense:
        return Dense(oracle.numpy(end.w).copy()), end.loss
    return end.payload(client), end.loss


def accepts(f: Setup, assignment: Assignment, payload: Payload) -> str | None:
    """Why a payload is no answer, or None."""
    if f.o.wire == "weights":
        return wants_dense(f.space, (), payload)
    return wants_scalars(assignment, payload, f.o.steps)


def gather(
    f: Setup, s: Rates, x: Flat, round: int, contributions: Iterable[Contribution]
) -> tuple[Rates, Payload]:
    """All clients' scalars; rate and weight travel with them."""
    got = list(contributions)  # a few scalars each
    runs = (
        Run(c.assignment.client, len(c.payload.values), f.rate(c.assignment), c.examples)
        for c in got
    )
    step = Scalars(tuple(runs), np.concatenate([c.payload.values for c in got]))
    diffs: dict[int, float] = {}
    if f.o.signal == "model-diff":
        walks = paths(f, round, step)
        new = replay(x, walks)
        ends = (replay(x, (path,)) for path in walks)
        diffs = {c.assignment.client: f.distance(w, new) for c, w in zip(got, ends, strict=True)}
    return rates.remember(s, {c.assignment.client: c.loss for c in got}, diffs), step


def average(
    f: Setup, s: Rates, x: Flat, round: int, contributions: Iterable[Contribution]
) -> tuple[Rates, Payload]:
    """The clients' weights, averaged; all of them at once only where they are compared."""
    del x, round
    losses: dict[int, float] = {}
    noted = _noting(contributions, losses)
    if f.o.signal != "model-diff":
        step = Dense(mean_of(noted, f.space.size).astype(np.float32))
        return rates.remember(s, losses, {}), step
    got = list(noted)
    new = mean_of(got, f.space.size).astype(np.float32)
    diffs = {c.assignment.client: f.distance(c.payload.values, new) for c in got}
    return rates.remember(s, losses, diffs), Dense(new)


def apply(f: Setup, x: Flat, round: int, step: Payload) -> Flat:
    """Where the clients' walks lead on average."""
    if isinstance(step, Dense):
        return step.values.copy()
    assert isinstance(step, Scalars)
    return replay(x, paths(f, round, step))


def paths(f: Setup, round: int, step: Scalars) -> list[Path]:
    """The clients' walks."""
    starts = accumulate((run.count for run in step.runs), initial=0)
    found = []
    for run, at in zip(step.runs, starts, strict=False):
        keys = [f.direction(round, run.client, h) for h in range(run.count)]
        g = step.values[at : at + run.count]
        found.append(Path(keys, alphas(run.scale, g), run.weight))
    return found


def _noting(
    contributions: Iterable[Contribution], losses: dict[int, float]
) -> Iterable[Contribution]:
    """The same, one at a time, with their losses kept."""
    for c in contributions:
        losses[c.assignment.client] = c.loss
        yield c
        del c  # before the next is read
