"""The replay engine: from keys and scalars to parameters, the same bits everywhere.

A *path* is a walk x <- x + alpha_k z(key_k), k in order; in fp32, a product, then a sum.
Histories (FedMeZO, DeComFL), accumulators (FedKSeed) and reconstructions (Ferret) are all
paths.  A round of several clients is the mean of where their paths lead, weighted, summed
in fp64 in the clients' order and rounded once: exactly what a server computes from their
dense weights, so both wire forms of a method give the same digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol import kernels
from protocol.noise import PIECE, Kind
from protocol.payload import Flat


@dataclass(frozen=True, slots=True)
class Path:
    """One walk: ``keys`` of its directions, the ``alphas`` (fp32) along them, its weight.

    Raises:
        ValueError: not one alpha for each key.
    """

    keys: Sequence[int]
    alphas: Flat
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.alphas):
            raise ValueError(f"{len(self.keys)} directions, {len(self.alphas)} scalars")


def alphas(scale: float, scalars: Flat) -> Flat:
    """-scale * g for each scalar g: descent, rounded to fp32 once."""
    return -np.float32(scale) * scalars


def replay(x: Flat, paths: Sequence[Path], kind: Kind = "normal") -> Flat:
    """Where the paths lead from x, on average; x is not changed.

    Works through x piece by piece, all paths on one piece before the next, so that it
    needs no memory but the result and reads x once.

    Raises:
        ValueError: no paths.
    """
    if not paths:
        raise ValueError("a replay of no paths")
    if len(paths) == 1:
        new = x.copy()
        kernels.add_(new, paths[0].keys, paths[0].alphas, kind=kind)
        return new
    new, total = np.empty_like(x), sum(path.weight for path in paths)
    keys = [np.array(path.keys, np.uint64) for path in paths]
    chosen = kernels.choose(len(x) * sum(map(len, keys)))

    def part(start: int, stop: int) -> None:
        for first in range(start, stop, PIECE):
            last = min(stop, first + PIECE)
            mean = np.zeros(last - first)
            for path, k in zip(paths, keys, strict=True):
                w = x[first:last].copy()
                chosen.add(w, first, k, path.alphas, kind)
                mean += w.astype(np.float64) * path.weight  # numpy 1 would stay in fp32
            new[first:last] = mean / total

    kernels.spread(part, len(x))
    return new
