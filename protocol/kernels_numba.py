"""The kernels of ``protocol.noise`` compiled for CPUs; the same bits, several times faster.

Noise is made in groups of ``GROUP`` elements that stay in the first-level cache, and is
used up before the next group is made: no buffer of a direction's length exists.  The
loops are written so that LLVM turns them into vector code (eight blocks of Philox at a
time with AVX-512), and without ``fastmath``, so that no product and sum are fused.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from protocol import noise
from protocol.noise import PIECE, Doubles, Flat, Keys, Kind

# Elements.  At 256 a vector aligned to 64 bytes, as torch's are, takes twice as long.
# numba keeps compiled code until this file changes: touch it when PIECE or LANES does.
GROUP = 128
_BLOCKS = GROUP // noise.LANES
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF_WORD, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_U16, _LANE = np.uint32(16), np.uint32(0xFFFF)
_KINDS: dict[Kind, int] = {"normal": 0, "uniform": 1, "sign": 2}
_compiled = njit(nogil=True, cache=True, error_model="numpy")


@njit(nogil=True, inline="always")
def _words(words, key, group):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of a group's blocks into words, (4, _BLOCKS)."""
    for j in range(_BLOCKS):
        block = np.uint64(group * _BLOCKS + j)
        c0, c1 = np.uint32(block), np.uint32(block >> _HALF_WORD)
        c2, c3 = np.uint32(0), np.uint32(0)
        k0, k1 = np.uint32(key & _LOW), np.uint32(key >> _HALF_WORD)
        for _ in range(10):
            p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
            c0 = np.uint32(p1 >> _HALF_WORD) ^ c1 ^ k0
            c1 = np.uint32(p1)
            c2 = np.uint32(p0 >> _HALF_WORD) ^ c3 ^ k1
            c3 = np.uint32(p0)
            k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
        words[0, j], words[1, j], words[2, j], words[3, j] = c0, c1, c2, c3


@njit(nogil=True, inline="always")
def _fill(z, words, key, group, kind, table):  # type: ignore[no-untyped-def]
    """A group's numbers into z, (GROUP,): the maps of docs/noise.md."""
    _words(words, key, group)
    if kind == 0:
        for j in range(_BLOCKS):
            for q in range(4):
                word = words[q, j]
                z[8 * j + 2 * q] = table[word & _LANE]
                z[8 * j + 2 * q + 1] = table[word >> _U16]
    elif kind == 1:
        for j in range(_BLOCKS):
            for q in range(4):
                word = words[q, j]
                low, high = np.int32(word & _LANE), np.int32(word >> _U16)
                z[8 * j + 2 * q] = np.float32(2 * low - 65535) * np.float32(2.0**-16)
                z[8 * j + 2 * q + 1] = np.float32(2 * high - 65535) * np.float32(2.0**-16)
    else:
        for j in range(_BLOCKS):
            for q in range(4):
                word = words[q, j]
                z[8 * j + 2 * q] = np.float32(1 - 2 * np.int32((word >> np.uint32(15)) & 1))
                z[8 * j + 2 * q + 1] = np.float32(1 - 2 * np.int32(word >> np.uint32(31)))


@_compiled
def _add(x, start, keys, alphas, kind, table):  # type: ignore[no-untyped-def]
    z, words = np.empty(GROUP, np.float32), np.empty((4, _BLOCKS), np.uint32)
    stop = start + x.size
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        at = group * GROUP - start
        for k in range(keys.size):
            _fill(z, words, keys[k], group, kind, table)
            alpha = alphas[k]
            if 0 <= at <= x.size - GROUP:
                for i in range(GROUP):  # of known length: twice as fast
                    x[at + i] += alpha * z[i]
            else:
                for i in range(max(0, -at), min(GROUP, x.size - at)):
                    x[at + i] += alpha * z[i]


@_compiled
def _shifted(x, start, key, offsets, out, kind, table):  # type: ignore[no-untyped-def]
    z, words = np.empty(GROUP, np.float32), np.empty((4, _BLOCKS), np.uint32)
    stop = start + x.size
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        at = group * GROUP - start
        _fill(z, words, key, group, kind, table)
        for s in range(offsets.size):
            offset = offsets[s]
            if 0 <= at <= x.size - GROUP:
                for i in range(GROUP):
                    out[s, at + i] = x[at + i] + offset * z[i]
            else:
                for i in range(max(0, -at), min(GROUP, x.size - at)):
                    out[s, at + i] = x[at + i] + offset * z[i]


@_compiled
def _dots(x, start, keys, sums, kind, table):  # type: ignore[no-untyped-def]
    """Sums by piece, key and lane, (pieces, keys, 8): in the order of the reference."""
    z, words = np.empty(GROUP, np.float32), np.empty((4, _BLOCKS), np.uint32)
    part = np.empty(GROUP, np.float64)
    stop, base = start + x.size, start // PIECE
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        at, piece = group * GROUP - start, group * GROUP // PIECE - base
        part[:] = 0
        for i in range(max(0, -at), min(GROUP, x.size - at)):
            part[i] = x[at + i]
        for k in range(keys.size):
            _fill(z, words, keys[k], group, kind, table)
            for j in range(_BLOCKS):
                for lane in range(8):
                    sums[piece, k, lane] += part[8 * j + lane] * np.float64(z[8 * j + lane])


def add(x: Flat, start: int, keys: Keys, alphas: Flat, kind: Kind) -> None:
    """As ``noise.add``."""
    _add(x, start, keys, alphas, _KINDS[kind], noise.NORMALS)


def shifted(x: Flat, start: int, key: int, offsets: Flat, out: Flat, kind: Kind) -> None:
    """As ``noise.shifted``."""
    _shifted(x, start, np.uint64(key), offsets, out, _KINDS[kind], noise.NORMALS)


def dots(x: Flat, start: int, keys: Keys, kind: Kind) -> Doubles:
    """As ``noise.dots``."""
    sums = np.zeros((noise.num_pieces(start, len(x)), len(keys), noise.LANES))
    if len(x):
        _dots(x, start, keys, sums, _KINDS[kind], noise.NORMALS)
    return sums
