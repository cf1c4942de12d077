"""Machines on a network that is ours alone, for processes of a test."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from pathlib import Path

from deploy.lab.network import Network

CLONE_NEWNET = 0x40000000
SUBNET = "10.66.0"


def network_of(names: Collection[str]) -> Network:
    """Machines on a switch; the process number is in its name, so that two tests never meet.

    Args:
        names: of the machines, which get ``SUBNET``.1, .2, ... in this order.
    """
    addresses = {name: f"{SUBNET}.{i}" for i, name in enumerate(names, 1)}
    return Network(f"seedwire-{os.getpid()}", addresses)


def enter(path: Path) -> None:
    """Move this thread, and all that it starts, onto a machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")
