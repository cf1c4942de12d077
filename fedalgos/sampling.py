"""Discriminative sampling: of several candidate directions, keep those that promise most.

FwdLLM, arXiv:2308.13894.  The server draws more candidates than it asks for, and keeps for
each client those with the largest scalar product with the last committed gradient u: the
signed one, so that the estimates lean along u.  Of a large draw, the top 10 % have
E[u.z] = 1.755 and E[(u.z)^2] = 3.249 where u has length 1, so

    E[(g.z) z] = g + 2.249 (u.g) u

right off u, and amplified along it: momentum, in effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from protocol import kernels
from protocol.payload import Flat


def num_candidates(count: int, keep: float) -> int:
    """How many to draw for ``count`` to be kept."""
    return math.ceil(count / keep - 1e-9)  # 7 / 0.07 is a little over 100


def best(
    reference: Flat, start: int, clients: int, size: int, count: int, key: Callable[[int], int]
) -> list[list[int]]:
    """The picks that each client is to use, in ascending order.

    Client i has the candidates from ``start + i * size`` on.  They rank by their scalar
    product with the reference, of equal ones the lower first.  A cosine would divide it by
    the candidate's length: that varies by 1 / sqrt(2 D), is a draw more to know, and the
    estimate (g.z) z does not divide by it either.

    Args:
        reference: (D,), of any length but 0.
        start: the first candidate of all.
        clients: how many.
        size: candidates of each client.
        count: how many of them to keep.
        key: from a pick to its direction.
    """
    found: list[list[int]] = []
    for first in range(start, start + clients * size, size):  # one client's sums in memory
        dots = kernels.dots(reference, [key(pick) for pick in range(first, first + size)])
        order = np.argsort(-dots, kind="stable")[:count]
        found.append((np.sort(order) + first).tolist())
    return found
