"""Examples as numbers: a tokenised shard, and the batches gathered from it.

A shard is tokenised once, into ``Tokens``; batches are gathered from it by row number
and padded to their own longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Rows = Sequence[npt.NDArray[np.int32] | Sequence[int]]


@dataclass(frozen=True)
class Tokens:
    """A tokenised shard: rows end to end, so that it costs 4 bytes a token.

    Attributes:
        labels: what a task knows of each row besides: the number of its class, or where
            in the row its answer begins.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]  # (rows + 1,)
    labels: npt.NDArray[np.int64]  # (rows,)

    @staticmethod
    def of(rows: Sequence[Sequence[int]], labels: npt.NDArray[np.int64]) -> Tokens:
        """Join rows, which may differ in length."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(starts[-1]))
        return Tokens(ids, starts, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> npt.NDArray[np.int32]:
        return self.ids[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Batch:
    """Rows on the device: the model's inputs by name, and what is to be predicted.

    Attributes:
        labels: class numbers (n,), or the next token at each place (n, length).
        counts: how many predictions each row is scored on; empty means one each.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    counts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def weight(self) -> int:
        """What a mean over this batch is a mean of: how many predictions are scored."""
        return sum(self.counts) if self.counts else len(self)

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in batches of ``size`` rows, the last one perhaps less, in order.

        A loss of the whole is the mean of the parts' losses by their weights.
        """
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows, as they are padded here."""
        rows = slice(start, stop)
        inputs = {k: v[rows] if torch.is_tensor(v) else v for k, v in self.inputs.items()}
        return Batch(inputs, self.labels[rows], self.counts[rows])

    def shares(self, size: int) -> Iterator[tuple[Batch, float]]:
        """Micro-batches of ``size`` rows, 0 for all, each with its share of the whole's weight."""
        if not size or len(self) <= size:
            yield self, 1.0
            return
        for part in self.parts(size):
            yield part, part.weight / self.weight


def pad(rows: Rows, filler: int, *, left: bool = False) -> npt.NDArray[np.int64]:
    """(n, length): rows filled up to the longest, on the right or on the left."""
    width = max(len(row) for row in rows)
    out = np.full((len(rows), width), filler, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, slice(width - len(row), width) if left else slice(len(row))] = row
    return out


def padded(rows: Rows, filler: int, *, left: bool = False) -> dict[str, npt.NDArray[np.int64]]:
    """``input_ids``, and the ``attention_mask`` that says which of them are no filler."""
    mask = pad([np.ones(len(row), dtype=np.int32) for row in rows], 0, left=left)
    return {"input_ids": pad(rows, filler, left=left), "attention_mask": mask}


def positions(mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Absolute positions that count from the first real token, not from the padding."""
    counted: npt.NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return counted
