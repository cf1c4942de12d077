"""Where a run listens and leaves its results."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from fedalgos.privacy import SECRET_BYTES
from protocol.errors import ExperimentError

DEFAULT_BIND = "tcp://0.0.0.0:5555"


@dataclass(frozen=True)
class Place:
    """Where a run listens and leaves its results.

    Attributes:
        keys: the directory of keys; None does without.
    """

    bind: str
    directory: Path
    starts_evaluator: bool = True
    keys: Path | None = None


def new_directory(root: Path, name: str) -> Path:
    """A new directory ``root/NAME-DATE-TIME``.

    Raises:
        ExperimentError: it cannot be made.
    """
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            directory = root / (f"{stem}-{attempt}" if attempt else stem)
            if not directory.exists():
                directory.mkdir()
                return directory
    except OSError as error:
        raise ExperimentError(f"cannot make a run directory in {root}: {error}") from error
    raise ExperimentError(f"no free name for a run directory in {root}")


def claim(directory: Path) -> None:
    """Make the directory of a run to be, or take one that is there.

    Raises:
        ExperimentError: it cannot be made, or holds a run.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"cannot make {directory}: {error.strerror}") from error
    if (directory / "experiment.toml").exists():
        raise ExperimentError(f"{directory} holds a run already: --resume it")


def secret_of(directory: Path) -> bytes:
    """The run's own secret, in a file that only its owner reads; drawn if there is none."""
    path = directory / "secret"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
    return path.read_bytes()
