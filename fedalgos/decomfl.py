"""DeComFL: scalars both ways, whatever the model's size.

Li et al., ICLR 2025, arXiv:2405.15861.  In round r everyone knows the directions
z_{k,p}, the same for all clients.  A client takes K local steps, each along P directions
on one batch,

    x <- x - (eta / P) sum_p g_{k,p} z_{k,p}

and sends only the g.  The server averages them over the clients and takes the same K
steps with the averages; so does every client, from where it was before its local steps.
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
from fedalgos.zeroth import COMMON, Scheme, walk, wants_scalars
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Flat, Payload, Run, Scalars


class DeComFL(Settings, frozen=True, kw_only=True, tag="decomfl"):
    """Settings of DeComFL: ``steps`` is the paper's K, ``perturbations`` its P, eps its mu."""

    lr: Positive = 1e-4
    eps: Positive = 1e-3
    perturbations: Count = 1
    scheme: Scheme = "central"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("decomfl needs steps >= 1, the same for all clients")


def decomfl(o: DeComFL, space: ParamSpace, seed: int) -> Method[None]:
    """Build DeComFL over a parameter space; ``seed`` is the run's."""
    per_direction = o.lr / o.perturbations  # eta / P, on every path

    def key(round: int, step: int, p: int) -> int:
        return noise.key("direction", seed, round, COMMON, step, p)

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        def directions(k: int) -> list[Direction]:
            keys = [key(work.round, k, p) for p in range(o.perturbations)]
            return [Direction(one, space.ranges()) for one in keys]

        end = walk(oracle, x, batches, directions, per_direction, o.eps, o.scheme)
        return end.payload(work.assignment.client), end.loss

    def aggregate(
        s: None, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[None, Payload]:
        del x, round
        got = [c.payload.values.astype(np.float64) for c in contributions]  # a few scalars each
        mean = np.asarray(sum(got) / len(got), np.float32)
        run = Run(0, len(mean), per_direction)  # for all clients; the rate travels with it
        return s, Scalars((run,), mean)

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        assert isinstance(step, Scalars)
        keys = [key(round, *divmod(j, o.perturbations)) for j in range(len(step.values))]
        return replay(x, (Path(keys, alphas(step.runs[0].scale, step.values)),))

    return Method(
        init=lambda x: (None, None),
        plan=everything,
        local=local,
        accepts=lambda a, payload: wants_scalars(a, payload, o.steps * o.perturbations),
        aggregate=aggregate,
        apply=apply,
        onto="previous",
    )
