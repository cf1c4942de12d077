"""``seedwire cluster``: real machines, over the user's own ssh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from deploy import cargo, cluster, nodes, options, tables
from deploy import check as checking
from deploy import push as pushing
from deploy.centre import Plan
from deploy.errors import HostError
from deploy.follow import follow
from deploy.inventory import Inventory, load
from deploy.machine import office
from deploy.nodes import Launch
from deploy.parallel import each
from deploy.process import command_line
from deploy.ssh import Remote, remotes

cluster_app = typer.Typer(
    name="cluster", help="Nodes on real machines, over your own ssh.", no_args_is_help=True
)
Where = Annotated[Path, typer.Option("--inventory", "-i", help="The inventory (TOML).")]
Only = Annotated[
    list[str] | None, typer.Option("--host", metavar="NAME", help="This host alone; repeatable.")
]
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="How it is shown.")]
Keys = Annotated[
    Path | None,
    typer.Option(envvar="SEEDWIRE_KEYS", help="The coordinator's keys, where it is here."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without keys: anybody can read and take part.")
]
Systemd = Annotated[
    Literal["user", "system"] | None,
    typer.Option(help="Have this systemd start the nodes, whatever the inventory says."),
]
INVENTORY = Path("cluster.toml")


@contextmanager
def _hosts(
    path: Path, only: list[str] | None, systemd: Literal["user", "system"] | None = None
) -> Iterator[tuple[Inventory, list[Remote]]]:
    """The inventory, and those of its hosts that are meant."""
    with command_line():
        inventory = _load(path, systemd)
        chosen = [inventory.host(name) for name in only] if only else list(inventory.hosts)
        with remotes(chosen) as reached:
            yield inventory, reached


def _load(path: Path, systemd: Literal["user", "system"] | None) -> Inventory:
    inventory = load(path)
    return inventory.under(systemd) if systemd else inventory


def _tell(failed: Mapping[str, Exception]) -> None:
    """A line for each host that failed; and then that is how we end."""
    for name, error in failed.items():
        typer.echo(f"seedwire: {name}: {error}", err=True)
    if failed:
        raise typer.Exit(HostError.exit_code)


def _reports(
    inventory: Inventory, hosts: Sequence[Remote], console: Console
) -> list[checking.Report]:
    with remotes(inventory.hosts) as all_, checking.listening(inventory, all_) as stand_in:
        if stand_in not in ("ready", "taken"):
            bind = inventory.coordinator.bind
            console.print(f"nothing can listen on {bind} here: {stand_in}", style="yellow")
        outcome = each(hosts, lambda r, say: checking.look(r, inventory, say), console)
    failed = [checking.unreachable(name, str(e)) for name, e in outcome.failed.items()]
    found = {report.host: report for report in [*outcome.done.values(), *failed]}
    return [found[remote.host.name] for remote in hosts]


@cluster_app.command()
def check(where: Where = INVENTORY, only: Only = None, form: Format = "table") -> None:
    """Look at the hosts: what they have, what is wrong, and what to do about it."""
    with _hosts(where, only) as (inventory, hosts):
        reports = _reports(inventory, hosts, Console(stderr=True))
        if form == "json":
            typer.echo(tables.checks_json(reports))
        else:
            tables.checks(reports, Console())
        if not all(report.is_fit for report in reports):
            raise typer.Exit(HostError.exit_code)


@cluster_app.command()
def push(
    experiments: Annotated[
        list[Path] | None,
        typer.Argument(help="Experiment files (TOML) whose models and data are brought."),
    ] = None,
    where: Where = INVENTORY,
    only: Only = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override one value of the experiments."),
    ] = None,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Wheels of all dependencies: hosts ask no index."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the venvs anew.")] = False,
    keys: Keys = None,
    insecure: Insecure = False,
) -> None:
    """Bring hosts what they lack: this Seedwire in a venv, keys, models and data, by rsync."""
    with _hosts(where, only) as (inventory, hosts), remotes(inventory.hosts) as all_:
        admission = None if insecure else office(inventory, all_, keys)
        with cargo.collected(experiments or [], set_ or [], wheelhouse) as collected:
            _tell(pushing.push_all(hosts, collected, admission, fresh).failed)


@cluster_app.command()
def up(
    clients: Annotated[int, typer.Option(min=1, help="How many the experiment has.")],
    where: Where = INVENTORY,
    only: Only = None,
    keys: Keys = None,
    insecure: Insecure = False,
    within: Annotated[
        float, typer.Option(help="Seconds that a node may take to log in.")
    ] = nodes.LOGIN_SECONDS,
    systemd: Systemd = None,
) -> None:
    """Start the nodes; returns once each has logged in, or says why one has not."""
    with _hosts(where, only, systemd) as (inventory, hosts), remotes(inventory.hosts) as all_:
        dealt = inventory.deal(clients)
        admission = None if insecure else office(inventory, all_, keys)
        launch = Launch(inventory.coordinator.address, dealt, admission)
        taking = [remote for remote in hosts if remote.host.name in dealt]
        outcome = each(taking, lambda r, say: nodes.start(r, launch, say, within))
        _tell(outcome.failed)


@cluster_app.command()
def status(where: Where = INVENTORY, only: Only = None, form: Format = "table") -> None:
    """Show each host's node: whether it runs, since when, memory, last log line."""
    with _hosts(where, only) as (_, hosts):
        outcome = each(hosts, lambda remote, say: nodes.status(remote))
        if form == "json":
            typer.echo(tables.statuses_json(outcome.done, outcome.failed))
        else:
            tables.statuses(outcome.done, outcome.failed, Console())
        if outcome.failed:
            raise typer.Exit(HostError.exit_code)


@cluster_app.command()
def logs(
    where: Where = INVENTORY,
    only: Only = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of each.")] = 20,
    is_followed: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
) -> None:
    """Show the nodes' logs."""
    with _hosts(where, only) as (_, hosts):
        _tell(follow(hosts, lines, is_followed, typer.echo))


@cluster_app.command()
def down(where: Where = INVENTORY, only: Only = None) -> None:
    """End what was started on the hosts, and nothing else; also if there is nothing."""
    with _hosts(where, only) as (_, hosts):
        _tell(each(hosts, nodes.stop).failed)


@cluster_app.command()
def run(
    experiment: options.ExperimentFile,
    where: Where = INVENTORY,
    set_: options.Overrides = None,
    runs: options.Runs = options.RUNS,
    directory: options.Directory = None,
    keys: Keys = None,
    insecure: Insecure = False,
    systemd: Systemd = None,
) -> None:
    """Push, check, run an experiment, bring its results home, and leave nothing running."""
    console = Console(stderr=True)
    with command_line():
        inventory = _load(where, systemd)
        place = directory or runs / options.stamped(experiment.stem)
        plan = Plan(experiment, inventory, place, tuple(set_ or ()), keys, insecure)
        with remotes(inventory.hosts) as hosts:
            with cargo.collected([experiment], set_ or []) as collected:
                admission = None if insecure else office(inventory, hosts, keys)
                _tell(pushing.push_all(hosts, collected, admission, console=console).failed)
            reports = _reports(inventory, hosts, console)
        if not all(report.is_fit for report in reports):
            tables.checks(reports, console)
            raise typer.Exit(HostError.exit_code)
        raise typer.Exit(cluster.run(plan, console))
