"""Spry: forward-mode gradients of a few units per client.

Panchal et al., NeurIPS 2024, arXiv:2405.15551, per-epoch mode.  Each client trains
only its units, from jvp . v with v ~ N(0, I) on those units, and returns their
weights; the server averages each unit over the clients that hold it and takes a
FedYogi step on it.  A unit that nobody returned keeps its value and its moments: a
zero change would still move it through Yogi's momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedalgos.fedavg import wants_dense
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Count,
    Mean,
    Method,
    Oracle,
    Settings,
    Vector,
    Work,
)
from fedalgos.optim import AdamW, Local, Moments, Server, Yogi, local_steps, server_step
from fedalgos.space import ParamSpace
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Dense, Flat, Payload


class Spry(Settings, frozen=True, kw_only=True, tag="spry"):
    """Settings of Spry; the published script's constants are the defaults."""

    perturbations: Count = 1  # K
    local: Local = AdamW(lr=1e-4, weight_decay=0.01)
    server: Server = Yogi()


@dataclass(frozen=True)
class State:
    """Each unit's server moments, by unit number; absent before its first step."""

    moments: dict[int, Moments]


def assign(num_units: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """Cyclic both ways: slot m holds units j with j mod M = m, or unit m mod U if M > U."""
    slots, clients = range(len(cohort)), len(cohort)
    return tuple(
        Assignment(cohort[m], tuple(range(m, num_units, clients)) or (m % num_units,))
        for m in slots
    )


def spry(o: Spry, space: ParamSpace, seed: int) -> Method[State]:
    """Build Spry over a parameter space; ``seed`` is the run's."""

    def plan(s: State, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
        del s, round  # slots follow the cohort's drawn order, so units move between clients
        return assign(len(space.units), cohort)

    def local(
        x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
    ) -> tuple[Payload, float]:
        units, client = work.assignment.units, work.assignment.client
        ranges, w, losses = space.ranges(units), oracle.start(x), []
        step_ = local_steps(o.local, [w[start:stop] for start, stop in ranges])  # views
        for t, batch in enumerate(batches):
            g: Vector = oracle.array(np.zeros(space.size, np.float32))
            keys = [
                noise.key("direction", seed, work.round, client, t, k)
                for k in range(o.perturbations)
            ]
            directions = [Direction(key, ranges) for key in keys]
            loss, slopes = oracle.jvp(w, directions, batch)
            losses.append(loss)
            for v, slope in zip(directions, slopes, strict=True):
                oracle.add_(g, slope / o.perturbations, v)  # g = mean_k jvp_k v_k
            step_([g[start:stop] for start, stop in ranges])
        return Dense(space.take(oracle.numpy(w), units), units), float(np.mean(losses))

    def aggregate(
        s: State, x: Flat, round: int, contributions: Iterable[Contribution]
    ) -> tuple[State, Payload]:
        del round
        means: dict[int, Mean] = {}
        for c in contributions:
            at = 0
            for u in c.assignment.units:
                size = space.count((u,))
                means.setdefault(u, Mean(size)).add(c.examples, c.payload.values[at : at + size])
                at += size
        moments, new = dict(s.moments), []
        for u in sorted(means):  # untouched units are not here
            old = space.take(x, (u,))
            delta = (means[u].value() - old).astype(np.float32)
            moments[u], value = server_step(o.server, moments.get(u, Moments()), old, delta)
            new.append(value.astype(np.float32))
        return State(moments), Dense(np.concatenate(new), tuple(sorted(means)))

    def apply(x: Flat, round: int, step: Payload) -> Flat:
        del round
        assert isinstance(step, Dense)
        return space.put(x, step.values, step.units)

    return Method(
        init=lambda x: (State({}), None),
        plan=plan,
        local=local,
        accepts=lambda assignment, payload: wants_dense(space, assignment.units, payload),
        aggregate=aggregate,
        apply=apply,
        onto="previous",
    )
