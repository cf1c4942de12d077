"""``seedwire coordinator``: run an experiment for whichever nodes log in."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from coordinator import options
from protocol import experiment as experiments
from protocol import heap
from protocol.process import command_line


def coordinator(
    experiment: options.ExperimentFile = None,
    resume: options.Resume = None,
    bind: options.Bind = None,
    runs: options.Runs = Path("runs"),
    directory: options.Directory = None,
    set_: options.Overrides = None,
    evaluator: options.StartsEvaluator = True,
    keys: options.Keys = None,
    insecure: options.Insecure = False,
    go_on: options.GoOn = False,
    lifeline: options.Lifeline = False,
) -> None:
    """Run an experiment with the nodes that log in, and write its results."""
    from coordinator import run  # numpy and zmq: not for a mere --help
    from coordinator.place import DEFAULT_BIND, Place, claim, new_directory
    from protocol.keys import default_directory

    heap.share()  # before a thread: updates come by one and are aggregated by another
    with command_line(lifeline):
        store = None if insecure else keys or default_directory()
        overrides = tuple(set_ or ())
        earlier = options.earlier_run(experiment, resume, directory, overrides, go_on)
        if earlier is not None:
            run.resume(earlier, Console(), bind, evaluator, store)
            return
        assert experiment is not None  # noqa: S101 - else there is an earlier run
        e = experiments.load(experiment, overrides)
        if directory is None:
            directory = new_directory(runs, e.run.name)
        else:
            claim(directory)
        place = Place(bind or DEFAULT_BIND, directory, evaluator, store)
        run.run(e, place, Console())


def main() -> None:
    """The entry of ``python -m coordinator``."""
    typer.run(coordinator)
