"""``seedwire run`` and ``seedwire demo``: whole runs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy import local, options
from deploy.demo import run_demo
from deploy.process import command_line
from deploy.sweep import Sweep, parse_over, run_sweep


def _say(text: str) -> None:
    typer.echo(text, err=True)


def run(
    experiment: options.ExperimentFile,
    nodes: Annotated[int, typer.Option(min=1, help="How many node processes.")] = 2,
    set_: options.Overrides = None,
    runs: options.Runs = options.RUNS,
    directory: options.Directory = None,
    threads: Annotated[int, typer.Option(help="CPU threads per node; 0 shares the cores.")] = 0,
) -> None:
    """Run an experiment here: a coordinator and N node processes over TCP."""
    where = directory or runs / options.stamped(experiment.stem)
    plan = local.Plan(experiment, nodes, where, tuple(set_ or ()), threads)
    with command_line():
        code = local.run(plan, _say)
    raise typer.Exit(code)


def sweep(
    experiments: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Experiment files (TOML).")
    ],
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="A.B=V,V", help="A key and its values; may be repeated."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many node processes a run.")] = 2,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override one value in all.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where all goes; one that was begun is gone on with.")
    ] = None,
) -> None:
    """Run experiments with every combination of values, one after another, and compare them.

    For seeds: --over run.seed=1,2,3.
    """
    where = directory or options.RUNS / options.stamped("sweep")
    plan = Sweep(tuple(experiments), parse_over(over or ()), tuple(set_ or ()), nodes, where)
    with command_line():
        code = run_sweep(plan, _say)
    raise typer.Exit(code)


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller budgets: under 4 minutes, of four methods.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every method there is, not only four: over half an hour.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="How many node processes.")] = 4,
    runs: options.Runs = options.RUNS,
) -> None:
    """Run methods on one task, one after another, and compare what each truly cost."""
    with command_line():
        code = run_demo(quick, every, nodes, runs, _say)
    raise typer.Exit(code)
