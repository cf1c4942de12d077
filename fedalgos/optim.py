"""Optimisers of both sides: local ones in place, server ones as pure functions.

Plain arithmetic only, so that the same lines run on numpy arrays and torch tensors.
Each is a struct of its constants, which is also its table in the experiment file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from msgspec import Struct

from fedalgos.method import Fraction, NonNegative, Positive, Vector

# --- local -----------------------------------------------------------------------


class Optimiser(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all optimisers' settings."""


class Sgd(Optimiser, frozen=True, kw_only=True, tag="sgd"):
    """x -= lr u with u = momentum u + g (torch.optim.SGD)."""

    lr: Positive
    momentum: Fraction = 0.0


class AdamW(Optimiser, frozen=True, kw_only=True, tag="adamw"):
    """Adam with bias correction and decoupled weight decay (torch.optim.AdamW)."""

    lr: Positive
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0


Local = Sgd | AdamW
LocalStep = Callable[[Sequence[Vector]], None]  # takes the gradients, updates the parameters


def local_steps(optimiser: Local, parameters: Sequence[Vector]) -> LocalStep:
    """A fresh local optimiser over ``parameters``, which its steps update in place."""
    if isinstance(optimiser, Sgd):
        return _local_sgd(optimiser, parameters)
    return _local_adamw(optimiser, parameters)


def _local_sgd(o: Sgd, parameters: Sequence[Vector]) -> LocalStep:
    velocity: list[Vector] = [x * 0 for x in parameters] if o.momentum else []

    def step_(gradients: Sequence[Vector]) -> None:
        for i, (x, g) in enumerate(zip(parameters, gradients, strict=True)):
            if o.momentum:
                velocity[i] = o.momentum * velocity[i] + g
                x -= o.lr * velocity[i]
            else:
                x -= o.lr * g

    return step_


def _local_adamw(o: AdamW, parameters: Sequence[Vector]) -> LocalStep:
    m: list[Vector] = [x * 0 for x in parameters]
    v: list[Vector] = [x * 0 for x in parameters]
    steps = 0

    def step_(gradients: Sequence[Vector]) -> None:
        nonlocal steps
        steps += 1
        for i, (x, g) in enumerate(zip(parameters, gradients, strict=True)):
            m[i] = o.beta1 * m[i] + (1 - o.beta1) * g
            v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g
            m_hat = m[i] / (1 - o.beta1**steps)
            v_hat = v[i] / (1 - o.beta2**steps)
            x *= 1 - o.lr * o.weight_decay
            x -= o.lr * m_hat / (v_hat**0.5 + o.eps)

    return step_


# --- server ----------------------------------------------------------------------


class Adam(Optimiser, frozen=True, kw_only=True, tag="adam"):
    """FedAdam without bias correction (arXiv:2003.00295, Algorithm 2; flwr's defaults)."""

    lr: Positive = 1e-2
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3


class Yogi(Adam, frozen=True, kw_only=True, tag="yogi"):
    """FedYogi (arXiv:2003.00295, Algorithm 2; flwr's defaults)."""


Server = Sgd | AdamW | Adam | Yogi
A = TypeVar("A", bound=Any)


@dataclass(frozen=True, slots=True)
class Moments:
    """m, v: first and second moment, or None before the first step; steps: how many."""

    m: Vector | None = None
    v: Vector | None = None
    steps: int = 0

    def part(self, piece: slice) -> Moments:
        """Those of some of the parameters."""
        m, v = (None if a is None else a[piece] for a in (self.m, self.v))
        return replace(self, m=m, v=v)


def server_step(o: Server, s: Moments, x: A, delta: A) -> tuple[Moments, A]:
    """One server step from ``x`` along the pseudo-gradient ``-delta`` = x - mean.

    Returns:
        The next moments and the new parameters.
    """
    s = replace(s, steps=s.steps + 1)
    if isinstance(o, Sgd):
        m = delta if s.m is None else o.momentum * s.m + delta
        return replace(s, m=m if o.momentum else None), x + o.lr * m
    m, v = (delta * 0 if a is None else a for a in (s.m, s.v))
    match o:
        case AdamW():
            m = o.beta1 * m + (1 - o.beta1) * delta
            v = o.beta2 * v + (1 - o.beta2) * delta**2
            m_hat, v_hat = m / (1 - o.beta1**s.steps), v / (1 - o.beta2**s.steps)
            kept = x * (1 - o.lr * o.weight_decay)
            return replace(s, m=m, v=v), kept + o.lr * m_hat / (v_hat**0.5 + o.eps)
        case Adam():
            m = o.beta1 * m + (1 - o.beta1) * delta
            square = delta**2
            if isinstance(o, Yogi):  # v moves by (1 - beta2) delta^2, up or down
                signed = (v > square) * square - (v < square) * square  # delta^2 sign(v - delta^2)
                v = v - (1 - o.beta2) * signed
            else:
                v = o.beta2 * v + (1 - o.beta2) * square
            return replace(s, m=m, v=v), x + o.lr * m / (v**0.5 + o.tau)


def server_gain(o: Server, moments: Iterable[Moments]) -> Mapping[str, float]:
    """How far a steady change of the clients carries: what multiplies it in the end.

    Of SGD lr / (1 - momentum).  Of the others, before their first step nothing is known;
    then lr / (sqrt(v) + tau) differs by coordinate and changes over the rounds, and this is
    its value at the median of v, over every n-th coordinate of the large.
    """
    if isinstance(o, Sgd):
        return {"server_gain": o.lr / (1 - o.momentum)}
    found = [(s.v, s.steps) for s in moments if s.v is not None]
    if not found:
        return {}
    v = np.concatenate([v[:: 1 + len(v) // 65536] for v, _ in found])
    if isinstance(o, AdamW):
        bias = 1 - o.beta2 ** found[0][1]
        return {"server_gain": o.lr / (float(np.median(v) / bias) ** 0.5 + o.eps)}
    return {"server_gain": o.lr / (float(np.median(v)) ** 0.5 + o.tau)}
