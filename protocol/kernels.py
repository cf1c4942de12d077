"""The noise kernels on a CPU: compiled where numba is installed, over threads, in place.

Whatever is chosen, the bits are those of ``protocol.noise``: a split changes none, and
sums are made in a fixed order.  numba is loaded at the first job that is worth it, so
a coordinator of a small method never pays its memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np

from protocol import noise
from protocol.noise import PIECE, Direction, Doubles, Flat, Kind

log = logging.getLogger(__name__)

WORTH = 1 << 20  # numbers to draw from which the compiled kernels, once loaded, pay
_pool: ThreadPoolExecutor | None = None
_num_threads = 0


def use_threads(count: int) -> None:
    """How many threads share a job from now on; 0 means one per processor."""
    global _pool, _num_threads  # one pool per process, as torch and BLAS have theirs
    _pool, _num_threads = None, count


def num_threads() -> int:
    """How many threads share a job."""
    return _num_threads or _processors()


@cache
def has_compiled() -> bool:
    """Whether the compiled kernels are installed."""
    return importlib.util.find_spec("numba") is not None


def add_(
    x: Flat,
    keys: Sequence[int],
    alphas: Sequence[float] | Flat,
    *,
    start: int = 0,
    kind: Kind = "normal",
) -> None:
    """Add alphas[k] * z_k to x in place, one k after the other.

    Args:
        x: contiguous; its first element is number ``start`` of the stream.
        keys: of the directions.
        alphas: rounded to fp32 here.
        start: see ``x``.
        kind: which stream.

    Raises:
        ValueError: keys and alphas differ in number.
    """
    if len(keys) != len(alphas):
        raise ValueError(f"{len(keys)} keys, {len(alphas)} alphas")
    chosen, k = choose(len(x) * len(keys)), np.array(keys, np.uint64)
    a = np.asarray(alphas, np.float32)
    spread(lambda i, j: chosen.add(x[i:j], start + i, k, a, kind), len(x), start)


def add_direction_(x: Flat, alpha: float, direction: Direction) -> None:
    """Add alpha * z to x in place, on the direction's ranges."""
    for start, stop in direction.ranges:
        add_(x[start:stop], [direction.key], [alpha], start=start, kind=direction.kind)


def shifted(
    x: Flat, key: int, offsets: Flat, out: Flat, *, start: int = 0, kind: Kind = "normal"
) -> None:
    """out[s] = x + offsets[s] * z for all s at once; offsets are rounded to fp32 here.

    Raises:
        ValueError: out is not (len(offsets), len(x)).
    """
    if out.shape != (len(offsets), len(x)):
        raise ValueError(f"out is {out.shape}, want {(len(offsets), len(x))}")
    chosen, offsets = choose(len(x)), np.asarray(offsets, np.float32)
    spread(
        lambda i, j: chosen.shifted(x[i:j], start + i, key, offsets, out[:, i:j], kind),
        len(x),
        start,
    )


def dots(x: Flat, keys: Sequence[int], *, start: int = 0, kind: Kind = "normal") -> Doubles:
    """The scalar products of x with each z_k, (len(keys),), summed in fp64."""
    chosen, k = choose(len(x) * len(keys)), np.array(keys, np.uint64)
    parts: dict[int, Doubles] = {}

    def part(i: int, j: int) -> None:
        parts[i] = chosen.dots(x[i:j], start + i, k, kind)

    spread(part, len(x), start)
    return noise.total(np.concatenate([parts[i] for i in sorted(parts)]))


def spread(work: Callable[[int, int], object], size: int, start: int = 0) -> None:
    """Call ``work(i, j)`` for parts that cover range(size), on all threads.

    Parts meet where ``start + i`` is a multiple of PIECE, however many there are.
    """
    count = max(1, min(num_threads(), noise.num_pieces(start, size)))
    first = start // PIECE
    cuts = [
        min(max((first + noise.num_pieces(start, size) * t // count) * PIECE - start, 0), size)
        for t in range(count)
    ] + [size]
    others = [_executor().submit(work, i, j) for i, j in itertools.pairwise(cuts[1:])]
    try:
        work(cuts[0], cuts[1])
    finally:  # whatever happens, nobody writes into x any more
        wait(others)
    for other in others:
        other.result()


def choose(num_draws: int) -> Any:
    """The module whose ``add``, ``shifted`` and ``dots`` serve a job of this size."""
    worth = num_draws >= WORTH or "protocol.kernels_numba" in sys.modules
    return _compiled() if worth and has_compiled() else noise


@cache
def _compiled() -> Any:
    try:
        return importlib.import_module("protocol.kernels_numba")
    except (RuntimeError, ImportError, OSError) as error:
        # numba has no place for what it compiles, or does not go with this numpy or system
        log.warning("noise is drawn by the slow reference: %s", error)
        return noise


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="noise")
    return _pool


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
