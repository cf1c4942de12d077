"""Reading: the columns of the files, or of the hub set, that a data id stands for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from node import sources
from protocol.errors import DataError
from protocol.experiment import Data, Partition

_HEADER_LINES = {".tab": 3}  # Orange: names, types, flags
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Columns:
    """One split as it was read: values may still be missing."""

    source: str
    texts: list[str | None]
    labels: list[Any]
    owners: list[Any] | None  # values of the natural column
    names: tuple[str, ...] = ()  # of the classes, where the source declares them

    def keep(self, rows: Sequence[int], labels: list[Any]) -> Columns:
        texts = [self.texts[i] for i in rows]
        owners = None if self.owners is None else [self.owners[i] for i in rows]
        return Columns(self.source, texts, labels, owners, self.names)


def read(data: Data, partition: Partition) -> list[Columns]:
    """The training split and, if the source has one, the test split.

    Raises:
        DataError: the source or a column is missing.
    """
    wanted = [data.text, data.label]
    if partition.kind == "natural":
        wanted.append(partition.column)
    table = sources.resolve_data(data.id)
    if isinstance(table, str):
        return _read_hub(table, wanted)
    paths = [table.train] if table.test is None else [table.train, table.test]
    # The natural column is asked of the training file alone.
    return [read_file(path, table.columns, wanted[: 2 if i else 3]) for i, path in enumerate(paths)]


def read_file(path: Path, columns: tuple[str, ...], wanted: list[str]) -> Columns:
    """Read the wanted columns: text, label, and perhaps the natural one.

    Args:
        path: the file; its suffix says of which kind it is.
        columns: names for a delimited file that has no header line.
        wanted: column names, in that order.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
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


def _read_hub(name: str, wanted: list[str]) -> list[Columns]:
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
    read: list[Columns] = []
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
def _without_progress() -> Iterator[None]:
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
) -> Columns:
    text, label, *owner = wanted
    return Columns(source, values[text], values[label], values[owner[0]] if owner else None, names)
