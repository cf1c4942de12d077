"""The tables of an inventory: what can be said of hosts, the coordinator, and all of them.

A value that no host could be meant by is refused as it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

SIZE = r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kKMG]?)B?"
MAX_SIZE = 1 << 40
ENDPOINT = r"^tcp://[^\s/]+:[0-9]{1,5}\Z"

Word = Annotated[str, Meta(pattern=r"^([^-\s]\S*)?\Z")]  # no option of ssh, no second argument
RemotePath = Annotated[str, Meta(pattern=r"^((~|/)[^\n]*)?\Z")]
Size = Annotated[str, Meta(pattern=rf"^({SIZE})?\Z")]
Endpoint = Annotated[str, Meta(pattern=ENDPOINT)]
Clients = Annotated[
    str, Meta(pattern=r"^(none|[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*)?\Z")
]
Label = Annotated[str, Meta(max_length=200)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the tables: a typo is an error, not a default."""


class Cluster(Section, frozen=True, kw_only=True):
    """What all hosts have in common.

    Attributes:
        ssh_config: for ``ssh -F``, relative to the inventory; "" is the user's own.
        directory: ours on each host: venv, keys, cache, state, logs, run.
        python: which a venv is made from.
    """

    ssh_config: str = ""
    directory: Annotated[str, Meta(pattern=r"^(~/|/)[^\n]+\Z")] = "~/.seedwire"
    python: Word = "python3"


class Coordinator(Section, frozen=True, kw_only=True):
    """Where the coordinator runs.

    Attributes:
        host: a host's name, or "" for this machine.
        bind: where it listens.
        address: where the nodes reach it.
    """

    host: str = ""
    bind: Endpoint = "tcp://0.0.0.0:5555"
    address: Endpoint


class Limits(Section, frozen=True, kw_only=True):
    """What a round may take on a host, as ``seedwire node --max-*``; "" and 0 are no limit."""

    memory: Size = ""
    bytes: Size = ""
    seconds: Annotated[float, Meta(ge=0, le=1e9)] = 0.0

    def __post_init__(self) -> None:
        for name, text in (("memory", self.memory), ("bytes", self.bytes)):
            if text and not 0 < num_bytes(text) <= MAX_SIZE:  # as ``seedwire node`` itself says
                want = 'want 1 to 2^40 bytes, as in 1500 or 200kB or 1.5GB, or "" for no limit'
                raise ValueError(f"{name} {text}: {want}")

    @property
    def memory_bytes(self) -> int | None:
        """Of "1500MB"; None where nothing is said."""
        return num_bytes(self.memory) if self.memory else None


def num_bytes(text: str) -> int:
    """Of a size; kB, MB and GB are powers of 1000, as for ``seedwire node``."""
    found = re.fullmatch(SIZE, text)
    if found is None:
        raise ValueError(f"{text}: no size")
    return round(float(found[1]) * 1000.0 ** " KMG".index(found[2].upper() or " "))


class HostTable(Section, frozen=True, kw_only=True):
    """The keys of ``[hosts.NAME]``, whose meaning is ``Host``'s."""

    address: Annotated[Word, Meta(min_length=1)]
    user: Word = ""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    directory: RemotePath = ""
    python: Word = ""
    venv: RemotePath = ""
    device: Word = "cpu"
    threads: Annotated[int, Meta(ge=0, le=4096)] = 0
    clients: Clients = ""
    systemd: Literal["", "user", "system"] = ""
    limits: Limits = Limits()
    labels: Mapping[str, Label] = {}


class GroupTable(HostTable, frozen=True, kw_only=True):
    """The keys of ``[groups.NAME]``; ``{i}`` in an address or a directory is 1 to ``count``."""

    count: Annotated[int, Meta(ge=1, le=1000)]


class Host(HostTable, frozen=True, kw_only=True):
    """One host, nothing left to be filled in.

    Attributes:
        name: of the host and of its node.
        address: what ``ssh`` takes, an alias of its config too.
        user: "" leaves it to ssh.
        port: 0 leaves it to ssh.
        directory: ours, on the host.
        python: which a venv is made from.
        venv: one that exists; "" is ``venv`` in ``directory``.
        clients: hosted by its node, as 0-3 or 0,2,5-7; "" for an even share, "none" for no node.
        systemd: how its node is started: by a "user" or "system" unit, or "" without.
        ssh_config: for ``ssh -F``; None is the user's own.
    """

    name: str
    ssh_config: Path | None = None

    def at(self, *parts: str) -> str:
        """A path in our directory on the host."""
        return "/".join((self.directory.rstrip("/"), *parts))

    @property
    def interpreter(self) -> str:
        """The Python of the venv, on the host."""
        return f"{self.venv.rstrip('/') or self.at('venv')}/bin/python"
