"""The kernels of ``protocol.noise`` as Triton programs: the same bits on a CUDA device.

A thread makes whole blocks of eight numbers, one Philox each, and uses them up in
registers: no buffer of a direction's length exists.  Positions have 64 bits, in the
stream and in memory.  Only what uses a CUDA device may import this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from protocol import noise
from protocol.noise import LANES, PIECE, Doubles, Flat, Kind

BLOCKS = 128  # of eight numbers, in one program of ``add_`` and ``shifted``
PAIRS = 32  # of a piece and a key, in one program of ``dots``
# docs/noise.md wants a product, rounded, then a sum, rounded.  Left to itself the compiler
# makes one multiply-add of the two, which rounds once and gives other bits.
UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def _words(blocks, key):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of blocks, (n,): four times (n,)."""
    c0, c1 = blocks.to(tl.uint32), (blocks >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit  # type: ignore[untyped-decorator]
def _map(lane, table, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 bits to a number: the maps of docs/noise.md."""
    if kind == "normal":
        z = tl.load(table + lane)
    elif kind == "uniform":
        z = (2 * lane.to(tl.int32) - 65535).to(tl.float32) * 0.0000152587890625  # 2^-16
    else:
        z = (1 - 2 * (lane >> 15).to(tl.int32)).to(tl.float32)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(blocks, key, table, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of blocks, (n,): (n, 8).

    Mapped first and joined after: joined words would be moved between threads for the
    look-ups, at every key.
    """
    c0, c1, c2, c3 = _words(blocks, key)
    # ``join`` adds a last axis; the order is (word div 2, word mod 2, half)
    low02 = tl.join(_map(c0 & 0xFFFF, table, kind), _map(c2 & 0xFFFF, table, kind))
    low13 = tl.join(_map(c1 & 0xFFFF, table, kind), _map(c3 & 0xFFFF, table, kind))
    high02 = tl.join(_map(c0 >> 16, table, kind), _map(c2 >> 16, table, kind))
    high13 = tl.join(_map(c1 >> 16, table, kind), _map(c3 >> 16, table, kind))
    z = tl.join(tl.join(low02, low13), tl.join(high02, high13))
    return z.reshape(blocks.shape[0], 8)


# Below, ``first`` is the block of x's first element and ``skip`` that element's lane;
# ``first`` is never specialised, or kernels would be compiled anew for chance values.


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    x, size, first, skip, keys, alphas, num_keys, table, kind: tl.constexpr, width: tl.constexpr
):
    blocks = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    i = blocks[:, None] * 8 + tl.arange(0, 8)[None, :] - skip
    inside = (i >= 0) & (i < size)
    values = tl.load(x + i, inside)
    for k in range(num_keys):
        z = _numbers(first + blocks, tl.load(keys + k), table, kind)
        values += tl.load(alphas + k) * z
    tl.store(x + i, values, inside)


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def _shifted(  # type: ignore[no-untyped-def]
    x, size, first, skip, key, offsets, num, out, table, kind: tl.constexpr, width: tl.constexpr
):
    blocks = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    i = blocks[:, None] * 8 + tl.arange(0, 8)[None, :] - skip
    inside = (i >= 0) & (i < size)
    values = tl.load(x + i, inside)
    z = _numbers(first + blocks, tl.load(key), table, kind)
    to = out + i
    for s in range(num):
        tl.store(to, values + tl.load(offsets + s) * z, inside)
        to += size


@triton.jit(do_not_specialize=["first", "rows"])  # type: ignore[untyped-decorator]
def _dots(  # type: ignore[no-untyped-def]
    x, size, first, skip, keys, num_keys, sums, num_pairs, rows, table,
    kind: tl.constexpr, piece_rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """One piece and one key to a thread, which adds up eight lanes in the reference's order."""
    pair = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    piece, k = pair // num_keys, pair % num_keys
    edge = (first // piece_rows + piece) * piece_rows  # the piece's first block
    begin = tl.maximum(edge, first)
    last = tl.minimum((edge + piece_rows - first) * 8 - skip, size)
    key = tl.load(keys + k)
    lane = tl.arange(0, 8)[None, :]
    total = tl.zeros((width, 8), tl.float64)
    for row in range(rows):
        i = (begin - first + row)[:, None] * 8 + lane - skip
        values = tl.load(x + i, (i >= 0) & (i < last[:, None]), 0.0)
        z = _numbers(begin + row, key, table, kind)
        total += values.to(tl.float64) * z.to(tl.float64)  # 48 bits: the product is exact
    tl.store(sums + pair[:, None] * 8 + lane, total, (pair < num_pairs)[:, None])


def add_(
    x: torch.Tensor,
    keys: Sequence[int],
    alphas: Sequence[float] | Flat,
    *,
    start: int = 0,
    kind: Kind = "normal",
) -> None:
    """Add alphas[k] * z_k to x in place, one k after the other, in one pass over x.

    Args:
        x: (n,), fp32, contiguous; its first element is number ``start`` of the stream.
        keys: of the directions.
        alphas: as many; rounded to fp32 here.
        start: see ``x``.
        kind: which stream.

    Raises:
        ValueError: x is no contiguous fp32 vector, or keys and alphas differ in number.
    """
    _check(x, (x.numel(),))
    if len(keys) != len(alphas):
        raise ValueError(f"{len(keys)} keys, {len(alphas)} alphas")
    if not len(x) or not len(keys):
        return
    first, skip = divmod(start, LANES)
    a = _upload(np.array(alphas, np.float32), x.device)
    with _device_of(x):
        _add[_grid(skip + len(x), BLOCKS * LANES)](
            x, len(x), first, skip, _keys(keys, x.device), a, len(keys), _table(x.device),
            kind=kind, width=BLOCKS, **UNFUSED,
        )  # fmt: skip


def shifted(
    x: torch.Tensor,
    key: int,
    offsets: Sequence[float] | Flat,
    out: torch.Tensor,
    *,
    start: int = 0,
    kind: Kind = "normal",
) -> None:
    """out[s] = x + offsets[s] * z for all s at once, in one pass over x.

    Args:
        x: as for ``add_``.
        key: of the direction.
        offsets: rounded to fp32 here.
        out: (len(offsets), n), fp32, contiguous, on the device of x.
        start: as for ``add_``.
        kind: which stream.

    Raises:
        ValueError: x or out is not what is written above.
    """
    _check(x, (x.numel(),))
    _check(out, (len(offsets), len(x)), x.device)
    if not out.numel():
        return
    first, skip = divmod(start, LANES)
    s = _upload(np.array(offsets, np.float32), x.device)
    with _device_of(x):
        _shifted[_grid(skip + len(x), BLOCKS * LANES)](
            x, len(x), first, skip, _keys([key], x.device), s, len(s), out, _table(x.device),
            kind=kind, width=BLOCKS, **UNFUSED,
        )  # fmt: skip


def dots(x: torch.Tensor, keys: Sequence[int], *, start: int = 0, kind: Kind = "normal") -> Doubles:
    """The scalar products of x with each z_k, (len(keys),), summed in fp64.

    The order of the sums is the reference's, so the bits are too.

    Args:
        x: as for ``add_``.
        keys: of the directions.
        start: as for ``add_``.
        kind: which stream.

    Raises:
        ValueError: x is no contiguous fp32 vector.
    """
    _check(x, (x.numel(),))
    first, skip = divmod(start, LANES)
    shape = (noise.num_pieces(start, len(x)), len(keys), LANES)
    sums = torch.empty(shape, dtype=torch.float64, device=x.device)
    if not sums.numel():
        return np.zeros(len(keys))
    num_pairs, piece_rows = shape[0] * shape[1], PIECE // LANES
    rows = min(piece_rows, -(-(skip + len(x)) // LANES))
    with _device_of(x):
        _dots[_grid(num_pairs, PAIRS)](
            x, len(x), first, skip, _keys(keys, x.device), len(keys), sums, num_pairs, rows,
            _table(x.device), kind=kind, piece_rows=piece_rows, width=PAIRS, num_warps=1, **UNFUSED,
        )  # fmt: skip
    return noise.total(sums.cpu().numpy())


def _device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


@cache
def _table(device: torch.device) -> torch.Tensor:
    return _upload(noise.NORMALS, device)


def _keys(keys: Sequence[int], device: torch.device) -> torch.Tensor:
    return _upload(np.array(keys, np.uint64).view(np.int64), device)  # the same 64 bits


def _upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _grid(num: int, each: int) -> tuple[int]:
    return (-(-num // each),)


def _check(x: torch.Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> None:
    """A kernel sees an address and no more: a wrong tensor would be wrong numbers, or a crash."""
    if (
        x.dtype != torch.float32
        or x.shape != shape
        or not x.is_contiguous()
        or x.device != (device or x.device)
    ):
        raise ValueError(f"want contiguous float32 {shape}, not {x.dtype} {tuple(x.shape)}")
