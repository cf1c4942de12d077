"""FedAvg and its server optimisers: FedAvgM, FedAdam, FedYogi; and their split variants.

McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1; Reddi et al., ICLR 2021,
arXiv:2003.00295, Algorithm 2, with the client's change as the pseudo-gradient.  Clients
send their dense fp32 parameters; the step is the new parameters themselves.  With
``split`` a client trains and sends its units alone: FedAvgSplit, FedYogiSplit, the
baselines of Spry (arXiv:2405.15551) that keep backpropagation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fedalgos import split
from fedalgos.method import (
    Batch,
    Contribution,
    Method,
    Oracle,
    Settings,
    Vector,
    Work,
    everything,
    mean_of,
)
from fedalgos.optim import Local, Moments, Server, Sgd, local_steps, server_gain, server_step
from fedalgos.space import ParamSpace
from fedalgos.split import Assign, Deal, Head, State
from protocol.payload import Dense, Flat, Payload


class FedAvg(Settings, frozen=True, kw_only=True, tag="fedavg"):
    """Settings of FedAvg; ``server`` plain SGD with lr 1 is averaging."""

    local: Local = Sgd(lr=0.1)
    server: Server = Sgd(lr=1.0)
    split: bool = False
    assign: Assign = "cyclic"
    head: Head = "one"

    def __post_init__(self) -> None:
        if not self.split and (self.assign, self.head) != ("cyclic", "one"):
            raise ValueError("assign and head are about split units: they need split = true")


def fedavg(o: FedAvg, space: ParamSpace) -> Method[Any]:
    """Build FedAvg over a parameter space.

    Raises:
        ExperimentError: a policy for the head where none can be told.
    """
    if o.split:
        return _of_units(o, space, split.split(space, o.assign, o.head))
    return _of_everything(o, space)


def _of_everything(o: FedAvg, space: ParamSpace) -> Method[Moments]:
    def init(x: Flat) -> tuple[Moments, None]:
        del x
        return Moments(), None

    def aggregate(
        s: Moments, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[Moments, Payload]:
        del round
        delta = (mean_of(contributions, space.size) - x).astype(
            np.float32
        )  # Delta = sum_k n_k/n w_k - w
        s, new = server_step(o.server, s, x, delta)
        return s, Dense(new.astype(np.float32))

    return Method(
        init=init,
        plan=everything,
        local=lambda x, oracle, batches, work: train_dense(o.local, x, oracle, batches, work),
        accepts=lambda _, payload: wants_dense(space, (), payload),
        aggregate=aggregate,
        apply=lambda x, round, step: step.values.copy(),
        onto="nothing",
        metrics=lambda s: server_gain(o.server, [s]),
    )


def _of_units(o: FedAvg, space: ParamSpace, deal: Deal) -> Method[State]:
    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        units = work.assignment.units
        ranges = space.ranges(units)

        def gradient(w: Vector, step: int, batch: Batch) -> tuple[float, Vector]:
            del step
            return oracle.grad(w, batch, ranges)

        return split.train_units(o.local, space, x, oracle, batches, units, gradient)

    def aggregate(
        s: State, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[State, Payload]:
        del round
        return split.server_steps(o.server, space, s, x, split.means_of(space, contributions))

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        del round
        assert isinstance(step, Dense)
        return space.put(x, step.values, step.units)

    return Method(
        init=lambda x: (State({}), None),
        plan=lambda s, round, cohort: split.plan(deal, cohort),
        local=local,
        accepts=lambda assignment, payload: wants_dense(space, assignment.units, payload),
        aggregate=aggregate,
        apply=apply,
        onto="previous",
        metrics=lambda s: server_gain(o.server, s.moments.values()),
    )


def train_dense(
    optimiser: Local, x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
) -> tuple[Dense, float]:
    """Backpropagation and a local optimiser; the parameters after the last step."""
    del work
    w, losses = oracle.start(x), []
    step_ = local_steps(optimiser, [w])
    for batch in batches:
        loss, g = oracle.grad(w, batch)
        losses.append(loss)
        step_([g])
    return Dense(oracle.numpy(w).copy()), float(np.mean(losses))


def wants_dense(space: ParamSpace, units: tuple[int, ...], payload: Payload) -> str | None:
    """Why the payload is not a dense vector of these units, or None."""
    if not isinstance(payload, Dense) or payload.units != units:
        return "want a dense payload of the assigned units"
    if len(payload.values) != space.count(units):
        return f"another size: {len(payload.values)} values, want {space.count(units)}"
    return None
