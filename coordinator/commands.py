"""The commands that look at runs and end them: each works on run directories."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from protocol.errors import ExperimentError, RunError
from protocol.process import command_line


class Format(str, Enum):
    text = "text"
    json = "json"


class TableFormat(str, Enum):
    text = "text"
    json = "json"
    markdown = "markdown"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
As = Annotated[Format, typer.Option("--format", help="For people, or JSON.")]
POLL_SECONDS = 1.0


def _print(value: object) -> None:
    typer.echo(json.dumps(value))


def watch(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    form: As = Format.text,
) -> None:
    """Show a run in this terminal until it is over.

    JSON is one line a second, with the commits and evaluations that are new.
    """
    with command_line():
        s = _watch_json(run, once) if form is Format.json else _watch(run, once)
        if not once and s["state"] != "completed":
            raise RunError(f"{run}: {s['state']}: {s['reason']}")


def _watch(run: Path, once: bool) -> dict[str, Any]:
    from coordinator.view import View, render

    console = Console()
    if once:
        view = View(console, run)
        console.print(render(view.status, console.width))
        return view.status
    with View(console, run, from_start=True) as view:
        while view.status["state"] == "running":
            time.sleep(POLL_SECONDS)
            view.update()
    return view.status


def _watch_json(run: Path, once: bool) -> dict[str, Any]:
    from coordinator.status import Reader

    reader, told = Reader(run), {"commits": 0, "evaluations": 0}
    while True:
        s = reader.status()
        _print(s | {key: s[key][count:] for key, count in told.items()})
        told = {key: len(s[key]) for key in told}
        if once or s["state"] != "running":
            return s
        time.sleep(POLL_SECONDS)


def serve(
    run: Run,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8765,
) -> None:
    """Serve a small web page over a run directory, also while the run goes on.

    There is no password: bind it elsewhere only in a network that you trust.
    """
    with command_line():
        from coordinator.serve import StatusServer

        with StatusServer(run, bind, port) as server:
            typer.echo(server.url)
            server.serve_forever()


def list_(
    directory: Annotated[Path, typer.Argument(help="Where run directories are.")] = Path("runs"),
    form: As = Format.text,
) -> None:
    """List the runs in a directory: how far they are, and what they reached."""
    with command_line():
        from coordinator.listing import listing, table

        found = listing(directory)
        if form is Format.json:
            _print(found)
        else:
            Console().print(table(found) if found else f"no runs in {directory}")


def log(run: Run, form: As = Format.text) -> None:
    """Tell the events of a run, as far as it is, with the time on the run's clock."""
    with command_line():
        from coordinator import log as logs

        _check(run)
        for seconds, text in logs.tell(run):
            if form is Format.json:
                _print({"seconds": seconds, "text": text})
            else:
                typer.echo(f"{logs.clock(seconds)} {text}")


def stop(run: Run, form: As = Format.text) -> None:
    """End a running run in order; its coordinator must be on this machine."""
    with command_line():
        from coordinator import processes

        _check(run)
        process = processes.coordinator_of(run)
        if process is not None:
            processes.end([process])
        _ended(run, {"coordinator": process.pid} if process else {}, form)


def down(run: Run, form: As = Format.text) -> None:
    """End a run and the node processes that `seedwire run` started for it, by force if need be."""
    with command_line():
        from coordinator import processes

        _check(run)
        coordinator, nodes = processes.coordinator_of(run), processes.nodes_of(run)
        if coordinator is not None:
            processes.end([coordinator], kill=True)  # first: it would miss its nodes
        processes.end(nodes.values(), kill=True)
        pids = {"coordinator": coordinator.pid} if coordinator else {}
        _ended(run, pids | {name: node.pid for name, node in nodes.items()}, form)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of finished runs, or JSON of a report."),
    ],
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Methods compared",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write event files, one folder a run.")
    ] = False,
    form: Annotated[
        TableFormat, typer.Option("--format", help="What is printed here.")
    ] = TableFormat.text,
) -> None:
    """Compare runs: a table here, and a page, a picture and tables in a directory.

    Runs that differ in their seed alone are one line with a band.
    """
    with command_line():
        try:
            from coordinator import report as reports
            from coordinator import tables
            from coordinator.groups import group
            from coordinator.results import read
        except ImportError as error:
            raise ExperimentError(f"{error}: pip install 'seedwire[report]'") from error
        groups = group([result for run in runs for result in read(run)])
        reports.write(groups, out, title)
        if tensorboard:
            try:
                from coordinator import board
            except ImportError as error:
                raise ExperimentError(f"{error}: pip install 'seedwire[tensorboard]'") from error
            board.write([r for g in groups for r in g.results], out / "tensorboard")
        if form is TableFormat.json:
            _print(tables.records(groups))
        elif form is TableFormat.markdown:
            typer.echo(tables.markdown(groups), nl=False)
        else:
            console = Console()
            console.print(tables.table(groups, title))
            for name in ("comparison.html", "comparison.png"):
                console.print(str(out / name), soft_wrap=True, highlight=False, markup=False)


def saving(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of finished runs, or JSON of a report."),
    ],
    than: Annotated[str, typer.Option(help="The run that is the yardstick, by its name.")],
    within: Annotated[
        float, typer.Option(help="As good is also what is worse by this: 0.01.", min=0.0)
    ] = 0.0,
    form: Annotated[
        TableFormat, typer.Option("--format", help="For people, JSON, or Markdown.")
    ] = TableFormat.text,
) -> None:
    """Tell what each run took to reach the metric that one of them ended with.

    Runs are paired by their seed; factors above one are savings.
    """
    with command_line():
        from coordinator import saving as savings
        from coordinator import tables
        from coordinator.groups import group
        from coordinator.results import read

        groups = group([result for run in runs for result in read(run)])
        found = savings.savings(groups, than, within)
        if form is TableFormat.json:
            _print([asdict(s) for s in found])
        elif form is TableFormat.markdown:
            head, *rows = savings.rows(found)
            typer.echo(tables.as_markdown([head, ["---"] * len(head), *rows]), nl=False)
        else:
            typer.echo(savings.heading(groups, than, within))
            Console().print(tables.plain(savings.rows(found)))


def _check(run: Path) -> None:
    if not (run / "experiment.toml").exists():
        raise ExperimentError(f"{run} holds no run")


def _ended(run: Path, pids: dict[str, int], form: Format) -> None:
    if form is Format.json:
        _print({"run": str(run), "ended": pids})
    else:
        what = ", ".join(f"{name} (process {pid})" for name, pid in pids.items())
        typer.echo(f"{run}: ended {what}" if pids else f"{run}: nothing of it runs on this machine")
