"""FedAvg whose nodes average among themselves: what a dense collective costs.

McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1, whose mean is made by a ring
all-reduce (Patarasuk and Yuan, JPDC 69(2), 2009) in place of a server.  A node adds up what
its own clients have changed, in fp64, and the nodes add up these parts, in fp32, in the order
of the ring.  So the result is FedAvg's but for rounding.

A client's update stays on its node.  The coordinator hears its norm, which is enough to
refuse one beyond belief.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from msgspec import Meta

from fedalgos import robust, split
from fedalgos.fedavg import wants_dense
from fedalgos.method import (
    Assignment,
    Batch,
    Collective,
    Contribution,
    Method,
    Oracle,
    Settings,
    Vector,
    Work,
    everything,
    mean_of,
)
from fedalgos.optim import Local, Sgd
from fedalgos.robust import Common
from fedalgos.space import ParamSpace
from protocol.payload import Dense, Flat, Payload, Run, Scalars


class FedAvgAllreduce(Settings, frozen=True, kw_only=True, tag="fedavg-allreduce"):
    """Settings of FedAvg over an all-reduce.

    Attributes:
        plaintext: nodes may send each other what is not encrypted, also where they have keys.
        timeout_seconds: for how long a node waits for the next bytes of another.
    """

    local: Local = Sgd(lr=0.1)
    plaintext: bool = False
    timeout_seconds: Annotated[float, Meta(ge=1, le=1e6)] = 60.0

    @property
    def common(self) -> Common:
        return Common("nothing", "updates stay on their nodes, where nobody can compare them")

    @property
    def late_fault(self) -> str | None:
        return "its updates stay on their nodes, and go with their round"


def fedavg_allreduce(o: FedAvgAllreduce, space: ParamSpace) -> Method[None]:
    """Build it over a parameter space."""

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        del work

        def gradient(w: Vector, step: int, batch: Batch) -> tuple[float, Vector]:
            del step
            return oracle.grad(w, batch)

        trained, loss = split.train_units(o.local, space, x, oracle, batches, (), gradient)
        return Dense(trained.values - x), loss

    def aggregate(
        s: None, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[None, Payload]:
        del round
        return s, moved(x, mean_of(contributions, space.size).astype(np.float32))

    def share(contributions: Iterable[Contribution], examples: int) -> Flat:
        mine = tuple(contributions)
        part = mean_of(mine, space.size)
        part *= sum(c.examples for c in mine) / examples
        return part.astype(np.float32)

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        del x, round
        assert isinstance(step, Dense)
        return step.values.copy()

    return Method(
        init=lambda x: (None, None),
        plan=everything,
        local=local,
        accepts=lambda assignment, payload: wants_dense(space, assignment.units, payload),
        aggregate=aggregate,
        apply=apply,
        onto="nothing",
        collective=Collective(announce, accepts, share, moved, o.timeout_seconds),
    )


def moved(x: Flat, mean: Flat) -> Dense:
    """The new parameters: x + mean, in fp32."""
    return Dense(x + mean)


def announce(update: Payload) -> Payload:
    """The norm of a change, as one scalar."""
    return Scalars((Run(0, 1),), np.array([robust.norm(update.values, None)], np.float32))


def accepts(assignment: Assignment, payload: Payload) -> str | None:
    """Why a payload is not the norm of a change, or None."""
    del assignment
    if not isinstance(payload, Scalars) or len(payload.values) != 1:
        return "want the norm of a change"
    return None if payload.values[0] >= 0 else f"a norm of {payload.values[0]:.3g}"
