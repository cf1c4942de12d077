"""How every command of ours ends: one line and an exit code, on a signal too."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from protocol.errors import SeedwireError

INTERRUPTED = 130


class Stopped(BaseException):
    """SIGINT, SIGTERM or a cut lifeline; like KeyboardInterrupt, nothing else catches it."""


@contextmanager
def command_line(lifeline: bool = False) -> Iterator[None]:
    """Turn errors into a line on standard error and an exit code, signals into ``Stopped``.

    With ``lifeline`` the process also stops when its standard input closes, which it
    does when whoever started it is gone, however that came about.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        # `timeout`, for one, sends it twice: what is done at the end is not to be cut short
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if lifeline:
        threading.Thread(target=_watch_stdin, daemon=True).start()
    try:
        yield
    except SeedwireError as error:
        print(f"seedwire: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(error.exit_code) from error
    except Stopped:
        raise SystemExit(INTERRUPTED) from None


def _watch_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
