"""Where a sparse vector has its entries: k increasing places below n, as bytes.

A random choice of k among n takes log2 C(n, k) bits at least; the shortest of these codings
is within 5 % of that at every density up to 1/2, and far below it where places stand together.
The first byte names the coding, then come its parameters, then *fields*, numbers of a fixed
width, then *unary* numbers: q is q zeros and a one.  Bits fill a byte from the least
significant; what is left of the last byte of a field or of the unary numbers is zero.  The
gap of a place is how many indices stand between it and the place before.

- only: nothing more, for k = 0 and for k = n.
- bitmap: the gaps in unary, that is, bit i is 1 if place i is given, up to the last one.
- elias-fano: with l = floor(log2(n / k)), the low l bits of the places as a field, then for
  each the difference of its other bits from those of the place before, in unary.
- golomb-rice: r (1 byte), the low r bits of the gaps as a field, their other bits in unary.
- runs: m (5 bytes), r, s (1 byte each): m runs of consecutive places.  The lengths of all
  but the last, each less one, as golomb-rice with r; the lengths of what is absent before
  each run, each but the first less one, with s; both fields first, then both in unary.

r and s are the smallest of those that make their numbers shortest, so that a coding writes
places in one way only.  (Elias, "Efficient storage and retrieval by content and address of
static files", 1974; Rice, "Some practical universal noiseless coding techniques", 1979.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from protocol.wire import LocalProtocolError, RemoteProtocolError

Coding = Literal["only", "bitmap", "elias-fano", "golomb-rice", "runs"]
Places = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

CODINGS: tuple[Coding, ...] = get_args(Coding)  # a coding's number on the wire is its index
MAX_SIZE = 1 << 40
PIECE = 1 << 16  # bytes, or numbers of a field, whose bits are spread out at once
LONG = 3  # places in a run on average from which ``runs`` is tried; random ones have 2 at 1/2


@dataclass(frozen=True, slots=True)
class _Draft:
    """A message that knows its size and is not written yet."""

    coding: Coding
    parameters: bytes = b""
    fields: tuple[tuple[Places, int], ...] = ()  # the low bits of these, this many
    num_bits: int = 0  # of the unary part
    ones: Callable[[], Places] | None = None  # where in the unary part there are ones

    @property
    def nbytes(self) -> int:
        fields = sum(_bytes(len(numbers) * width) for numbers, width in self.fields)
        return 1 + len(self.parameters) + fields + _bytes(self.num_bits)


def nbytes(n: int, places: Places) -> tuple[Coding, int]:
    """The shortest coding of these places, of equals the first, and its size in bytes.

    Raises:
        LocalProtocolError: the places are not strictly increasing indices below n, or n is
            over 2^40.
    """
    draft = _shortest(n, places)
    return draft.coding, draft.nbytes


def encode(n: int, places: Places, coding: Coding | None = None) -> bytes:
    """The places in the shortest coding, or in ``coding``, which must be able to hold them.

    Raises:
        LocalProtocolError: as ``nbytes``.
    """
    draft = _shortest(n, places) if coding is None else _draft(coding, places, _gaps(n, places), n)
    fields = b"".join(_write_field(numbers, width) for numbers, width in draft.fields)
    unary = np.zeros(draft.num_bits, bool)
    if draft.ones is not None:
        unary[draft.ones()] = True
    bits = np.packbits(unary, bitorder="little").tobytes()
    return bytes([CODINGS.index(draft.coding)]) + draft.parameters + fields + bits


def decode(n: int, k: int, buffer: bytes | memoryview) -> Places:
    """The places that a buffer stands for, (k,), strictly increasing.

    Memory is bounded by a multiple of the buffer's size and, as k may be n at no cost in bytes,
    of k.  So k is the caller's to bound: by the values that come with the places.

    Raises:
        RemoteProtocolError: ``encode`` could not have made the buffer, with any coding, of k
            places below n.
    """
    data = np.frombuffer(buffer, np.uint8)
    if not 0 <= k <= n <= MAX_SIZE:
        raise RemoteProtocolError(f"{k} places below {n}")
    if not len(data) or data[0] >= len(CODINGS):
        raise RemoteProtocolError(f"places in no known coding: {bytes(data[:1]).hex()!r}")
    coding, body = CODINGS[data[0]], data[1:]
    if (coding == "only") != (k in (0, n)):
        raise RemoteProtocolError(f"{k} places below {n} as {coding}")
    match coding:
        case "only":
            _must(not len(body))
            return np.arange(k, dtype=np.int64)
        case "bitmap":
            _, places = _read(body, (k, 0))
        case "elias-fano":
            places = _read_elias_fano(n, k, body)
        case "golomb-rice":
            places = _read_golomb_rice(n, k, body)
        case "runs":
            places = _read_runs(n, k, body)
    _must(places[-1] < n)
    return places


# --- writing ---------------------------------------------------------------------------


def _shortest(n: int, places: Places) -> _Draft:
    gaps, k = _gaps(n, places), len(places)
    if k in (0, n):
        return _Draft("only")
    drafts = [_draft(c, places, gaps, n) for c in ("bitmap", "elias-fano", "golomb-rice")]
    if LONG * (1 + np.count_nonzero(gaps[1:])) <= k:
        drafts.append(_draft("runs", places, gaps, n))
    return min(drafts, key=lambda draft: draft.nbytes)


def _gaps(n: int, places: Places) -> Places:
    """The gap of each place, (k,), checked not to be negative."""
    gaps = np.empty(len(places), np.int64)
    gaps[:1] = places[:1]
    np.subtract(places[1:], places[:-1], out=gaps[1:])
    gaps[1:] -= 1
    if n > MAX_SIZE or (len(gaps) and (gaps.min() < 0 or places[-1] >= n)):
        raise LocalProtocolError(f"places that do not increase, or pass {n}")
    return gaps


def _draft(coding: Coding, places: Places, gaps: Places, n: int) -> _Draft:
    k = len(places)
    match coding:
        case "only":
            return _Draft(coding)
        case "bitmap":
            return _Draft(coding, num_bits=int(places[-1]) + 1, ones=lambda: places)
        case "elias-fano":
            low, last = _low_bits(n, k), int(places[-1])
            return _Draft(
                coding,
                b"",
                ((places, low),),
                k + (last >> low),
                lambda: (places >> low) + np.arange(k),
            )
        case "golomb-rice":
            return _golomb_rice(coding, b"", gaps)
        case "runs":
            starts = np.flatnonzero(np.append(True, gaps[1:] > 0))
            absent = gaps[starts]
            absent[1:] -= 1
            return _golomb_rice(
                coding, len(starts).to_bytes(5, "little"), np.diff(starts) - 1, absent
            )


def _golomb_rice(coding: Coding, head: bytes, *lists: Places) -> _Draft:
    widths = [_width(numbers) for numbers in lists]
    fields = tuple(zip(lists, widths, strict=True))
    quotients = [numbers >> width for numbers, width in fields]
    num_bits = sum(len(q) + int(q.sum()) for q in quotients)
    return _Draft(
        coding,
        head + bytes(widths),
        fields,
        num_bits,
        lambda: np.cumsum(np.concatenate(quotients) + 1) - 1,
    )


def _width(numbers: Places) -> int:
    """The smallest r of those that make golomb-rice shortest.

    The size, len (r + 1) + sum(numbers >> r), is convex in r: a step up saves the sum of
    ceil((number >> r) / 2), which falls with r.  So the first valley is the lowest.
    """

    def size(r: int) -> int:
        return len(numbers) * r + int((numbers >> r).sum())

    mean = int(numbers.sum()) // max(len(numbers), 1)
    r = max(mean.bit_length() - 1, 0)
    here = size(r)
    while (there := size(r + 1)) < here:
        r, here = r + 1, there
    while r and (there := size(r - 1)) <= here:
        r, here = r - 1, there
    return r


def _low_bits(n: int, k: int) -> int:
    return (n // k).bit_length() - 1


def _write_field(numbers: Places, width: int) -> bytes:
    parts = []
    for first in range(0, len(numbers) if width else 0, PIECE):  # a multiple of 8: whole bytes
        piece = numbers[first : first + PIECE]
        bits = np.empty((len(piece), width), np.uint8)
        for j in range(width):
            bits[:, j] = (piece >> j) & 1
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


# --- reading ---------------------------------------------------------------------------


def _read_elias_fano(n: int, k: int, body: Bytes) -> Places:
    low = _low_bits(n, k)
    (field,), ones = _read(body, (k, low))
    high = ones - np.arange(k)
    _must(int(high[-1]) <= n >> low)  # or the shift could overflow
    places = (high << low) | field
    _must(bool((places[1:] > places[:-1]).all()))
    return places


def _read_golomb_rice(n: int, k: int, body: Bytes) -> Places:
    _must(len(body) >= 1)
    (gaps,) = _read_numbers(body[1:], (k, int(body[0]), n - k))
    return np.cumsum(gaps + 1) - 1


def _read_runs(n: int, k: int, body: Bytes) -> Places:
    _must(len(body) >= 7)
    m = int.from_bytes(body[:5].tobytes(), "little")
    _must(1 <= m <= min(k, n - k + 1))
    r, s = int(body[5]), int(body[6])
    lengths, absent = _read_numbers(body[7:], (m - 1, r, k - m), (m, s, n - k - (m - 1)))
    lengths = np.append(lengths + 1, k - (m - 1) - int(lengths.sum()))
    absent[1:] += 1
    return np.repeat(np.cumsum(absent), lengths) + np.arange(k)


def _read_numbers(data: Bytes, *lists: tuple[int, int, int]) -> list[Places]:
    """Lists written as golomb-rice, each given by its length, its r and its largest sum."""
    for count, r, most in lists:
        # the best r above 0 is worth its bits: sum(numbers >> (r - 1)) is above count; with
        # that no sum below can overflow
        _must(not r or count << (r - 1) < most)
    fields, ones = _read(data, *((count, r) for count, r, _ in lists))
    quotients = np.diff(ones, prepend=-1) - 1
    numbers: list[Places] = []
    for (count, r, most), field in zip(lists, fields, strict=True):
        high, quotients = quotients[:count], quotients[count:]
        _must(int(high.sum()) << r <= most)
        numbers.append((high << r) | field)
        _must(int(numbers[-1].sum()) <= most and _width(numbers[-1]) == r)
    return numbers


def _read(data: Bytes, *fields: tuple[int, int]) -> tuple[list[Places], Places]:
    """The fields, each given by its length and width, and where the unary part has its ones."""
    sizes = [_bytes(count * width) for count, width in fields]
    total = sum(count for count, _ in fields)
    _must(total <= 8 * (len(data) - sum(sizes)))  # before anything that grows with it
    numbers = []
    for (count, width), size in zip(fields, sizes, strict=True):
        numbers.append(_read_field(data[:size], count, width))
        data = data[size:]
    ones = _read_ones(data, total)
    _must(8 * len(data) - int(ones[-1]) <= 8)
    return numbers, ones


def _read_field(data: Bytes, count: int, width: int) -> Places:
    numbers = np.zeros(count, np.int64)
    for first in range(0, count if width else 0, PIECE):
        piece = numbers[first : first + PIECE]
        raw = data[first * width // 8 :][: _bytes(len(piece) * width)]
        bits = np.unpackbits(raw, bitorder="little")
        _must(not bits[len(piece) * width :].any())
        for j, column in enumerate(bits[: len(piece) * width].reshape(-1, width).T):
            piece |= column.astype(np.int64) << j
    return numbers


def _read_ones(data: Bytes, count: int) -> Places:
    """Which bits are set, (count,): exactly that many."""
    ones, found = np.empty(count, np.int64), 0
    for first in range(0, len(data), PIECE):
        bits = np.unpackbits(data[first : first + PIECE], bitorder="little")
        places = np.flatnonzero(bits.view(bool))
        _must(found + len(places) <= count)
        np.add(places, 8 * first, out=ones[found : found + len(places)])
        found += len(places)
    _must(found == count)
    return ones


def _bytes(num_bits: int) -> int:
    return (num_bits + 7) // 8


def _must(holds: bool) -> None:
    if not holds:
        raise RemoteProtocolError("the places are not what their coding makes")
