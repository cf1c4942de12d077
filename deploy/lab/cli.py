"""``seedwire lab``: a cluster of emulated hosts on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.lab import file, lab
from deploy.process import command_line

lab_app = typer.Typer(
    name="lab",
    help="Emulate a cluster here: hosts with address, limits and sshd of their own. Needs root.",
    no_args_is_help=True,
)
FileOption = Annotated[Path, typer.Option("--file", "-f", help="The lab's file.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The lab's file.")]
Name = Annotated[str, typer.Argument(metavar="HOST")]
DEFAULT = Path("lab.toml")


def directory_of(path: Path) -> Path:
    """Where a lab's own files are: beside its file, named like it."""
    return path.with_suffix("") if path.suffix else path.with_name(f"{path.name}.d")


@lab_app.command()
def up(path: FileArgument = DEFAULT) -> None:
    """Start the hosts; writes cluster.toml and ssh_config into the directory named like FILE."""
    with command_line():
        directory = directory_of(path)
        lab.up(file.load(path), directory, lambda text: typer.echo(text, err=True))
        typer.echo(directory / "cluster.toml")


@lab_app.command()
def down(path: FileArgument = DEFAULT) -> None:
    """Remove the hosts and all that runs on them; also what an `up` left that was killed."""
    with command_line():
        lab.down(directory_of(path))


@lab_app.command()
def status(path: FileArgument = DEFAULT) -> None:
    """Show each host: whether it answers, its limits, what it has taken of its memory."""
    with command_line():
        lines = [("host", "state", "address", "memory", "peak", "limit", "kills", "cores")]
        for each in lab.status(directory_of(path)):
            use, limit = each.use, each.host.memory or None
            sizes = (_size(use.memory), _size(use.peak), _size(limit))
            kills = "-" if use.kills is None else str(use.kills)
            cores = f"{each.host.cpus:g}" if each.host.cpus else "-"
            lines.append((each.host.name, each.state, each.host.address, *sizes, kills, cores))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = zip(line, widths, strict=True)
            typer.echo("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


@lab_app.command()
def cut(host: Name, path: FileOption = DEFAULT) -> None:
    """Cut a host off, as if its cable was pulled."""
    with command_line():
        lab.cut(directory_of(path), host)


@lab_app.command()
def mend(host: Name, path: FileOption = DEFAULT) -> None:
    """Let a host that was cut off be reached again."""
    with command_line():
        lab.mend(directory_of(path), host)


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.0f} MB"
