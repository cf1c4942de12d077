"""``seedwire keys``: make keys, and say whose are admitted."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import KeyStoreError
from protocol.process import command_line

keys_app = typer.Typer(
    name="keys", help="Keys of nodes and of the coordinator.", no_args_is_help=True
)
Where = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="SEEDWIRE_KEYS",
        help="Directory of keys; by default ~/.config/seedwire/keys.",
    ),
]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="The node's name; by default this host's.")] = "",
    where: Where = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a key of this name.")] = False,
) -> None:
    """Make a node's key pair on this machine; its .pub is what the coordinator needs."""
    with command_line():
        from protocol import keys

        name, directory = name or keys.host_name(), where or keys.default_directory()
        if not re.fullmatch(keys.NAME, name):
            raise typer.BadParameter(f"{name!r}: want up to 63 letters, digits, '.', '_', '-'")
        keys.make(directory, name, force)
        typer.echo(directory / f"{name}.pub")


@keys_app.command()
def enroll(
    public: Annotated[Path, typer.Argument(metavar="NODE.pub", help="The node's public key.")],
    where: Where = None,
) -> None:
    """Admit a node, on the coordinator's machine; also while it runs."""
    with command_line():
        from coordinator import enrolled
        from protocol import keys

        key, name = keys.read_public(public)
        directory = where or keys.default_directory()
        enrolled.own_pair(directory)
        enrolled.change(directory, lambda now: now.enroll(name, key))
        ours = directory / f"{keys.COORDINATOR}.pub"
        typer.echo(f"{name} is enrolled; it trusts this coordinator once it has {ours}")


@keys_app.command()
def public(where: Where = None) -> None:
    """Print the coordinator's public key, which its nodes trust; made if there is none."""
    with command_line():
        from coordinator import enrolled
        from protocol import keys

        directory = where or keys.default_directory()
        enrolled.own_pair(directory)
        typer.echo((directory / f"{keys.COORDINATOR}.pub").read_text(), nl=False)


@keys_app.command()
def revoke(
    node: Annotated[str, typer.Argument(help="The node's name.")], where: Where = None
) -> None:
    """Admit a node's key no more; a coordinator that runs drops its connection."""
    with command_line():
        from coordinator import enrolled
        from protocol import keys

        enrolled.change(where or keys.default_directory(), lambda now: now.revoke(node))
        typer.echo(f"{node} is revoked")


@keys_app.command("list")
def list_(where: Where = None) -> None:
    """Show who is enrolled, who was revoked, and which tokens are open."""
    with command_line():
        from coordinator import enrolled
        from protocol import keys

        now, found = time.time(), enrolled.read(where or keys.default_directory())
        for name, key in sorted(found.nodes.items()):
            typer.echo(f"{name}  {key}")
        for key, name in sorted(found.revoked.items(), key=lambda item: item[1]):
            typer.echo(f"{name}  {key}  revoked")
        for key, offer in found.tokens.items():
            if found.fault_of(key, now) is None:
                minutes = (offer.expires - now) / 60
                typer.echo(f"a token for {offer.uses} more, {minutes:.0f} minutes  {key}")


@keys_app.command()
def token(
    uses: Annotated[int, typer.Option(min=1, max=10_000, help="How many nodes it enrols.")] = 1,
    valid: Annotated[str, typer.Option(help="How long: 90s, 30m, 2h, 1d.")] = "1h",
    out: Annotated[
        Path | None, typer.Option(help="Write it there (0600), not on the screen.")
    ] = None,
    where: Where = None,
) -> None:
    """Make a token, by which nodes enrol themselves: seedwire node --token-file FILE ..."""
    with command_line():
        from coordinator import enrolled
        from protocol import keys

        if (found := re.fullmatch(r"([0-9]{1,6})([smhd])", valid)) is None:
            raise typer.BadParameter(f"--valid {valid}: want a number and s, m, h or d, as in 30m")
        seconds = int(found[1]) * UNITS[found[2]]
        made = enrolled.new_token(where or keys.default_directory(), seconds, uses)
        if out is None:
            typer.echo(made.text)
            return
        try:
            keys.write_secret(out, made.text + "\n")
        except OSError as error:
            raise KeyStoreError(f"cannot write {out}: {error.strerror}") from error
