"""What an update or a step carries: scalars, a sparse or dense vector, or scalars by block.

Each kind has a *spec*, which travels in the message body and declares the size of
the buffer before anything is encoded, and a value with numpy arrays.  ``encode``
makes one buffer from a value, ``decode`` refuses every buffer that ``encode`` could
not have made.  What the numbers mean is the method's business (``fedalgos``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocol import picks
from protocol.picks import Pick
from protocol.wire import MAX_ARRAY, RemoteProtocolError

Flat = npt.NDArray[np.float32]
Size = Annotated[int, Meta(ge=0, le=1 << 40)]
ClientId = Annotated[int, Meta(ge=0, lt=1_000_000)]
Scale = Annotated[float, Meta(ge=-1e30, le=1e30)]  # both bounds: refuses inf and NaN
F32 = np.dtype("<f4")
U32 = np.dtype("<u4")
F16 = np.dtype("<f2")
U16 = np.dtype("<u2")


class Run(Struct, frozen=True, array_like=True):
    """One client's consecutive scalars: ``count`` of them, each to be scaled by ``scale``.

    ``weight`` is the client's part in a mean over the runs.  ``picks`` says which directions
    they belong to, where these are not numbers 0 to ``count`` - 1 (``protocol.picks``).
    """

    client: ClientId
    count: Size
    scale: Scale = 1  # an int, which takes one byte on the wire
    weight: Annotated[float, Meta(gt=0, le=1e15)] = 1
    picks: Annotated[tuple[Pick, ...], Meta(max_length=MAX_ARRAY)] = ()

    def __post_init__(self) -> None:
        if why := picks.fault(self.picks, self.count):
            raise ValueError(why)

    def numbers(self) -> list[int]:
        """Of the directions, one for each scalar."""
        return picks.unpack(self.picks, self.count)


class ScalarsSpec(Struct, frozen=True, tag="scalars", tag_field="kind"):
    """4 bytes each; the directions they belong to have a number and are never sent."""

    runs: Annotated[tuple[Run, ...], Meta(max_length=MAX_ARRAY)]

    @property
    def nbytes(self) -> int:
        return 4 * sum(run.count for run in self.runs)


class SparseSpec(Struct, frozen=True, tag="sparse", tag_field="kind"):
    """``count`` of ``size`` entries: their values, then their places."""

    size: Size
    count: Size
    places: Literal["bitmap", "u32"]

    @property
    def nbytes(self) -> int:
        return 4 * self.count + _places_nbytes(self.places, self.size, self.count)


class DenseSpec(Struct, frozen=True, tag="dense", tag_field="kind"):
    """``count`` values: all the trained parameters, or those of the ``units`` in order."""

    count: Size
    units: Annotated[tuple[Size, ...], Meta(max_length=MAX_ARRAY)] = ()

    @property
    def nbytes(self) -> int:
        return 4 * self.count


class BlocksSpec(Struct, frozen=True, tag="blocks", tag_field="kind"):
    """``count`` coefficients in ``blocks`` runs: the runs' lengths in 16 bits, then the values.

    With "f16" a value is its 16 bits times 2 to the ``exponent``.
    """

    blocks: Size
    count: Size
    coding: Literal["f32", "f16"] = "f32"
    exponent: Annotated[int, Meta(ge=-100, le=100)] = 0

    @property
    def nbytes(self) -> int:
        return 2 * self.blocks + (2 if self.coding == "f16" else 4) * self.count


Spec = ScalarsSpec | SparseSpec | DenseSpec | BlocksSpec


@dataclass(frozen=True, slots=True)
class Scalars:
    """values: (sum of the runs' counts,) float32, run after run."""

    runs: tuple[Run, ...]
    values: Flat


@dataclass(frozen=True, slots=True)
class Sparse:
    """places: (count,) increasing indices below ``size``; values: (count,) float32."""

    size: int
    places: npt.NDArray[np.int64]
    values: Flat

    def dense(self) -> Flat:
        """The vector with zeros filled in, (size,)."""
        out = np.zeros(self.size, F32)
        out[self.places] = self.values
        return out


@dataclass(frozen=True, slots=True)
class Dense:
    """values: (count,) float32; ``units`` empty means every unit."""

    values: Flat
    units: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """counts: (blocks,) below 65,536; values: (their sum,) float32, block after block.

    With ``coding`` "f16" the values are multiples that 16 bits can hold: see ``of``.
    """

    counts: npt.NDArray[np.int64]
    values: Flat
    coding: Literal["f32", "f16"] = "f32"
    exponent: int = 0

    @staticmethod
    def of(counts: npt.NDArray[np.int64], values: Flat, coding: Literal["f32", "f16"]) -> Blocks:
        """Round the values to what the coding can carry; the largest sets the exponent."""
        if coding == "f32":
            return Blocks(counts, values)
        largest = float(np.abs(values).max(initial=0.0))
        if not np.isfinite(largest):
            return Blocks(counts, values, coding)  # refused at the other side, as it is
        exponent = int(np.clip(np.frexp(largest)[1] - 15, -100, 100))  # up to 2^15: half's range
        scale = np.float32(2.0**exponent)  # a power of two: scaling is exact
        with np.errstate(over="ignore"):  # what does not fit becomes inf and is refused as such
            rounded = (values / scale).astype(F16).astype(F32) * scale
        return Blocks(counts, rounded, coding, exponent)


Payload = Scalars | Sparse | Dense | Blocks


def spec_of(payload: Payload) -> Spec:
    """The wire description, which knows the encoded size without encoding."""
    match payload:
        case Scalars(runs=runs):
            return ScalarsSpec(runs)
        case Sparse(size=size, places=places):
            count = len(places)
            fits = size <= 1 << 32  # a place in 32 bits
            wins = _places_nbytes("u32", size, count) < _places_nbytes("bitmap", size, count)
            return SparseSpec(size, count, "u32" if fits and wins else "bitmap")
        case Dense(values=values, units=units):
            return DenseSpec(len(values), units)
        case Blocks(counts=counts, values=values, coding=coding, exponent=exponent):
            return BlocksSpec(len(counts), len(values), coding, exponent)


def encode(payload: Payload) -> memoryview:
    """The payload as one buffer of ``spec_of(payload).nbytes`` bytes."""
    values = np.ascontiguousarray(payload.values, F32)
    if isinstance(payload, Sparse):
        if spec_of(payload).places == "bitmap":  # type: ignore[union-attr]
            mask = np.zeros(payload.size, bool)
            mask[payload.places] = True
            places = np.packbits(mask, bitorder="little").tobytes()
        else:
            places = payload.places.astype(U32).tobytes()
        return memoryview(values.tobytes() + places)
    if isinstance(payload, Blocks):
        if payload.coding == "f16":
            values = (values / np.float32(2.0**payload.exponent)).astype(F16)
        return memoryview(payload.counts.astype(U16).tobytes() + values.tobytes())
    return values.data.cast("B")


def decode(spec: Spec, buffer: bytes | memoryview) -> Payload:
    """The value a buffer stands for; a dense one shares the buffer's memory.

    Raises:
        RemoteProtocolError: wrong size, a value that is not finite, places that are not
            strictly increasing indices below the size, or blocks that do not add up.
    """
    if len(buffer) != spec.nbytes:
        raise RemoteProtocolError(f"payload of {len(buffer)} bytes, spec says {spec.nbytes}")
    match spec:
        case ScalarsSpec(runs=runs):
            return Scalars(runs, _finite(np.frombuffer(buffer, F32)))
        case DenseSpec(units=units):
            return Dense(_finite(np.frombuffer(buffer, F32)), units)
        case SparseSpec(size=size, count=count, places=coding):
            values = _finite(np.frombuffer(buffer, F32, count))
            return Sparse(size, _places(coding, size, count, buffer[4 * count :]), values)
        case BlocksSpec(blocks=blocks, count=count, coding=width, exponent=exponent):
            counts = np.frombuffer(buffer, U16, blocks).astype(np.int64)
            if int(counts.sum()) != count:
                raise RemoteProtocolError(f"blocks of {counts.sum()} values in all, not {count}")
            if width == "f32":
                if exponent:
                    raise RemoteProtocolError("an exponent with values in full precision")
                return Blocks(counts, _finite(np.frombuffer(buffer, F32, count, 2 * blocks)))
            raw = _finite(np.frombuffer(buffer, F16, count, 2 * blocks))
            return Blocks(counts, raw.astype(F32) * np.float32(2.0**exponent), width, exponent)


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One NaN in an accumulator destroys every replica for ever."""
    if not np.isfinite(values).all():
        raise RemoteProtocolError("a value of the payload is not finite")
    return values


def _places_nbytes(coding: str, size: int, count: int) -> int:
    return (size + 7) // 8 if coding == "bitmap" else 4 * count


def _places(
    coding: str, size: int, count: int, buffer: bytes | memoryview
) -> npt.NDArray[np.int64]:
    if coding == "bitmap":
        bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
        if bits[size:].any():
            raise RemoteProtocolError("a place of the payload is beyond its size")
        places = np.flatnonzero(bits[:size]).astype(np.int64)
        if len(places) != count:
            raise RemoteProtocolError(f"the payload has {len(places)} places for {count} values")
        return places
    places = np.frombuffer(buffer, U32).astype(np.int64)
    if count and (places[-1] >= size or (np.diff(places) <= 0).any()):
        raise RemoteProtocolError("the payload's places do not increase, or pass its size")
    return places
