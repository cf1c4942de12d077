"""Reading: the columns of the files, or of the hub set, that a data id stands for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from node import sources
from protocol.errors import DataError
from protocol.experiment import BY_LABEL, Data, Partition

_HEADER_LINES = {".tab": 3}  # Orange: names, types, flags
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Wanted:
    """Which columns are read, by name; None is not read.

    Attributes:
        use: what the label is for, where the task itself does without.
    """

    text: str
    label: str | None
    owner: str | None = None
    prompt: str | None = None
    use: str = ""

    @property
    def names(self) -> list[str]:
        """Each name once."""
        named = (self.text, self.label, self.owner, self.prompt)
        return list(dict.fromkeys(name for name in named if name is not None))


@dataclass(frozen=True)
class Columns:
    """One split as it was read: values may still be missing, and what was not wanted is None."""

    source: str
    texts: list[str | None]
    labels: list[Any] | None
    owners: list[Any] | None = None  # values of the natural column
    prompts: list[str | None] | None = None
    names: tuple[str, ...] = ()  # of the classes, where the source declares them

    def keep(self, rows: Sequence[int]) -> Columns:
        """These rows, in this order."""

        def kept(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in rows]

        return replace(
            self,
            texts=[self.texts[i] for i in rows],
            labels=kept(self.labels),
            owners=kept(self.owners),
            prompts=kept(self.prompts),
        )


def read(data: Data, partition: Partition) -> list[Columns]:
    """The training split and, if the source has one, the test split.

    Raises:
        DataError: the source or a column is missing.
    """
    is_causal = data.task == "causal"
    has_labels = not is_causal or partition.kind in BY_LABEL
    wanted = Wanted(
        text=data.text,
        label=data.label if has_labels else None,
        owner=partition.column if partition.kind == "natural" else None,
        prompt=data.prompt or None,
        use=f', by which partition.kind "{partition.kind}" deals' if is_causal else "",
    )
    table = sources.resolve_data(data.id)
    if isinstance(table, str):
        return _read_hub(table, wanted)
    paths = [table.train] if table.test is None else [table.train, table.test]
    # The natural column is asked of the training file alone.
    return [
        read_file(path, table.columns, replace(wanted, owner=None) if i else wanted)
        for i, path in enumerate(paths)
    ]


def read_file(path: Path, columns: tuple[str, ...], wanted: Wanted) -> Columns:
    """Read the wanted columns.

    Args:
        path: the file; its suffix says of which kind it is.
        columns: names for a delimited file that has no header line.
        wanted: column names.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    try:
        if path.suffix == ".parquet":
            _require(path.name, pyarrow.parquet.read_schema(path).names, wanted)
            table = pyarrow.parquet.read_table(path, columns=wanted.names)
        elif path.suffix == ".jsonl":
            table = pyarrow.json.read_json(path)
        else:
            table = _read_delimited(path, columns, wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {sources.first_line(error)}") from error
    _require(path.name, table.column_names, wanted)
    values = {name: table.column(name).to_pylist() for name in wanted.names}
    return _columns(path.name, values, wanted)


def _read_delimited(path: Path, columns: tuple[str, ...], wanted: Wanted) -> pa.Table:
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
        include_columns=wanted.names,
        column_types={name: pa.string() for name in wanted.names},
    )
    return pyarrow.csv.read_csv(path, read, parse, convert)


def _read_hub(name: str, wanted: Wanted) -> list[Columns]:
    splits = load_hub(name)
    if "train" not in splits:
        raise DataError(f"{name} has no split 'train'; it has {', '.join(splits)}")
    read: list[Columns] = []
    for split in ("train", "test", "validation"):
        if split not in splits or len(read) == 2:
            continue
        table = splits[split]
        columns = replace(wanted, owner=None) if read else wanted
        _require(f"{name} ({split})", table.column_names, columns)
        values = {column: list(table[column]) for column in columns.names}
        # A test split whose labels are withheld has -1 everywhere, as in GLUE.
        if read and wanted.label and all(label == -1 for label in values[wanted.label]):
            continue
        feature = table.features[wanted.label] if wanted.label else None
        names = tuple(getattr(feature, "names", ()))
        read.append(_columns(f"{name} ({split})", values, columns, names))
    return read


def load_hub(name: str) -> Any:
    """The splits of a hub set, of the copy that was pushed to this machine if there is one.

    Args:
        name: ``owner/name``, or ``owner/name:config`` for a set with several configurations.

    Raises:
        DataError: it is not to be had.
    """
    import datasets

    path, _, config = name.partition(":")
    try:
        with without_progress():
            if (pushed := sources.pushed(name)).is_dir():
                return datasets.load_from_disk(pushed)
            return datasets.load_dataset(path, config or None)
    except Exception as error:
        # Whatever the hub's client, its cache or a malformed file raised: to the user
        # it is one thing, and its first line says which.
        why = sources.first_line(error)
        raise DataError(f"{name}: no such file, and not to be had from the hub: {why}") from error


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
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


def _require(source: str, present: Sequence[str], wanted: Wanted) -> None:
    for column in wanted.names:
        if column not in present:
            use = wanted.use if column == wanted.label else ""
            raise DataError(f"{source} has no column {column!r}{use}; it has {', '.join(present)}")


def _columns(
    source: str, values: dict[str, list[Any]], wanted: Wanted, names: tuple[str, ...] = ()
) -> Columns:
    return Columns(
        source,
        texts=values[wanted.text],
        labels=None if wanted.label is None else values[wanted.label],
        owners=None if wanted.owner is None else values[wanted.owner],
        prompts=None if wanted.prompt is None else values[wanted.prompt],
        names=names,
    )
