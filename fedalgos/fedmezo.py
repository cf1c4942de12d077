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


def fedmezo(o: FedMezo, space: ParamSpace, seed: int) -> Method[Rates]:
    """Build FedMeZO over a parameter space; ``seed`` is the run's."""

    def key(round: int, client: int, step: int) -> int:
        return noise.key("direction", seed, round, client, step, 0)

    def plan(s: Rates, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
        if o.signal == "frozen":
            return tuple(Assignment(client) for client in cohort)
        phi = rates.phi(s, o.signal, seed, round, cohort)
        return tuple(Assignment(c, lr=o.lr * (1 + o.spread * phi[c])) for c in cohort)

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        client, is_dense = work.assignment.client, o.wire == "weights"

        def directions(h: int) -> tuple[Direction]:
            return (Direction(key(work.round, client, h), space.ranges()),)

        eta = _rate(o, work.assignment)
        end = walk(oracle, x, batches, directions, eta, o.eps, to_the_end=is_dense)
        if is_dense:
            return Dense(oracle.numpy(end.w).copy()), end.loss
        return end.payload(client), end.loss

    def accepts(assignment: Assignment, payload: Payload) -> str | None:
        if o.wire == "weights":
            return wants_dense(space, (), payload)
        return wants_scalars(assignment, payload, o.steps)

    def aggregate(
        s: Rates, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[Rates, Payload]:
        if o.wire == "weights":
            return _mean(s, o, space, contributions)
        got = list(contributions)  # a few scalars each
        sent = _sent(o, got)
        diffs = distances(x, paths(round, sent), got) if o.signal == "model-diff" else {}
        return rates.remember(s, {c.assignment.client: c.loss for c in got}, diffs), sent

    def distances(x: Flat, walks: Sequence[Path], got: Sequence[Contribution]) -> dict[int, float]:
        """Of each client's own end from where all of them together lead."""
        new = replay(x, walks)
        return {
            c.assignment.client: rates.distance(space, replay(x, (path,)), new)
            for c, path in zip(got, walks, strict=True)
        }

    def paths(round: int, step: Scalars) -> list[Path]:
        out, at = [], 0
        for run in step.runs:
            keys = [key(round, run.client, h) for h in range(run.count)]
            g = step.values[at : at + run.count]
            out.append(Path(keys, alphas(run.scale, g), run.weight))
            at += run.count
        return out

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        if isinstance(step, Dense):
            return step.values.copy()
        assert isinstance(step, Scalars)
        return replay(x, paths(round, step))

    return Method(
        init=lambda x: (Rates(), None),
        plan=plan,
        local=local,
        accepts=accepts,
        aggregate=aggregate,
        apply=apply,
        onto="nothing" if o.wire == "weights" else "previous",
        origin=lambda x, assignment: x if o.wire == "weights" else None,
    )


def _rate(o: FedMezo, assignment: Assignment) -> float:
    return o.lr if assignment.lr is None else assignment.lr


def _mean(
    s: Rates, o: FedMezo, space: ParamSpace, contributions: Iterable[Contribution]
) -> tuple[Rates, Payload]:
    """The clients' weights, averaged; all of them at once only where they are compared."""
    losses: dict[int, float] = {}
    noted = _noting(contributions, losses)
    if o.signal != "model-diff":
        step = Dense(mean_of(noted, space.size).astype(np.float32))
        return rates.remember(s, losses, {}), step
    got = list(noted)
    new = mean_of(got, space.size).astype(np.float32)
    diffs = {c.assignment.client: rates.distance(space, c.payload.values, new) for c in got}
    return rates.remember(s, losses, diffs), Dense(new)


def _sent(o: FedMezo, got: Sequence[Contribution]) -> Scalars:
    """All clients' scalars; rate and weight travel with the round."""
    runs = (
        Run(c.assignment.client, len(c.payload.values), _rate(o, c.assignment), c.examples)
        for c in got
    )
    return Scalars(tuple(runs), np.concatenate([c.payload.values for c in got]))


def _noting(
    contributions: Iterable[Contribution], losses: dict[int, float]
) -> Iterable[Contribution]:
    """The same, one at a time, with their losses kept."""
    for c in contributions:
        losses[c.assignment.client] = c.loss
        yield c
