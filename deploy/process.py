"""How commands of deployment end: one line and an exit code, on a signal too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from deploy.errors import DeployError

INTERRUPTED = 130


@contextmanager
def command_line() -> Iterator[None]:
    """Errors are one line; SIGTERM ends us as Ctrl-C does, so that what we started is ended too.

    SIGINT is set as well: a shell starts its background jobs with it ignored.
    """

    def stop(number: int, frame: object) -> None:
        del number, frame
        # `timeout`, for one, sends it twice: what is done at the end is not to be cut short
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except DeployError as error:
        typer.echo(f"seedwire: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
