"""``seedwire coordinator``: run an experiment for whichever nodes log in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol import experiment as experiments
from protocol.errors import ExperimentError
from protocol.process import command_line


def coordinator(
    experiment: Annotated[Path | None, typer.Option(help="The experiment file (TOML).")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Instead, the directory of a run to go on with.")
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option(
            help="Where to listen.", show_default="tcp://0.0.0.0:5555, or where a resumed run did"
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path("runs"),
    directory: Annotated[
        Path | None, typer.Option(help="This run's directory, if it is not to be made in --runs.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override one value.")
    ] = None,
    evaluator: Annotated[
        bool, typer.Option(help="Start the evaluation worker on this machine.")
    ] = True,
    keys: Annotated[
        Path | None,
        typer.Option(envvar="SEEDWIRE_KEYS", help="Where keys are: ~/.config/seedwire/keys."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys: anybody can read and take part.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Resume the run in --directory, if it holds one.")
    ] = False,
    lifeline: Annotated[
        bool, typer.Option("--lifeline", help="End when standard input closes.")
    ] = False,
) -> None:
    """Run an experiment with the nodes that log in, and write its results."""
    from coordinator import run  # numpy and zmq: not for a mere --help
    from coordinator.journal import FILE as JOURNAL
    from protocol.keys import default_directory

    with command_line(lifeline):
        store = None if insecure else keys or default_directory()
        if (experiment is None) == (resume is None):
            raise typer.BadParameter("give either --experiment or --resume")
        if go_on and directory is None:
            raise typer.BadParameter("--go-on says to look for a run in --directory")
        if go_on and directory is not None and (directory / JOURNAL).exists():
            resume, directory, set_ = directory, None, None
        if resume is not None:
            if set_ or directory is not None:
                raise typer.BadParameter("--resume takes the run as it is: no --set or --directory")
            run.resume(resume, Console(), bind, evaluator, store)
            return
        assert experiment is not None  # noqa: S101 - by the first check
        e = experiments.load(experiment, tuple(set_ or ()))
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExperimentError(f"cannot make {directory}: {error.strerror}") from error
            if (directory / "experiment.toml").exists():
                raise ExperimentError(f"{directory} holds a run already: --resume it")
        place = run.Place(
            bind or run.DEFAULT_BIND,
            directory or run.run_directory(runs, e.run.name),
            evaluator,
            store,
        )
        run.run(e, place, Console())


def main() -> None:
    """The entry of ``python -m coordinator``."""
    typer.run(coordinator)
