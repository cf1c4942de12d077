"""Examples: from an experiment's ``[data]`` and ``[partition]`` to each client's shard.

Plain data, no torch.  Everything here is a function of its arguments, so each node
works out its own shards and no example ever crosses the wire: the same file, the same
package version, the same shards.

What is dropped: rows whose text is empty, and with ``margin`` the ratings too close
to the border.  A row without a label is refused by its number, because to guess there
would change the task without a word.  A causal task has no labels; they are read only if
the examples are dealt by them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from node import tables
from node.partition import Indices, deal
from node.tables import Columns
from protocol.errors import DataError
from protocol.experiment import Data, Partition

_MAX_CLASSES = 1000


@dataclass(frozen=True)
class Examples:
    """Texts and class numbers, row by row; prompts if the task has them.

    Without labels all class numbers are 0.
    """

    texts: list[str]
    labels: Indices
    prompts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Indices) -> Examples:
        """These rows, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        prompts = [self.prompts[i] for i in chosen] if self.prompts else []
        return Examples([self.texts[i] for i in chosen], self.labels[chosen], prompts)


@dataclass(frozen=True)
class Shards:
    """Training examples of the clients that were asked for, and the common test set."""

    train: dict[int, Examples]
    test: Examples
    classes: tuple[str, ...]


def load(data: Data, partition: Partition, clients: Collection[int]) -> Shards:
    """Read, clean, split and deal out the examples.

    Only the shards of ``clients``, numbers from 0, come back; a shard does not depend on
    which others were asked for.

    Raises:
        DataError: the source, a column or a label is missing, or the split is
            impossible.
    """
    splits = [_clean(split, data) for split in tables.read(data, partition)]
    classes, coded = _encode(splits)
    rng = np.random.Generator(np.random.Philox(data.seed))
    orders = [rng.permutation(len(labels)) for labels in coded]
    if len(splits) == 1:
        train_rows, test_rows = _hold_out(orders[0], data)
    else:
        train_rows, test_rows = orders
    train_rows = train_rows[: data.train or None]
    test_rows = test_rows[: data.test or None]
    owners = splits[0].owners
    dealt = deal(
        coded[0][train_rows],
        None if owners is None else [str(owners[i]) for i in train_rows],
        partition,
        clients,
    )
    pool = _examples(splits[0], coded[0])
    return Shards(
        train={client: pool.take(train_rows[rows]) for client, rows in dealt.items()},
        test=_examples(splits[-1], coded[-1]).take(test_rows),
        classes=classes,
    )


def _hold_out(order: Indices, data: Data) -> tuple[Indices, Indices]:
    if data.test == 0:
        raise DataError(f"{data.id} has no test split: set data.test to hold examples out")
    if data.test >= len(order):
        raise DataError(
            f"data.test {data.test} leaves nothing of {len(order)} examples to train on"
        )
    return order[data.test :], order[: data.test]


def _examples(split: Columns, labels: Indices) -> Examples:
    prompts = ["" if _is_missing(prompt) else str(prompt) for prompt in split.prompts or []]
    return Examples([str(text) for text in split.texts], labels, prompts)


# Cleaning


def _clean(split: Columns, data: Data) -> Columns:
    """Drop what has no text, refuse what has no label, and apply ``binarise_at``."""
    rows = [i for i, text in enumerate(split.texts) if text is not None and str(text).strip()]
    for i in rows:
        if split.labels is not None and _is_missing(split.labels[i]):
            raise DataError(f"{split.source}: row {i + 1} has no value for {data.label!r}")
        if split.owners is not None and _is_missing(split.owners[i]):
            raise DataError(f"{split.source}: row {i + 1} has no value in the partition column")
    kept = split.keep(rows)
    if kept.labels is None:
        return kept
    labels = _numbers(kept.labels)
    if data.binarise_at is None:
        return replace(kept, labels=labels)
    return _binarised(replace(kept, labels=labels), rows, data.binarise_at, data)


def _binarised(split: Columns, rows: list[int], at: float, data: Data) -> Columns:
    """Classes 0 and 1 of numbers, without those close to the border."""
    labels = split.labels or []
    for i, label in zip(rows, labels, strict=True):
        if not isinstance(label, int | float):
            raise DataError(
                f"{split.source}: row {i + 1}: data.binarise_at needs numbers in "
                f"{data.label!r}, found {label!r}"
            )
    far = split.keep([i for i, y in enumerate(labels) if abs(y - at) >= data.margin])
    return replace(far, labels=[int(y > at) for y in far.labels or []])


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _numbers(values: list[Any]) -> list[Any]:
    """The values as numbers if every one of them is a number, else as they are."""
    if any(isinstance(value, bool) for value in values):
        return [str(value) for value in values]
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return [str(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        return [str(value) for value in values]
    return [int(x) if x.is_integer() else x for x in numbers]


def _encode(splits: list[Columns]) -> tuple[tuple[str, ...], list[Indices]]:
    """Number the classes of all splits together, so that limits do not change them."""
    if splits[0].labels is None:
        return (), [np.zeros(len(split.texts), dtype=np.int64) for split in splits]
    columns = [split.labels or [] for split in splits]
    values = set().union(*columns)
    source = splits[0].source
    if any(isinstance(value, float) for value in values):
        raise DataError(f"{source}: labels are fractions; set data.binarise_at to make two classes")
    if names := splits[0].names:
        ordered: list[Any] = list(range(len(names)))
        if stray := values - set(ordered):
            raise DataError(f"{source}: label {min(stray)} is none of the {len(names)} classes")
    else:
        # One split may read as numbers and the other as text: then all are text.
        mixed = len({type(value) for value in values}) > 1
        ordered = sorted(values, key=str if mixed else None)
    if not 2 <= len(ordered) <= _MAX_CLASSES:
        raise DataError(f"{source}: {len(ordered)} classes; want 2 to {_MAX_CLASSES}")
    number = {value: i for i, value in enumerate(ordered)}
    coded = [np.array([number[y] for y in labels], dtype=np.int64) for labels in columns]
    return names or tuple(str(value) for value in ordered), coded
