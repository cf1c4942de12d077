"""Logs of nodes, line by line, from all hosts at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from deploy import nodes
from deploy.errors import DeployError, HostError
from deploy.parallel import Say, each
from deploy.ssh import Remote

TAIL_BYTES = 1 << 16
POLL_SECONDS = 1.0


def follow(
    hosts: Sequence[Remote], lines: int, goes_on: bool, out: Callable[[str], None]
) -> dict[str, DeployError]:
    """Show logs, each line behind its host's name.

    Args:
        hosts: whose.
        lines: how many of each that are there already.
        goes_on: with what comes, until we are interrupted; a host that is not reached is tried
            again.
        out: shows a line.

    Returns:
        Why a host's log could not be had.
    """
    lock = threading.Lock()

    def show(name: str, text: list[str]) -> None:
        with lock:  # a host's lines stay together
            for line in text:
                out(f"{name}: {line}")

    def one(remote: Remote, say: Say) -> None:
        name = remote.host.name
        status = nodes.status(remote, -TAIL_BYTES)
        show(name, status.text.splitlines()[-lines:])
        read, rest, is_lost = status.size, "", False
        while goes_on and not remote.aborted.wait(POLL_SECONDS):
            try:
                status = nodes.status(remote, read)
            except HostError as error:
                if remote.aborted.is_set():
                    return
                say(f"not reached ({error}), trying again")
                is_lost = True
                continue
            if is_lost:
                say("reached again")
            is_lost, read = False, status.size
            *whole, rest = (rest + status.text).split("\n")
            show(name, whole)

    return each(hosts, one).failed
