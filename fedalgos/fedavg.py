"""FedAvg and its server optimisers: FedAvgM, FedAdam, FedYogi.

McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1; Reddi et al., ICLR 2021,
arXiv:2003.00295, Algorithm 2, with the client's change as the pseudo-gradient.  Clients
send their dense fp32 parameters; the step is the new parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedalgos.method import (
    Batch,
    Contribution,
    Method,
    Oracle,
    Settings,
    Work,
    everything,
    mean_of,
)
from fedalgos.optim import Local, Moments, Server, Sgd, local_steps, server_step
from fedalgos.space import ParamSpace
from protocol.payload import Dense, Flat, Payload


class FedAvg(Settings, frozen=True, kw_only=True, tag="fedavg"):
    """Settings of FedAvg; ``server`` plain SGD with lr 1 is averaging."""

    local: Local = Sgd(lr=0.1)
    server: Server = Sgd(lr=1.0)


def fedavg(o: FedAvg, space: ParamSpace) -> Method[Moments]:
    """Build FedAvg over a parameter space."""

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
