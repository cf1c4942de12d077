"""FedMeZO: local zeroth-order steps with shared seeds.

Ling et al., KDD 2024, arXiv:2402.05926, with the two-point estimator of MeZO (Malladi
et al., NeurIPS 2023, arXiv:2305.17333, Algorithm 1).  Client i takes H local steps

    g_h = (f(x + eps z_h) - f(x - eps z_h)) / (2 eps),   x <- x - eta g_h z_h

and the server averages the results by examples.  As the z_h are known to everyone,
the H scalars say all: theta - sum_i w_i sum_h eta g_ih z_ih.  ``wire = "weights"`` sends
the parameters as the paper does, along the same trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from fedalgos.fedavg import wants_dense
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Method,
    Oracle,
    Positive,
    Settings,
    Work,
    everything,
    mean_of,
)
from fedalgos.space import ParamSpace
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Dense, Flat, Payload, Run, Scalars


class FedMezo(Settings, frozen=True, kw_only=True, tag="fedmezo"):
    """Settings of FedMeZO; ``steps`` is the paper's H."""

    lr: Positive = 1e-4  # eta
    eps: Positive = 1e-3
    wire: Literal["scalars", "weights"] = "scalars"


def fedmezo(o: FedMezo, space: ParamSpace, seed: int) -> Method[None]:
    """Build FedMeZO over a parameter space; ``seed`` is the run's."""

    def direction(round: int, client: int, step: int) -> Direction:
        return Direction(noise.key("direction", seed, round, client, step, 0), space.ranges())

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        client, w = work.assignment.client, oracle.array(x)
        scalars, losses = [], []
        for h, batch in enumerate(batches):
            z = direction(work.round, client, h)
            plus, minus = oracle.losses(w, z, o.eps, batch)
            g = np.float32((plus - minus) / (2 * o.eps))
            oracle.add_(w, -o.lr * float(g), z)
            scalars.append(g)
            losses.append((plus + minus) / 2)
        if o.wire == "weights":
            return Dense(oracle.numpy(w)), float(np.mean(losses))
        runs = (Run(client, len(scalars)),)
        return Scalars(runs, np.array(scalars, np.float32)), float(np.mean(losses))

    def accepts(assignment: Assignment, payload: Payload) -> str | None:
        if o.wire == "weights":
            return wants_dense(space, (), payload)
        if not isinstance(payload, Scalars) or len(payload.runs) != 1:
            return "want one run of scalars"
        run = payload.runs[0]
        if run.client != assignment.client or run.scale != 1.0:
            return "a run of another client or scale"
        if o.steps and run.count != o.steps:
            return f"another size: {run.count} scalars, want {o.steps}"
        return None

    def aggregate(
        s: None, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[None, Payload]:
        del round
        if o.wire == "weights":
            return s, Dense(mean_of(contributions, space.size).astype(np.float32))
        got = list(contributions)  # a few scalars each: held whole
        total = sum(c.examples for c in got)
        runs = tuple(  # the learning rate travels with the round: scale = eta w_i
            Run(c.assignment.client, len(c.payload.values), o.lr * c.examples / total) for c in got
        )
        return s, Scalars(runs, np.concatenate([c.payload.values for c in got]))

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        if isinstance(step, Dense):
            return step.values.copy()
        assert isinstance(step, Scalars)
        new, values = x.copy(), iter(step.values)
        for run in step.runs:
            for h in range(run.count):
                alpha = -np.float32(run.scale) * next(values)  # fp32 product, in wire order
                noise.add_(new, float(alpha), direction(round, run.client, h))
        return new

    return Method(
        init=lambda x: (None, None),
        plan=everything,
        local=local,
        accepts=accepts,
        aggregate=aggregate,
        apply=apply,
        absolute=o.wire == "weights",
    )
