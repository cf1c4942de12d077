"""What a push brings to every host: our wheel, others' wheels, and what experiments need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import wheel
from deploy.receive import digest

DIST, WHEELS, CACHE = "dist", "wheels", "cache"
# The newest torch that brings none of these is the newest that a board without CUDA can hold.
WITHOUT_CUDA = "without-cuda.txt"
CUDA_PACKAGES = "nvidia-cublas<0\nnvidia-cublas-cu12<0\ncuda-toolkit<0\n"


@dataclass(frozen=True)
class Cargo:
    """Files by where they go below the directory of a host.

    Attributes:
        files: root -> path below it, or "" if the root is a file -> file here.
        hashes: the same keys -> SHA-256, in hexadecimal.
        wheel: path of our own wheel below the directory.
        installed: the files that its installation consists of, with hashes.
        is_offline: whether the wheels of everything are brought too, so that no index is asked.
        sources: names of models and data.
    """

    files: Mapping[str, Mapping[str, Path]]
    hashes: Mapping[str, Mapping[str, str]]
    wheel: str
    installed: Mapping[str, str]
    is_offline: bool = False
    sources: tuple[str, ...] = ()

    def size(self, paths: Sequence[str]) -> int:
        """Bytes of files by their paths below the directory."""
        found = self.paths()
        return sum(found[path].stat().st_size for path in paths)

    def paths(self) -> dict[str, Path]:
        """Every path below the directory of a host, and the file here."""
        return {
            f"{root}/{name}" if name else root: path
            for root, files in self.files.items()
            for name, path in files.items()
        }


@contextmanager
def collected(
    experiments: Sequence[Path], overrides: Sequence[str], wheelhouse: Path | None = None
) -> Iterator[Cargo]:
    """The cargo of ``load``, for as long as the block."""
    with tempfile.TemporaryDirectory(prefix="seedwire-push-") as folder:
        yield load(Path(folder), experiments, overrides, wheelhouse)


def load(
    folder: Path,
    experiments: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    wheelhouse: Path | None = None,
) -> Cargo:
    """Collect and hash everything.

    Args:
        folder: for what has to be made first; outlives the cargo.
        experiments: files whose models and data are brought.
        overrides: of all of them, as ``--set``.
        wheelhouse: a directory with the wheels of our dependencies.

    Raises:
        SystemExit: a model or data set is not to be had; the reason has been printed.
    """
    ours = wheel.build(folder)
    (folder / WITHOUT_CUDA).write_text(CUDA_PACKAGES)
    files = {DIST: {path.name: path for path in (ours, folder / WITHOUT_CUDA)}}
    if wheelhouse is not None:
        files[WHEELS] = {path.name: path for path in sorted(wheelhouse.glob("*.whl"))}
    needs = _needs(experiments, overrides) if experiments else []
    for need in needs:
        found = {name: Path(path) for name, path in need["files"].items()}
        files[f"{CACHE}/{need['root']}"] = found
    hashes = {root: {n: digest(p) for n, p in found.items()} for root, found in files.items()}
    return Cargo(
        files,
        hashes,
        f"{DIST}/{ours.name}",
        wheel.installed(ours),
        wheelhouse is not None,
        tuple(need["source"] for need in needs),
    )


def _needs(experiments: Sequence[Path], overrides: Sequence[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "seedwire", "fetch", "--list", *map(str, experiments)]
    for override in overrides:
        command += ["--set", override]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=env)  # noqa: S603
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
