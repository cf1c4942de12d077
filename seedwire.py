"""The ``seedwire`` command: one entry, a subcommand for each thing a person does."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from coordinator.cli import coordinator
from coordinator.commands import down, list_, log, report, saving, serve, stop, watch
from coordinator.keys_commands import keys_app
from deploy.cli import demo, run, sweep
from deploy.cluster_cli import cluster_app
from deploy.lab.cli import lab_app
from node.cli import fetch, memory, node, profile

app = typer.Typer(
    name="seedwire",
    help="Federated fine-tuning of language models on real machines, with every byte counted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(run, sweep, demo, coordinator, node),
    *(watch, serve, list_, log, stop, down, report, saving),
    *(fetch, memory, profile),
)
app.add_typer(keys_app)
app.add_typer(cluster_app)
app.add_typer(lab_app)
for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seedwire {metadata.version('seedwire')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Options of the command itself."""
    del version


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
