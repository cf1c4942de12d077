"""What ``seedwire run`` and ``seedwire cluster run`` both take: an experiment, and a place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file (TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override one value.")
]
Runs = Annotated[Path, typer.Option(help="Where run directories are made.")]
Directory = Annotated[
    Path | None, typer.Option(help="This run's directory, if it is not to be made in --runs.")
]
RUNS = Path("runs")


def stamped(stem: str) -> str:
    """A name that says when, so that no later one is the same."""
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
