"""BAFFLE: a gradient from K Monte-Carlo loss differences, scalars up.

Feng et al., "Does federated learning really need backpropagation?", arXiv:2301.12195.
With sigma for the deviation of the perturbations, a client estimates its gradient at the
shared parameters by Stein's identity along K directions that all clients share,

    g_k = (f(x + sigma z_k) - f(x - sigma z_k)) / (2 sigma)

(central; forward: (f(x + sigma z_k) - f(x)) / sigma), f being its loss over all its
batches of the round.  The server averages the scalars by examples, and everyone takes
x <- x - (eta / K) sum_k g_k z_k.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedalgos.method import (
    Batch,
    Contribution,
    Count,
    Method,
    Oracle,
    Positive,
    Settings,
    Work,
    everything,
)
from fedalgos.replay import Path, alphas, replay
from fedalgos.space import ParamSpace
from fedalgos.zeroth import COMMON, Scheme, at_one_point, differences, wants_scalars
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Flat, Payload, Run, Scalars


class Baffle(Settings, frozen=True, kw_only=True, tag="baffle"):
    """Settings of BAFFLE: ``perturbations`` is the paper's K, ``eps`` its sigma."""

    lr: Positive = 1e-4
    eps: Positive = 1e-3
    perturbations: Count = 20
    scheme: Scheme = "central"


def baffle(o: Baffle, space: ParamSpace, seed: int) -> Method[None]:
    """Build BAFFLE over a parameter space; ``seed`` is the run's."""

    def key(round: int, k: int) -> int:
        return noise.key("direction", seed, round, COMMON, 0, k)

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        w = oracle.start(x)
        z = [Direction(key(work.round, k), space.ranges()) for k in range(o.perturbations)]
        g, loss = at_one_point(
            batches, lambda batch: differences(oracle, w, z, o.eps, batch, o.scheme)
        )
        return Scalars((Run(work.assignment.client, o.perturbations),), g), loss

    def aggregate(
        s: None, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[None, Payload]:
        del x, round
        got = list(contributions)  # K scalars each
        mean = np.average(
            [c.payload.values.astype(np.float64) for c in got],
            axis=0,
            weights=[c.examples for c in got],
        )
        run = Run(0, o.perturbations, o.lr / o.perturbations)
        return s, Scalars((run,), mean.astype(np.float32))

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        assert isinstance(step, Scalars)
        keys = [key(round, k) for k in range(len(step.values))]
        return replay(x, (Path(keys, alphas(step.runs[0].scale, step.values)),))

    return Method(
        init=lambda x: (None, None),
        plan=everything,
        local=local,
        accepts=lambda assignment, payload: wants_scalars(assignment, payload, o.perturbations),
        aggregate=aggregate,
        apply=apply,
        onto="previous",
    )
