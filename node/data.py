"""Examples: from an experiment's ``[data]`` and ``[partition]`` to each client's shard.

Plain data, no torch.  Everything here is a function of its arguments, so each node
works out its own shards and no example ever crosses the wire: the same file, the same
package version, the same shards.

What is dropped: rows whose text is empty, and with ``margin`` the ratings too close
to the border.  A row without a label is refused by its number, because to guess there
would change the task without a word.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from node import sources
from protocol.errors import DataError
from protocol.experiment import Data, Partition

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = npt.NDArray[np.int64]

_REDRAWS = 20  # of 11 draws each, before a Dirichlet split is called impossible
_MAX_CLASSES = 1000
_HEADER_LINES = {".tab": 3}  # Orange: names, types, flags
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Examples:
    """Texts and class numbers, row by row."""

    texts: list[str]
    labels: Indices

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Indices) -> Examples:
        """These rows, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples([self.texts[i] for i in chosen], self.labels[chosen])


@dataclass(frozen=True)
class Shards:
    """Training examples of the clients that were asked for, and the common test set."""

    train: dict[int, Examples]
    test: Examples
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Columns:
    """One split as it was read: values may still be missing."""

    source: str
    texts: list[str | None]
    labels: list[Any]
    owners: list[Any] | None  # values of the natural column
    names: tuple[str, ...] = ()  # of the classes, where the source declares them

    def keep(self, rows: Sequence[int], labels: list[Any]) -> _Columns:
        texts = [self.texts[i] for i in rows]
        owners = None if self.owners is None else [self.owners[i] for i in rows]
        return _Columns(self.source, texts, labels, owners, self.names)


