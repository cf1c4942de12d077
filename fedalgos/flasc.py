"""FLASC: top-k of the weights down, dense local training, top-k of the change up.

Kuo et al., arXiv:2406.05233 (FLoSS in Raje's thesis, CMU-CS-24-123).  The server keeps
the dense weights W.  Clients start from M.W, where M marks the largest |W|, train every
coordinate, and send the largest entries of D = M.W - w, chosen independently of M.  The
server steps W along the plain mean of the D, so what M left out stays in W as residual.
The model that is shared, evaluated and exported is M.W; a step is M.W itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from fedalgos.fedavg import train_dense
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Method,
    Oracle,
    Settings,
    Work,
    everything,
)
from fedalgos.optim import Adam, Local, Moments, Server, Sgd, server_step
from fedalgos.space import ParamSpace
from protocol.payload import Flat, Payload, Sparse

Density = Annotated[float, Meta(gt=0, le=1)]


class Flasc(Settings, frozen=True, kw_only=True, tag="flasc"):
    """Settings of FLASC; densities are shares of all trained coordinates."""

    density_down: Density = 0.25
    density_up: Density = 0.25
    local: Local = Sgd(lr=1e-3, momentum=0.9)
    server: Server = Adam(lr=1e-3)


@dataclass(frozen=True)
class State:
    """W: the dense weights, of which clients see M.W; moments: the server optimiser's."""

    weights: Flat
    moments: Moments


def top_k(x: Flat, k: int) -> npt.NDArray[np.int64]:
    """Places of the k largest |x|, increasing; of equals the lower index, on any machine."""
    order = np.argsort(-np.abs(x), kind="stable")
    return np.sort(order[:k])


def sparsify(x: Flat, k: int) -> Sparse:
    """The k largest |x| and their places."""
    places = top_k(x, k)
    return Sparse(len(x), places, x[places])


def flasc(o: Flasc, space: ParamSpace) -> Method[State]:
    """Build FLASC over a parameter space."""
    # round, not int: int(0.29 * 100) is 28
    k_down, k_up = (max(1, round(d * space.size)) for d in (o.density_down, o.density_up))

    def init(x: Flat) -> tuple[State, Payload]:
        return State(x, Moments()), sparsify(x, k_down)

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        trained, loss = train_dense(o.local, x, oracle, batches, work)
        return sparsify(x - trained.values, k_up), loss  # D = M.W - w

    def accepts(assignment: Assignment, payload: Payload) -> str | None:
        del assignment
        if not isinstance(payload, Sparse) or payload.size != space.size:
            return f"want a sparse payload of size {space.size}"
        if len(payload.places) != k_up:
            return f"another size: {len(payload.places)} entries, want {k_up}"
        return None

    def aggregate(
        s: State, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[State, Payload]:
        del x, round
        total, n = np.zeros(space.size), 0
        for c in contributions:
            assert isinstance(c.payload, Sparse)
            total[c.payload.places] += c.payload.values
            n += 1
        if not n:
            raise ValueError("aggregate of no updates")
        delta = (-total / n).astype(np.float32)  # unweighted, as published
        moments, new = server_step(o.server, s.moments, s.weights, delta)
        weights = new.astype(np.float32)
        return State(weights, moments), sparsify(weights, k_down)

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        del x, round
        assert isinstance(step, Sparse)
        return step.dense()

    return Method(
        init=init,
        plan=everything,
        local=local,
        accepts=accepts,
        aggregate=aggregate,
        apply=apply,
        onto="nothing",
    )
