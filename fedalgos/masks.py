"""Which coordinates travel: the largest, the head, the first ranks; and how many in a round.

What a node and the coordinator both derive, they derive from the shared parameters x, and
nothing of it is sent.  With W the server's dense weights and M its k largest |W|, x is M.W,
and the k largest |x| are M again.  If no weight in M is zero, x has exactly k entries that
are not, those of M.  If one is, then all that are not zero are in M, zeros being the
smallest, so x is W.  The same holds for a smaller k, so masks of tiers nest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from fedalgos.space import ParamSpace
from fedalgos.split import head_units
from protocol.errors import ExperimentError
from protocol.payload import Flat, Sparse

Places = npt.NDArray[np.int64]  # increasing
Density = Annotated[float, Meta(gt=0, le=1)]
HeadMask = Literal["inside", "outside"]


def top_k(x: Flat, k: int) -> Places:
    """Places of the k largest |x|, increasing; of equals the lower index, on any machine.

    NaN is smaller than all numbers.  Below 1 gives none, and len(x) or more all.
    """
    if k <= 0 or k >= len(x):
        return np.arange(len(x) if k > 0 else 0, dtype=np.int64)
    m = -np.abs(x)
    edge = np.partition(m, k - 1)[k - 1]
    if np.isnan(edge):
        return np.sort(np.argsort(m, kind="stable")[:k])
    inside, on = np.flatnonzero(m < edge), np.flatnonzero(m == edge)
    return np.sort(np.concatenate([inside, on[: k - len(inside)]]))


def sparsify(x: Flat, k: int) -> Sparse:
    """The k largest |x| and their places."""
    places = top_k(x, k)
    return Sparse(len(x), places, x[places])


def restricted(x: Flat, places: Places) -> Flat:
    """M.x: zero but for the places, a copy."""
    out = np.zeros_like(x)
    out[places] = x[places]
    return out


@dataclass(frozen=True)
class Pool:
    """What a top-k chooses from.

    Attributes:
        size: of the vector.
        always: places that are in every choice and take no part in it.
    """

    size: int
    always: Places

    @staticmethod
    def of(space: ParamSpace, head: HeadMask) -> Pool:
        """Everything, or everything but the head.

        Raises:
            ExperimentError: the head is to be outside, and cannot be told.
        """
        if head == "inside":
            return Pool(space.size, np.arange(0))
        units = head_units(space)
        if not 0 < len(units) < len(space.units):
            raise ExperimentError(
                '[method] head = "outside": which units are the head cannot be told '
                'from what is trained here; take head = "inside"'
            )
        return Pool(space.size, _concatenated(np.arange(*r) for r in space.ranges(units)))

    def count(self, density: float) -> int:
        """How many places a choice of this density has; at least one that is chosen.

        Rounded, not cut: int(0.29 * 100) is 28.
        """
        return len(self.always) + max(1, round(density * (self.size - len(self.always))))

    def largest(self, x: Flat, count: int) -> Places:
        """``count`` places: those that are always in, and the largest |x| of the others."""
        if not len(self.always):
            return top_k(x, count)
        others = np.delete(np.arange(self.size), self.always)
        chosen = others[top_k(x[others], count - len(self.always))]
        return np.sort(np.concatenate([self.always, chosen]))


def decayed(density: float, factor: float, every: int, round: int) -> float:
    """The density times factor^floor((round - 1) / every); rounds count from 1."""
    return density * factor ** ((round - 1) // every)


def rank_mask(space: ParamSpace, rank: int) -> Places:
    """The first ``rank`` rows of every LoRA A and columns of every B, and all that is no LoRA."""
    kept = []
    for t, start, stop in zip(space.tensors, space.offsets, space.offsets[1:], strict=False):
        places = np.arange(start, stop, dtype=np.int64).reshape(t.shape)
        if ".lora_A." in t.name:  # (rank, d_in)
            places = places[:rank]
        elif ".lora_B." in t.name:  # (d_out, rank)
            places = places[:, :rank]
        kept.append(places.ravel())
    return _concatenated(kept)


def tensor_ranges(space: ParamSpace, without: str) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the tensors whose names do not contain a text."""
    places = zip(space.tensors, space.offsets, space.offsets[1:], strict=False)
    return tuple((start, stop) for t, start, stop in places if without not in t.name)


def places_of(ranges: Iterable[tuple[int, int]]) -> Places:
    """All places of some ranges."""
    return _concatenated(np.arange(start, stop) for start, stop in ranges)


def _concatenated(parts: Iterable[Places]) -> Places:
    return np.concatenate([np.arange(0), *parts])
