"""Personalised learning rates: FedMeZO, arXiv:2402.05926, Proposition 3.7 and section 5.4.

eta_i = eta_0 (1 + spread Phi_i) with Phi_i = (q_i - mean q) / max_j |q_j - mean q| over
the cohort, q_i a client's signal: larger than average, larger steps.  A tie, a client
without a signal yet and a cohort of one all give Phi = 0, where the published code,
fixed to three clients and 500 rounds, divides zero by zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedalgos.space import ParamSpace
from protocol import noise
from protocol.payload import Flat

Signal = Literal["frozen", "random", "round-wise", "five-round", "model-diff"]
MEMORY = 5  # rounds


@dataclass(frozen=True)
class Rates:
    """What the server remembers of each client, by number.

    Attributes:
        losses: its mean training losses in the last five rounds it took part in.
        diffs: how far its update was from the mean one, in its last round.
    """

    losses: dict[int, tuple[float, ...]] = field(default_factory=dict)
    diffs: dict[int, float] = field(default_factory=dict)


def phi(s: Rates, signal: Signal, seed: int, round: int, cohort: Sequence[int]) -> dict[int, float]:
    """Phi in [-1, 1] of every client of the cohort."""
    if signal == "random":
        keys = {c: noise.key("rate", seed, round, c) for c in cohort}
        return {c: float(noise.uniforms(k, 0, 1)[0]) for c, k in keys.items()}
    q = {c: value for c in cohort if (value := _signal(s, signal, c)) is not None}
    mean = sum(q.values()) / len(q) if q else 0.0
    is_tied = len(set(q.values())) < 2  # the mean of equals may be off by an ulp
    widest = 0.0 if is_tied else max(abs(value - mean) for value in q.values())
    return {c: (q[c] - mean) / widest if c in q and widest > 0 else 0.0 for c in cohort}


def _signal(s: Rates, signal: Signal, client: int) -> float | None:
    losses = s.losses.get(client, ())
    match signal:
        case "round-wise":
            return losses[-1] if losses else None
        case "five-round":
            return sum(losses) / MEMORY if len(losses) == MEMORY else None
        case "model-diff":
            return s.diffs.get(client)
        case _:
            return None


def remember(s: Rates, losses: Mapping[int, float], diffs: Mapping[int, float]) -> Rates:
    """The state after a round in which these clients took part."""
    kept = {c: (*s.losses.get(c, ()), loss)[-MEMORY:] for c, loss in losses.items()}
    return Rates({**s.losses, **kept}, {**s.diffs, **diffs})


def distance(space: ParamSpace, w: Flat, mean: Flat) -> float:
    """Sum over the tensors of the Euclidean norms of w - mean."""
    cuts = zip(space.offsets, space.offsets[1:], strict=False)
    return float(sum(np.linalg.norm(w[i:j].astype(np.float64) - mean[i:j]) for i, j in cuts))
