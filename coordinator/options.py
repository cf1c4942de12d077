"""The options of ``seedwire coordinator``: what each one is, and which run they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ExperimentFile = Annotated[Path | None, typer.Option(help="The experiment file (TOML).")]
Resume = Annotated[Path | None, typer.Option(help="Instead, the directory of a run to go on with.")]
Bind = Annotated[
    str | None,
    typer.Option(
        help="Where to listen.", show_default="tcp://0.0.0.0:5555, or where a resumed run did"
    ),
]
Runs = Annotated[Path, typer.Option(help="Where run directories are made.")]
Directory = Annotated[
    Path | None, typer.Option(help="This run's directory, if it is not to be made in --runs.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override one value.")
]
StartsEvaluator = Annotated[bool, typer.Option(help="Start the evaluation worker on this machine.")]
Keys = Annotated[
    Path | None,
    typer.Option(envvar="SEEDWIRE_KEYS", help="Where keys are: ~/.config/seedwire/keys."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without keys: anybody can read and take part.")
]
GoOn = Annotated[
    bool, typer.Option("--go-on", help="Resume the run in --directory, if it holds one.")
]
Lifeline = Annotated[bool, typer.Option("--lifeline", help="End when standard input closes.")]


def earlier_run(
    experiment: Path | None,
    resume: Path | None,
    directory: Path | None,
    overrides: Sequence[str],
    go_on: bool,
) -> Path | None:
    """The directory of the run to go on with; None for a new one of ``experiment``.

    Raises:
        typer.BadParameter: the options contradict each other.
    """
    from coordinator.journal import FILE as JOURNAL

    if (experiment is None) == (resume is None):
        raise typer.BadParameter("give either --experiment or --resume")
    if go_on and directory is None:
        raise typer.BadParameter("--go-on says to look for a run in --directory")
    if go_on and directory is not None and (directory / JOURNAL).exists():
        return directory
    if resume is not None and (overrides or directory is not None):
        raise typer.BadParameter("--resume takes the run as it is: no --set or --directory")
    return resume
