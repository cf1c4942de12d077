"""Client-level differential privacy: clip each update, add Gaussian noise, count epsilon.

The mechanism of the published FLASC code (arXiv:2406.05233) without its division of the sum
by the clip, which made the server's step size depend on it.  The trust is in the
coordinator: it sees updates as they are, clips them as they arrived, and adds the noise.

The noise comes from a secret of the coordinator, never from the run's seed, which all nodes
know and could subtract.  Its key is a hash of secret, round and the sum itself: a round that
is repeated to the bit gets the same noise, another sum gets independent noise.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from fedalgos.method import NonNegative, Positive
from protocol.payload import Flat

Sampled = tuple[tuple[int, int], ...]  # (clients asked, in how many rounds)
Exact = npt.NDArray[np.float64]
SECRET_BYTES = 32


class Dp(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``dp`` table of a method.

    Attributes:
        clip: C, the largest norm of an update.
        noise_multiplier: sigma; the noise on each coordinate of the sum is N(0, (sigma C)^2).
        delta: of the (epsilon, delta) that is reported.
        clients: how many a cohort is drawn from, for the accountant alone; 0 claims nothing
            from the sampling.
    """

    clip: Positive
    noise_multiplier: NonNegative
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    clients: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


def clipped(values: Flat, clip: float) -> Exact:
    """An update scaled down to the norm ``clip`` if it is longer, in float64."""
    exact = values.astype(np.float64)
    return exact / max(float(np.linalg.norm(exact)) / clip, 1.0)


def noised(o: Dp, secret: bytes, round: int, total: Exact) -> Exact:
    """The sum of clipped updates with noise on every coordinate."""
    if o.noise_multiplier == 0:
        return total
    return total + o.noise_multiplier * o.clip * gaussian(secret, round, total)


def gaussian(secret: bytes, round: int, about: Exact) -> Exact:
    """Independent normals, one for each entry of ``about``, which is part of the key.

    Box-Muller on 53-bit uniforms from SHAKE-256.  They are float64 numbers, so what
    Mironov (CCS 2012) says of the low bits of such noise holds here too.
    """
    key = hashlib.blake2b(b"seedwire dp", key=secret[:64], digest_size=32)
    key.update(round.to_bytes(8, "little"))
    key.update(np.ascontiguousarray(about, "<f8").data.cast("B"))
    pairs = (len(about) + 1) // 2
    raw = np.frombuffer(hashlib.shake_256(key.digest()).digest(16 * pairs), "<u8") >> np.uint64(11)
    u, v = (raw.astype(np.float64) + 0.5).reshape(2, pairs) * 2.0**-53  # (0, 1]
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    both: Exact = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[: len(about)]


# --- the accountant --------------------------------------------------------------


def asked(sampled: Sampled, clients: int) -> Sampled:
    """The count with one more round of so many clients."""
    counts = dict(sampled)
    counts[clients] = counts.get(clients, 0) + 1
    return tuple(sorted(counts.items()))


def has_accountant() -> bool:
    """Whether ``pip install "seedwire[privacy]"`` was done."""
    return importlib.util.find_spec("dp_accounting") is not None


def epsilon(
    noise_multiplier: float, delta: float, sampled: Sequence[tuple[int, int]], clients: int = 0
) -> float:
    """Epsilon at ``delta`` of rounds with cohorts of fixed size, drawn without replacement.

    Two data sets are neighbours if one client's data is replaced by another's, since the
    number of clients is no secret.  A clipped sum then moves by up to 2 C, so that the
    accountant is given half the noise multiplier.  It is Renyi's, with the bound of Wang,
    Balle and Kasiviswanathan (AISTATS 2019, Theorem 27).

    Args:
        noise_multiplier: noise over clip, as in ``Dp``.
        delta: the probability that the bound does not cover.
        sampled: how many clients were asked, and in how many rounds.
        clients: how many they were drawn from, in secret; 0 counts on no sampling, and
            holds for a client that took part in every round.
    """
    if noise_multiplier == 0:
        return math.inf
    accounting: Any = importlib.import_module("dp_accounting")
    rdp: Any = importlib.import_module("dp_accounting.rdp")
    accountant = rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
    for size, rounds in sampled:
        event = accounting.GaussianDpEvent(noise_multiplier / 2)
        if clients > size:
            event = accounting.SampledWithoutReplacementDpEvent(clients, size, event)
        accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def figures(o: Dp | None, sampled: Sampled) -> Mapping[str, float]:
    """Epsilon so far and its delta; nothing without noise, rounds, or the accountant."""
    if o is None or not sampled or o.noise_multiplier == 0 or not has_accountant():
        return {}
    spent = epsilon(o.noise_multiplier, o.delta, sampled, o.clients)
    return {"epsilon": spent, "delta": o.delta} if math.isfinite(spent) else {}
