"""What a message says of its payload before the bytes come: its kind, and so its size.

A *spec* travels in the message's body.  The values that the bytes stand for, and how they
are written, are ``protocol.payload``, which has these names, too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocol import picks, values
from protocol.picks import Pick
from protocol.values import Coding
from protocol.wire import MAX_ARRAY

Size = Annotated[int, Meta(ge=0, le=1 << 40)]
ClientId = Annotated[int, Meta(ge=0, lt=1_000_000)]
Scale = Annotated[float, Meta(ge=-1e30, le=1e30)]  # both bounds: refuses inf and NaN


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


class SparseSpec(Struct, frozen=True, omit_defaults=True, tag="sparse", tag_field="kind"):
    """``count`` of ``size`` entries: their values, then ``place_nbytes`` that say where."""

    size: Size
    count: Size
    place_nbytes: Size
    coding: Coding = "f32"

    @property
    def nbytes(self) -> int:
        return values.nbytes(self.coding, self.count) + self.place_nbytes


class DenseSpec(Struct, frozen=True, tag="dense", tag_field="kind"):
    """``count`` values: all the trained parameters, or those of the ``units`` in order."""

    count: Size
    units: Annotated[tuple[Size, ...], Meta(max_length=MAX_ARRAY)] = ()

    @property
    def nbytes(self) -> int:
        return 4 * self.count


class BlocksSpec(Struct, frozen=True, omit_defaults=True, tag="blocks", tag_field="kind"):
    """``count`` coefficients in ``blocks`` runs: the runs' lengths in 16 bits, then the values."""

    blocks: Size
    count: Size
    coding: Literal["f32", "f16"] = "f32"

    @property
    def nbytes(self) -> int:
        return 2 * self.blocks + values.nbytes(self.coding, self.count)


Spec = ScalarsSpec | SparseSpec | DenseSpec | BlocksSpec