def load(data: Data, partition: Partition, clients: Collection[int]) -> Shards:
    """Read, clean, split and deal out the examples.

    Only the shards of ``clients``, numbers from 0, come back; a shard does not depend on
    which others were asked for.

    Raises:
        DataError: the source, a column or a label is missing, or the split is
            impossible.
    """
    splits = [_clean(split, data) for split in _read(data, partition)]
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
    dealt = _deal(
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


def _examples(split: _Columns, labels: Indices) -> Examples:
    return Examples([str(text) for text in split.texts], labels)


# Reading


def _read(data: Data, partition: Partition) -> list[_Columns]:
    """The training split and, if the source has one, the test split."""
    wanted = [data.text, data.label]
    if partition.kind == "natural":
        wanted.append(partition.column)
    table = sources.resolve_data(data.id)
    if isinstance(table, str):
        return _read_hub(table, wanted)
    paths = [table.train] if table.test is None else [table.train, table.test]
    # The natural column is asked of the training file alone.
    return [
        _read_file(path, table.columns, wanted[: 2 if i else 3]) for i, path in enumerate(paths)
    ]


def _read_file(path: Path, columns: tuple[str, ...], wanted: list[str]) -> _Columns:
    try:
        if path.suffix == ".parquet":
            _require(path.name, pyarrow.parquet.read_schema(path).names, wanted)
            table = pyarrow.parquet.read_table(path, columns=list(dict.fromkeys(wanted)))
        elif path.suffix == ".jsonl":
            table = pyarrow.json.read_json(path)
        else:
            table = _read_delimited(path, columns, wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {sources.first_line(error)}") from error
    _require(path.name, table.column_names, wanted)
    return _columns(path.name, {name: table.column(name).to_pylist() for name in wanted}, wanted)


def _read_delimited(path: Path, columns: tuple[str, ...], wanted: list[str]) -> pa.Table:
    """Read CSV, TSV and Orange's .tab, every column as text.

    Arrow guesses types from the first block and fails when a later one differs; we
    decide from the whole column whether labels are numbers.
    """
    read = pyarrow.csv.ReadOptions(
        column_names=list(columns) or None,
        skip_rows_after_names=_HEADER_LINES.get(path.suffix, 1) - 1,
    )
    parse = pyarrow.csv.ParseOptions(
        delimiter=_DELIMITERS[path.suffix],
        quote_char=False if columns else '"',
        newlines_in_values=not columns,
    )
    with pyarrow.csv.open_csv(path, read, parse) as reader:
        names = reader.schema.names
    _require(path.name, names, wanted)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(dict.fromkeys(wanted)),
        column_types={name: pa.string() for name in wanted},
    )
    return pyarrow.csv.read_csv(path, read, parse, convert)


def _read_hub(name: str, wanted: list[str]) -> list[_Columns]:
    """``owner/name``, or ``owner/name:config`` for a set with several configurations."""
    import datasets

    path, _, config = name.partition(":")
    try:
        with _without_progress():
            splits = datasets.load_dataset(path, config or None)
    except Exception as error:
        # Whatever the hub's client, its cache or a malformed file raised: to the user
        # it is one thing, and its first line says which.
        why = sources.first_line(error)
        raise DataError(f"{name}: no such file, and not to be had from the hub: {why}") from error
    if "train" not in splits:
        raise DataError(f"{name} has no split 'train'; it has {', '.join(splits)}")
    read: list[_Columns] = []
    for split in ("train", "test", "validation"):
        if split not in splits or len(read) == 2:
            continue
        table = splits[split]
        columns = wanted[: 2 if read else 3]
        _require(f"{name} ({split})", table.column_names, columns)
        values = {column: list(table[column]) for column in columns}
        # A test split whose labels are withheld has -1 everywhere, as in GLUE.
        if read and all(label == -1 for label in values[columns[1]]):
            continue
        names = tuple(getattr(table.features[columns[1]], "names", ()))
        read.append(_columns(f"{name} ({split})", values, columns, names))
    return read


@contextlib.contextmanager
def _without_progress() -> Any:
    """No bars on stderr; what was set before is set again."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def _require(source: str, present: Sequence[str], wanted: list[str]) -> None:
    for column in wanted:
        if column not in present:
            raise DataError(f"{source} has no column {column!r}; it has {', '.join(present)}")


def _columns(
    source: str, values: dict[str, list[Any]], wanted: list[str], names: tuple[str, ...] = ()
) -> _Columns:
    text, label, *owner = wanted
    return _Columns(source, values[text], values[label], values[owner[0]] if owner else None, names)


# Cleaning


def _clean(split: _Columns, data: Data) -> _Columns:
    """Drop what has no text, refuse what has no label, and apply ``binarise_at``."""
    rows = [i for i, text in enumerate(split.texts) if text is not None and str(text).strip()]
    for i in rows:
        if _is_missing(split.labels[i]):
            raise DataError(f"{split.source}: row {i + 1} has no value for {data.label!r}")
        if split.owners is not None and _is_missing(split.owners[i]):
            raise DataError(f"{split.source}: row {i + 1} has no value in the partition column")
    labels = _numbers([split.labels[i] for i in rows])
    if data.binarise_at is None:
        return split.keep(rows, labels)
    at = data.binarise_at
    for i, label in zip(rows, labels, strict=True):
        if not isinstance(label, int | float):
            raise DataError(
                f"{split.source}: row {i + 1}: data.binarise_at needs numbers in "
                f"{data.label!r}, found {label!r}"
            )
    kept = [
        (i, int(y > at)) for i, y in zip(rows, labels, strict=True) if abs(y - at) >= data.margin
    ]
    return split.keep([i for i, _ in kept], [y for _, y in kept])


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


def _encode(splits: list[_Columns]) -> tuple[tuple[str, ...], list[Indices]]:
    """Number the classes of all splits together, so that limits do not change them."""
    values = set().union(*(split.labels for split in splits))
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
    coded = [np.array([number[y] for y in s.labels], dtype=np.int64) for s in splits]
    return names or tuple(str(value) for value in ordered), coded


# Dealing out


def _deal(
    labels: Indices, owners: list[str] | None, partition: Partition, clients: Collection[int]
) -> dict[int, Indices]:
    """Row numbers of each client asked for."""
    if partition.kind != "natural" and len(labels) < partition.clients:
        raise DataError(
            f"{len(labels)} training examples are too few for partition.clients {partition.clients}"
        )
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their progress bar, and a page on each redraw
        shard, count = _partition(labels, owners, partition)
        if outside := [client for client in clients if not 0 <= client < count]:
            raise DataError(f"client {min(outside)} does not exist: there are {count}")
        dealt = {client: shard(client) for client in sorted(clients)}
    for client, rows in dealt.items():
        if len(rows) == 0:
            raise DataError(
                f"client {client} has no examples: lower partition.clients, or raise "
                "data.train or partition.alpha"
            )
    return dealt


def _partition(
    labels: Indices, owners: list[str] | None, partition: Partition
) -> tuple[Callable[[int], Indices], int]:
    """A function from client to row numbers, and how many clients there are."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when the package is imported
    import datasets
    from flwr_datasets import partitioner as flower

    def shares(dealer: Partitioner, order: Indices) -> Callable[[int], Indices]:
        columns: dict[str, Any] = {"row": order, "label": labels[order]}
        if owners is not None:
            columns["owner"] = [owners[i] for i in order]
        dealer.dataset = datasets.Dataset.from_dict(columns)
        return lambda client: np.array(dealer.load_partition(client)["row"], dtype=np.int64)

    count, rows = partition.clients, np.arange(len(labels))
    if partition.kind == "iid":
        # Flower cuts in order; the shuffle is ours, so that partition.seed counts.
        order = np.random.Generator(np.random.Philox(partition.seed)).permutation(len(labels))
        return shares(flower.IidPartitioner(count), order), count
    if partition.kind == "shard":
        dealer = flower.ShardPartitioner(
            count, "label", num_shards_per_partition=partition.shards, seed=partition.seed
        )
        if count * partition.shards > len(labels):
            raise DataError(
                f"{len(labels)} training examples do not fill {count} x {partition.shards} "
                "shards: lower partition.shards or partition.clients"
            )
        return shares(dealer, rows), count
    if partition.kind == "dirichlet":
        return _dirichlet(lambda dealer: shares(dealer, rows), partition), count
    return _natural(shares(flower.NaturalIdPartitioner("owner"), rows), owners or [], count)


def _dirichlet(
    shares: Callable[[Partitioner], Callable[[int], Indices]], partition: Partition
) -> Callable[[int], Indices]:
    """Flower gives up after 11 draws, which small alphas often need; then draw again."""
    from flwr_datasets.partitioner import DirichletPartitioner

    for attempt in range(_REDRAWS):
        words = np.random.SeedSequence([partition.seed, attempt]).generate_state(1)
        shard = shares(
            DirichletPartitioner(
                partition.clients,
                "label",
                partition.alpha,
                min_partition_size=partition.min_size,
                seed=int(words[0]) if attempt else partition.seed,
            )
        )
        with contextlib.suppress(ValueError):
            shard(0)
            return shard
    raise DataError(
        f"no Dirichlet split gives all {partition.clients} clients {partition.min_size} examples: "
        "raise partition.alpha, or lower partition.min_size or partition.clients"
    )


def _natural(
    shard: Callable[[int], Indices], owners: list[str], count: int
) -> tuple[Callable[[int], Indices], int]:
    """The ``count`` owners with the most examples, ties by id; 0 takes all."""
    names, sizes = np.unique(np.array(owners), return_counts=True)
    if count > len(names):
        raise DataError(
            f"the partition column has {len(names)} values among the training examples, "
            f"fewer than partition.clients {count}"
        )
    # Flower numbers owners in sorted order, as np.unique does.
    largest = sorted(range(len(names)), key=lambda i: (-sizes[i], i))
    return lambda client: shard(largest[client]), count or len(names)
