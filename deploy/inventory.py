"""The inventory ``cluster.toml``: which hosts there are, and what each of them does.

Groups are expanded into hosts, defaults filled in, and contradictions refused, each in one line
that names the file and the key.  Paths on a host begin with ``/`` or ``~/``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from deploy.errors import InventoryError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"  # as a node may be called; $ lets "\n" in
ENDPOINT = r"^tcp://[^\s/]+:[0-9]{1,5}\Z"
NOBODY = "none"
RESERVED = ("coordinator", "evaluator")  # names of keys and processes that a run makes itself

Word = Annotated[str, Meta(pattern=r"^([^-\s]\S*)?\Z")]  # no option of ssh, no second argument
RemotePath = Annotated[str, Meta(pattern=r"^((~|/)[^\n]*)?\Z")]
Size = Annotated[str, Meta(pattern=r"^([0-9]+(\.[0-9]+)? ?[kKMG]?B?)?\Z")]
Endpoint = Annotated[str, Meta(pattern=ENDPOINT)]
Clients = Annotated[
    str, Meta(pattern=r"^(none|[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*)?\Z")
]
Label = Annotated[str, Meta(max_length=200)]
S = TypeVar("S", bound=Struct)


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


class Inventory(Struct, frozen=True):
    """A whole inventory, checked."""

    path: Path
    cluster: Cluster
    coordinator: Coordinator
    hosts: tuple[Host, ...]

    def host(self, name: str) -> Host:
        """One host.

        Raises:
            InventoryError: there is none of this name.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise InventoryError(f"{self.path}: no host {name}: there are {known}")

    def under(self, systemd: Literal["", "user", "system"]) -> Inventory:
        """The same, with this for every host's ``systemd``."""
        hosts = tuple(msgspec.structs.replace(host, systemd=systemd) for host in self.hosts)
        return msgspec.structs.replace(self, hosts=hosts)

    def deal(self, count: int) -> dict[str, str]:
        """Each host's clients of an experiment that has ``count``.

        What no host claims is dealt evenly among the hosts that say nothing, in order; who gets
        none, or says so, is left out.

        Raises:
            InventoryError: a host claims a client that there is not, or nobody takes the rest.
        """
        for host in self.hosts:
            if any(client >= count for client in numbers(host.clients)):
                why = f"the experiment has clients 0 to {count - 1}"
                raise InventoryError(f"{self.path}: hosts.{host.name}.clients: {why}")
        claimed = {client for host in self.hosts for client in numbers(host.clients)}
        free = [client for client in range(count) if client not in claimed]
        takers = [host.name for host in self.hosts if host.clients == ""]
        if free and not takers:
            raise InventoryError(f"{self.path}: no host takes clients {spans(free)}")
        takers = takers[: len(free)]
        bounds = [len(free) * i // max(1, len(takers)) for i in range(len(takers) + 1)]
        shares = itertools.pairwise(bounds)
        dealt = {name: spans(free[a:b]) for name, (a, b) in zip(takers, shares, strict=True)}
        dealt |= {h.name: h.clients for h in self.hosts if h.clients not in ("", NOBODY)}
        return {host.name: dealt[host.name] for host in self.hosts if dealt.get(host.name)}


def load(path: Path) -> Inventory:
    """Read and check an inventory.

    Raises:
        InventoryError: naming the file and the key.
    """
    try:
        table = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise InventoryError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InventoryError(f"{path}: not TOML: {error}") from error
    return parse(table, path)


def parse(table: Mapping[str, Any], path: Path) -> Inventory:
    """An inventory from a plain table.

    Args:
        table: as in the file.
        path: of the file, which errors name and what is relative is relative to.

    Raises:
        InventoryError: naming the file and the key.
    """
    if unknown := sorted(table.keys() - {"cluster", "coordinator", "groups", "hosts"}):
        raise InventoryError(f"{path}: unknown section [{unknown[0]}]")
    cluster = _section(path, table, "cluster", Cluster)
    coordinator = _section(path, table, "coordinator", Coordinator)
    hosts = tuple(_hosts(path, table, cluster))
    if not hosts:
        raise InventoryError(f"{path}: no hosts: want [hosts.NAME] or [groups.NAME]")
    inventory = Inventory(path, cluster, coordinator, hosts)
    if why := _contradiction(inventory):
        raise InventoryError(f"{path}: {why}")
    return inventory


def _section(path: Path, table: Mapping[str, Any], key: str, kind: type[S]) -> S:
    return _convert(path, table.get(key, {}), key, kind)


def _convert(path: Path, value: object, key: str, kind: type[S]) -> S:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise InventoryError(f"{path}: {key}{where.rstrip('`')}: {what}") from error


def _hosts(path: Path, table: Mapping[str, Any], cluster: Cluster) -> Iterator[Host]:
    for name, value in _tables(path, table, "groups"):
        group = _convert(path, value, f"groups.{name}", GroupTable)
        if group.count > 1 and "{i}" not in group.address:
            raise InventoryError(f"{path}: groups.{name}.address: want {{i}} in it")
        if group.clients not in ("", NOBODY):
            raise InventoryError(f"{path}: groups.{name}.clients: hosts cannot share clients")
        for i in range(1, group.count + 1):
            yield _host(path, cluster, f"{name}-{i}", group, str(i))
    for name, value in _tables(path, table, "hosts"):
        yield _host(path, cluster, name, _convert(path, value, f"hosts.{name}", HostTable), "{i}")


def _tables(path: Path, table: Mapping[str, Any], key: str) -> Iterator[tuple[str, object]]:
    tables = table.get(key, {})
    if not isinstance(tables, dict):
        raise InventoryError(f"{path}: {key}: want tables [{key}.NAME]")
    for name, value in tables.items():
        if not re.match(NAME, name):
            want = "want up to 63 letters, digits, '.', '_', '-'"
            raise InventoryError(f"{path}: {key}.{name}: {want}")
        yield name, value


def _host(path: Path, cluster: Cluster, name: str, table: HostTable, i: str) -> Host:
    values = {field: getattr(table, field) for field in HostTable.__struct_fields__}
    values["address"] = table.address.replace("{i}", i)
    values["directory"] = (table.directory or cluster.directory).replace("{i}", i)
    values["python"] = table.python or cluster.python
    config = path.parent / Path(cluster.ssh_config).expanduser() if cluster.ssh_config else None
    return Host(name=name, ssh_config=config and config.absolute(), **values)


def _contradiction(inventory: Inventory) -> str | None:
    claims: dict[int, str] = {}
    places: dict[tuple[str, str, int, str], str] = {}
    names: set[str] = set()
    for host in inventory.hosts:
        if host.name in names:
            return f"hosts.{host.name}: there is one of this name already"
        names.add(host.name)
        if host.name in RESERVED:
            return f"hosts.{host.name}: the name {host.name} is reserved"
        place = (host.address, host.user, host.port, host.directory)
        if place in places:
            return f"hosts.{host.name}: the same address and directory as {places[place]}"
        places[place] = host.name
        if _runs_backwards(host.clients):
            return f"hosts.{host.name}.clients: {host.clients} runs backwards"
        for client in numbers(host.clients):
            if client in claims:
                return f"hosts.{host.name}.clients: {claims[client]} has client {client} already"
            claims[client] = host.name
    here = inventory.coordinator.host
    if here and here not in names:
        return f"coordinator.host: no host {here}"
    if not (config := inventory.cluster.ssh_config):
        return None
    file = inventory.hosts[0].ssh_config
    return None if file and file.exists() else f"cluster.ssh_config: {config} is not there"


# --- clients ---------------------------------------------------------------------


def _bounds(clients: str) -> Iterator[tuple[int, int]]:
    for part in [] if clients in ("", NOBODY) else clients.split(","):
        first, _, last = part.partition("-")
        yield int(first), int(last or first)


def _runs_backwards(clients: str) -> bool:
    return any(first > last for first, last in _bounds(clients))


def numbers(clients: str) -> list[int]:
    """The clients of "0,2,5-7": 0, 2, 5, 6, 7."""
    return [c for first, last in _bounds(clients) for c in range(first, last + 1)]


def spans(clients: Sequence[int]) -> str:
    """Increasing clients as text: 0, 2, 5, 6, 7 is "0,2,5-7"."""
    runs: list[list[int]] = []
    for client in clients:
        if runs and client == runs[-1][1] + 1:
            runs[-1][1] = client
        else:
            runs.append([client, client])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
