"""What an update or a step carries: scalars, a sparse or dense vector, or scalars by block.

Each kind has a *spec* (``protocol.specs``), which travels in the message's body and
declares the size of the buffer before anything is encoded, and a value with numpy arrays.
``encode`` makes one buffer from a value, ``decode`` refuses every buffer that ``encode``
could not have made.  What the numbers mean is the method's business (``fedalgos``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from protocol import places, values
from protocol.places import Places
from protocol.specs import (
    BlocksSpec,
    ClientId,
    DenseSpec,
    Run,
    ScalarsSpec,
    Size,
    SparseSpec,
    Spec,
)
from protocol.values import Coding, Flat, Frame
from protocol.wire import RemoteProtocolError

__all__ = [
    "Blocks",
    "BlocksSpec",
    "ClientId",
    "Dense",
    "DenseSpec",
    "Flat",
    "Payload",
    "Run",
    "Scalars",
    "ScalarsSpec",
    "Size",
    "Sparse",
    "SparseSpec",
    "Spec",
    "decode",
    "encode",
    "spec_of",
]

F32 = np.dtype("<f4")
U16 = np.dtype("<u2")
ANY_KEY = 0  # what was rounded before comes out the same under every key


@dataclass(frozen=True, slots=True)
class Scalars:
    """values: (sum of the runs' counts,) float32, run after run."""

    runs: tuple[Run, ...]
    values: Flat


@dataclass(frozen=True, slots=True)
class Sparse:
    """places: (count,) increasing indices below ``size``; values: (count,) float32.

    With another ``coding`` than "f32" they are values that it can carry: see ``of``.
    """

    size: int
    places: Places
    values: Flat
    coding: Coding = "f32"

    @staticmethod
    def of(size: int, places: Places, values: Flat, coding: Coding, key: int) -> Sparse:
        """Round the values to what the receiver will have, so that the sender has the same.

        Args:
            size: of the whole vector.
            places: of the entries.
            values: not finite ones stay as they are, for the sender to find.
            coding: how they will be written.
            key: of the stream that says what int8 rounds up and what down.
        """
        return Sparse(size, places, _rounded(coding, values, key), coding)

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

    With ``coding`` "f16" they are values that it can carry: see ``of``.
    """

    counts: npt.NDArray[np.int64]
    values: Flat
    coding: Literal["f32", "f16"] = "f32"

    @staticmethod
    def of(counts: npt.NDArray[np.int64], values: Flat, coding: Literal["f32", "f16"]) -> Blocks:
        """Round the values to what the receiver will have; not finite ones stay as they are."""
        return Blocks(counts, _rounded(coding, values, ANY_KEY), coding)


Payload = Scalars | Sparse | Dense | Blocks


def _rounded(coding: Coding, x: Flat, key: int) -> Flat:
    return values.rounded(coding, x, key) if np.isfinite(x).all() else x


def spec_of(payload: Payload) -> Spec:
    """The wire description, which knows the encoded size without encoding.

    Raises:
        LocalProtocolError: sparse, and the places do not increase to below the size.
    """
    match payload:
        case Scalars(runs=runs):
            return ScalarsSpec(runs)
        case Sparse(size=size, places=where, coding=coding):
            _, place_nbytes = places.nbytes(size, where)
            return SparseSpec(size, len(where), place_nbytes, coding)
        case Dense(values=x, units=units):
            return DenseSpec(len(x), units)
        case Blocks(counts=counts, values=x, coding=width):
            return BlocksSpec(len(counts), len(x), width)


def encode(payload: Payload) -> memoryview:
    """The payload as one buffer of ``spec_of(payload).nbytes`` bytes.

    Raises:
        LocalProtocolError: as there.
        ArithmeticError: sparse or blocks, and a value is not finite; the other kinds share
            their memory, and are looked at by who made them and who decodes them.
    """
    match payload:
        case Sparse(size=size, places=where, values=x, coding=coding):
            return memoryview(values.encode(coding, x, ANY_KEY) + places.encode(size, where))
        case Blocks(counts=counts, values=x, coding=width):
            return memoryview(counts.astype(U16).tobytes() + values.encode(width, x, ANY_KEY))
        case Scalars(values=x) | Dense(values=x):
            return np.ascontiguousarray(x, F32).data.cast("B")


def decode(spec: Spec, buffer: Frame) -> Payload:
    """The value that a buffer stands for; values in full precision share its memory.

    Memory beyond it is bounded by the buffer's size, times a constant, whatever the spec says.

    Raises:
        RemoteProtocolError: ``encode`` makes no such buffer of any payload with this spec.
    """
    if len(buffer) != spec.nbytes:
        raise RemoteProtocolError(f"payload of {len(buffer)} bytes, spec says {spec.nbytes}")
    data = memoryview(buffer)
    match spec:
        case ScalarsSpec(runs=runs):
            return Scalars(runs, values.decode("f32", len(data) // 4, data))
        case DenseSpec(count=count, units=units):
            return Dense(values.decode("f32", count, data), units)
        case SparseSpec(size=size, count=count, place_nbytes=place_nbytes, coding=coding):
            cut = len(data) - place_nbytes
            x = values.decode(coding, count, data[:cut])
            return Sparse(size, _places(size, count, data[cut:]), x, coding)
        case BlocksSpec(blocks=blocks, count=count, coding=width):
            counts = np.frombuffer(data, U16, blocks).astype(np.int64)
            if int(counts.sum()) != count:
                raise RemoteProtocolError(f"blocks of {counts.sum()} values in all, not {count}")
            return Blocks(counts, values.decode(width, count, data[2 * blocks :]), width)


def _places(size: int, count: int, data: Frame) -> Places:
    """Places as they are written, which must be as short as can be: so in one way only."""
    where = places.decode(size, count, data)
    coding, _ = places.nbytes(size, where)
    if places.CODINGS[data[0]] != coding:
        raise RemoteProtocolError(f"{count} places below {size} are to be sent as {coding}")
    return where
