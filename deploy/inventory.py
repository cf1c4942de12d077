"""The inventory ``cluster.toml``: which hosts there are, and what each of them does.

Groups are expanded into hosts, defaults filled in, and contradictions refused, each in one line
that names the file and the key.  Paths on a host begin with ``/`` or ``~/``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from deploy.clients import NOBODY, numbers, runs_backwards, spans
from deploy.errors import InventoryError
from deploy.hosts import Cluster, Coordinator, GroupTable, Host, HostTable

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"  # as a node may be called; $ lets "\n" in
RESERVED = ("coordinator", "evaluator")  # names of keys and processes that a run makes itself
S = TypeVar("S", bound=Struct)


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
        if runs_backwards(host.clients):
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
