"""``ParamSpace``: the trained tensors as one flat fp32 vector, cut into units."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from protocol.parts import TensorInfo
from protocol.payload import Flat

PIECE = 1 << 14  # numbers that are worked on at once: what lies between stays in the cache


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of tensors that a method hands out together, e.g. a LoRA pair or the head."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ParamSpace:
    """Names, shapes and places of the trained tensors, in a fixed order.

    Attributes:
        tensors: name, shape and unit of each; those of one unit stand together.
        offsets: (len(tensors) + 1,) places in the flat vector; the last is its size.
        units: the runs of the flat vector that belong together.
    """

    tensors: tuple[TensorInfo, ...]
    offsets: tuple[int, ...]
    units: tuple[Unit, ...]

    @staticmethod
    def of(tensors: Sequence[TensorInfo]) -> ParamSpace:
        """Lay the tensors out in order.

        Raises:
            ValueError: no tensors, two of one name, or a unit whose tensors do not stand
                together.
        """
        if not tensors:
            raise ValueError("no tensor is trained")
        if twice := [name for name, n in Counter(t.name for t in tensors).items() if n > 1]:
            raise ValueError(f"two tensors are named {twice[0]}")
        sizes = (math.prod(t.shape) for t in tensors)
        offsets = tuple(itertools.accumulate(sizes, initial=0))
        spans: dict[str, tuple[int, int]] = {}
        for info, start, stop in zip(tensors, offsets, offsets[1:], strict=False):
            first, last = spans.get(info.unit, (start, start))
            if last != start:
                raise ValueError(f"unit {info.unit} is scattered")
            spans[info.unit] = (first, stop)
        units = tuple(Unit(name, *span) for name, span in spans.items())
        return ParamSpace(tuple(tensors), offsets, units)

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return self.offsets[-1]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that two sides compare before they exchange flat vectors."""
        return hashlib.blake2b(msgspec.json.encode(self.tensors), digest_size=16).digest()

    def ranges(self, units: Sequence[int] = ()) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the units, or of everything when none are named."""
        if not units:
            return ((0, self.size),)
        return tuple((self.units[u].start, self.units[u].stop) for u in units)

    def count(self, units: Sequence[int] = ()) -> int:
        """How many numbers the units hold."""
        return sum(stop - start for start, stop in self.ranges(units))

    def of_units(self, x: Flat, units: Sequence[int]) -> Flat:
        """The units' numbers in order; without units x itself, not a copy."""
        return self.take(x, units) if units else x

    def take(self, x: Flat, units: Sequence[int] = ()) -> Flat:
        """The units' numbers in order, a copy."""
        return np.concatenate([x[start:stop] for start, stop in self.ranges(units)])

    def put(self, x: Flat, values: Flat, units: Sequence[int] = ()) -> Flat:
        """A copy of ``x`` with the units' numbers replaced; of all units, it is ``values`` itself.

        But for one that must not be written to, which torch would not take.

        Raises:
            ValueError: more or fewer values than the units have.
        """
        if len(values) != self.count(units):
            raise ValueError(f"{len(values)} values for {self.count(units)} parameters")
        if not units:
            return np.require(values, requirements="W")
        out, at = x.copy(), 0
        for start, stop in self.ranges(units):
            out[start:stop] = values[at : at + stop - start]
            at += stop - start
        return out

    def named(self, x: Flat) -> Mapping[str, Flat]:
        """The tensors by name, views of ``x`` in their shapes."""
        places = zip(self.tensors, self.offsets, self.offsets[1:], strict=False)
        return {t.name: x[start:stop].reshape(t.shape) for t, start, stop in places}


def digest(x: Flat) -> bytes:
    """16 bytes over the parameters' own bits: replicas agree or they do not."""
    data = np.ascontiguousarray(x, "<f4")
    return hashlib.blake2b(data.data.cast("B"), digest_size=16).digest()


def pieces(size: int) -> Iterator[slice]:
    """A vector from its start to its end, for what is done to each number by itself."""
    return (slice(start, start + PIECE) for start in range(0, size, PIECE))
