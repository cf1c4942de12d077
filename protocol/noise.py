"""The shared-noise stream: the same key means the same numbers on every machine.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11)
turns (key, counter) into 128 bits; the counter is the element index divided by 8, so
element i is the i-th 16-bit lane of the stream, wherever and in whatever split it is
generated.  A normal is a table look-up of its 16 bits: integers and one table, no
libm.  ``docs/noise.md`` is the specification; this numpy version is the reference, and
``protocol.kernels`` runs the last part of it on threads and in compiled form.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

STREAM = "philox4x32-10/normal16/1"
LANES = 8  # 16-bit lanes in one 128-bit block
PIECE = 1 << 16  # elements generated at once, and summed by ``dots`` before they are added up

Kind = Literal["normal", "uniform", "sign"]
Flat = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint64]
Doubles = npt.NDArray[np.float64]

FEW_BLOCKS = 8  # that are sooner drawn one by one than by an array's operations

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_TABLE_SHA256 = "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"


def _load_table() -> npt.NDArray[np.float32]:
    data = (Path(__file__).parent / "normals.f32").read_bytes()
    if hashlib.sha256(data).hexdigest() != _TABLE_SHA256:
        raise RuntimeError("protocol/normals.f32 is damaged: reinstall seedwire")
    upper = np.frombuffer(data, "<f4").astype(np.float32)
    return np.concatenate([upper, -upper])  # bit 15 is the sign


NORMALS = _load_table()  # by 16 bits


def key(purpose: str, *fields: int) -> int:
    """The 64-bit key for one purpose and its coordinates, e.g. (run, round, client, step, k).

    blake2b, personalised with the purpose (at most 16 bytes), over the fields as
    little-endian signed 64-bit integers.
    """
    data = struct.pack(f"<{len(fields)}q", *fields)
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32 with 10 rounds.

    Args:
        counter: (4, n) words, least significant first.
        key: two 32-bit words, least significant first.

    Returns:
        (4, n) random words.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64)
    return np.stack(_ten_rounds(c0, c1, c2, c3, *key)).astype(np.uint32)


def _ten_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> tuple[Any, ...]:
    """Four words of the counter to four random ones: integers, or arrays of uint64."""
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # 32 x 32 -> 64 bits, exact
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def bits(key: int, start: int, stop: int) -> npt.NDArray[np.uint16]:
    """Elements ``start`` to ``stop`` of the stream of 16-bit lanes."""
    first, last = start // LANES, -(-stop // LANES)
    halves = key & _LOW, key >> 32
    if last - first <= FEW_BLOCKS:
        blocks = [_ten_rounds(b & _LOW, b >> 32, 0, 0, *halves) for b in range(first, last)]
        words = np.array(blocks, "<u4")
    else:
        block = np.arange(first, last, dtype=np.uint64)
        zero = np.zeros_like(block)
        counter = np.stack([block & _LOW, block >> 32, zero, zero]).astype(np.uint32)
        words = np.ascontiguousarray(philox(counter, halves).T.astype("<u4"))
    lanes = words.view("<u2").reshape(-1)
    return lanes[start - first * LANES : stop - first * LANES].astype(np.uint16, copy=False)


def normals(key: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Elements ``start`` to ``stop`` of the standard normal stream: mean 0, variance 1."""
    return NORMALS[bits(key, start, stop)]


def uniforms(key: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Elements of the uniform stream on (-1, 1): (2 k + 1 - 65536) / 65536, exact in fp32."""
    lanes = bits(key, start, stop).astype(np.int32)
    return (2 * lanes + 1 - 65536).astype(np.float32) * np.float32(2.0**-16)


def rademachers(key: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Elements of the sign stream: +1 where bit 15 is 0, else -1."""
    return np.where(bits(key, start, stop) >> 15, np.float32(-1), np.float32(1))


def permutation(key: int, n: int) -> npt.NDArray[np.int64]:
    """A permutation of range(n): element i sorts by lanes 4 i to 4 i + 3, ties by i."""
    words = bits(key, 0, 4 * n).astype("<u2").view("<u8")
    return np.argsort(words, kind="stable")


def stream(kind: Kind, key: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Elements ``start`` to ``stop`` of one of the three streams of numbers."""
    match kind:
        case "normal":
            return normals(key, start, stop)
        case "uniform":
            return uniforms(key, start, stop)
        case "sign":
            return rademachers(key, start, stop)


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction that needs no memory: the stream on ``ranges``, zero elsewhere.

    The counter is the global element index, so a part of a direction is the same
    numbers as that part of the whole.
    """

    key: int
    ranges: tuple[tuple[int, int], ...]
    kind: Kind = "normal"

    def dense(self, size: int) -> npt.NDArray[np.float32]:
        """The whole vector, (size,)."""
        z = np.zeros(size, np.float32)
        for start, stop in self.ranges:
            z[start:stop] = stream(self.kind, self.key, start, stop)
        return z


# --- what kernels do: the reference, one array whose first element is number ``start`` ---


def add(x: Flat, start: int, keys: Keys, alphas: Flat, kind: Kind) -> None:
    """Add alphas[k] * z_k to x in place, k = 0, 1, ...

    For each element and k one fp32 product, then one fp32 sum, never fused.
    """
    for first, last in _pieces(start, len(x)):
        part = x[first - start : last - start]
        for key, alpha in zip(keys.tolist(), alphas, strict=True):
            part += alpha * stream(kind, key, first, last)


def shifted(x: Flat, start: int, key: int, offsets: Flat, out: Flat, kind: Kind) -> None:
    """out[s] = x + offsets[s] * z, shape (len(offsets), len(x)): a product, then a sum."""
    for first, last in _pieces(start, len(x)):
        span = slice(first - start, last - start)
        z = stream(kind, key, first, last)
        for to, offset in zip(out, offsets, strict=True):
            to[span] = x[span] + offset * z


def dots(x: Flat, start: int, keys: Keys, kind: Kind) -> Doubles:
    """Parts of the scalar products of x with each z_k, in fp64.

    Returns:
        (pieces, len(keys), 8): the sums over the elements of one piece and one lane
        (index modulo 8), in ascending order.  ``total`` adds them up.
    """
    sums = np.zeros((num_pieces(start, len(x)), len(keys), LANES))
    for piece, (first, last) in enumerate(_pieces(start, len(x))):
        skip, fill = first % LANES, -last % LANES
        part = np.pad(x[first - start : last - start], (skip, fill)).astype(np.float64)
        for k, key in enumerate(keys.tolist()):
            z = stream(kind, key, first - skip, last + fill)
            sums[piece, k] = (part * z).reshape(-1, LANES).sum(axis=0)
    return sums


def total(sums: Doubles) -> Doubles:
    """The scalar products, (keys,), from ``dots``: lanes in order, then pieces in order."""
    out = np.zeros(sums.shape[1])
    for piece in sums:
        by_key = np.zeros(sums.shape[1])
        for lane in range(LANES):
            by_key += piece[:, lane]
        out += by_key
    return out


def num_pieces(start: int, size: int) -> int:
    """How many pieces ``size`` elements from ``start`` touch."""
    return -(-(start + size) // PIECE) - start // PIECE if size else 0


def _pieces(start: int, size: int) -> Iterator[tuple[int, int]]:
    """Parts of [start, start + size) that do not cross a multiple of PIECE."""
    stop = start + size
    while start < stop:
        last = min(stop, (start // PIECE + 1) * PIECE)
        yield start, last
        start = last
