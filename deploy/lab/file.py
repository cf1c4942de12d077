"""``lab.toml``: which hosts a lab has, and what each has of memory, processors and network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from deploy.errors import LabError
from deploy.lab.network import SWITCH, Link

NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"  # a label of a host's name
MAX_HOSTS = 250
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

S = TypeVar("S", bound=Struct)
Size = Annotated[str, Meta(pattern=r"^([0-9]+(\.[0-9]+)? ?[kKMG]?B)?$")]
Rate = Annotated[str, Meta(pattern=r"^([0-9]+(\.[0-9]+)?[kmg]?bit)?$")]
Cores = Annotated[float, Meta(ge=0, le=4096)]
Milliseconds = Annotated[float, Meta(ge=0, le=60_000)]
Percent = Annotated[float, Meta(ge=0, le=99)]


class Shape(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be limited; what a profile does not set it leaves to the others.

    Attributes:
        memory: of all processes of the host together: 4GB; "" is no cap.
        cpus: cores' time; 0 is no cap.
        down: rate towards the host: 30mbit; "" is no cap.
        up: rate from it.
        rtt_ms: added to a round trip.
        loss_percent: packets lost on each way.
    """

    memory: Size | UnsetType = UNSET
    cpus: Cores | UnsetType = UNSET
    down: Rate | UnsetType = UNSET
    up: Rate | UnsetType = UNSET
    rtt_ms: Milliseconds | UnsetType = UNSET
    loss_percent: Percent | UnsetType = UNSET


# Sources are in docs/lab.md.
PROFILES = {
    "pi4": Shape(memory="4GB", cpus=4, down="1gbit", up="1gbit"),
    "pi5": Shape(memory="8GB", cpus=4, down="1gbit", up="1gbit"),
    "jetson-orin-nano": Shape(memory="8GB", cpus=6, down="1gbit", up="1gbit"),
    "wifi": Shape(down="30mbit", up="15mbit", rtt_ms=2),
    "lte": Shape(down="12mbit", up="12mbit", rtt_ms=70),
}


class HostTable(Shape, frozen=True, kw_only=True):
    """The keys of ``[hosts.NAME]``.

    Attributes:
        count: hosts of this kind, NAME-1, NAME-2, ...; 0 is one, called NAME.
        profiles: applied in this order, a later one over an earlier one.
        inventory: keys of each host's table in cluster.toml, as they are.
    """

    count: Annotated[int, Meta(ge=0, le=MAX_HOSTS)] = 0
    profiles: tuple[str, ...] = ()
    inventory: Mapping[str, Any] = {}


class LabTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``[lab]``.

    Attributes:
        network: of the hosts; this machine has its first address.
        coordinator: the host on which ``seedwire cluster`` starts it; "" is this machine.
        port: where it listens.
        packages: whether the hosts' Python finds the packages of the one that runs this, torch
            among them, as a board finds its vendor's.
        inventory: keys of every host's table in cluster.toml, as they are.
    """

    network: str = "10.66.0.0/24"
    coordinator: str = ""
    port: Annotated[int, Meta(ge=1, le=65535)] = 5555
    packages: bool = True
    inventory: Mapping[str, Any] = {}


class File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file, as it is written."""

    lab: LabTable = LabTable()
    hosts: Mapping[str, Any]


@dataclass(frozen=True)
class Host:
    """One host, nothing left to be filled in.

    Attributes:
        memory: bytes; 0 is no cap.
        cpus: cores' time; 0 is no cap.
    """

    name: str
    address: str
    profiles: tuple[str, ...]
    memory: int
    cpus: float
    link: Link
    inventory: Mapping[str, Any]


@dataclass(frozen=True)
class Lab:
    """A lab, checked.

    Attributes:
        bits: of the prefix of its network.
        here: this machine's address in it.
        coordinator: a host, or "" for this machine.
        packages: whether the hosts' Python finds ours.
    """

    bits: int
    here: str
    coordinator: str
    port: int
    packages: bool
    hosts: tuple[Host, ...]


def load(path: Path) -> Lab:
    """Read and check a lab's file.

    Raises:
        LabError: naming the file and the key.
    """
    try:
        return resolve(_convert(msgspec.toml.decode(path.read_bytes()), "", File))
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from error
    except LabError as error:
        raise LabError(f"{path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LabError(f"{path}: not TOML: {error}") from error


def resolve(file: File) -> Lab:
    """A lab from its file: hosts counted out, profiles combined, addresses dealt in order.

    Raises:
        LabError: naming the key.
    """
    kinds = {name: _convert(v, f"hosts.{name}", HostTable) for name, v in file.hosts.items()}
    tables = _counted(kinds)
    if not 0 < len(tables) <= MAX_HOSTS:
        raise LabError(f"hosts: want 1 to {MAX_HOSTS}, not {len(tables)}")
    try:
        network = ipaddress.IPv4Network(file.lab.network)
    except ValueError as error:
        raise LabError(f"lab.network: {error}") from error
    if network.num_addresses - 3 < len(tables):
        raise LabError(f"lab.network: {network} has no room for {len(tables)} hosts and us")
    if file.lab.coordinator not in ("", *tables):
        raise LabError(f"lab.coordinator: no host {file.lab.coordinator}")
    here, *others = (str(network[i]) for i in range(1, len(tables) + 2))
    hosts = tuple(
        _host(name, table, address, file.lab.inventory)
        for (name, table), address in zip(tables.items(), others, strict=True)
    )
    table = file.lab
    return Lab(network.prefixlen, here, table.coordinator, table.port, table.packages, hosts)


def _convert(value: object, key: str, kind: type[S]) -> S:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        at = f"{key}{where.rstrip('`')}".lstrip(".")
        raise LabError(f"{at}: {what}" if at else what) from error


def _counted(tables: Mapping[str, HostTable]) -> dict[str, HostTable]:
    found: dict[str, HostTable] = {}
    for key, table in tables.items():
        names = [f"{key}-{i}" for i in range(1, table.count + 1)] or [key]
        for name in names:
            if not re.fullmatch(NAME, name):
                raise LabError(f"hosts.{key}: want up to 32 small letters, digits and '-'")
            if name == SWITCH or name in found:
                raise LabError(f"hosts.{key}: the name {name} is taken")
            found[name] = table
    return found


def _host(name: str, table: HostTable, address: str, inventory: Mapping[str, Any]) -> Host:
    shape: dict[str, Any] = {}
    for profile in table.profiles:
        if profile not in PROFILES:
            known = ", ".join(PROFILES)
            raise LabError(f"hosts.{name}.profiles: no profile {profile}: there are {known}")
        shape |= _set(PROFILES[profile])
    shape |= _set(table)
    link = Link(
        down=rate(shape.get("down", "")),
        up=rate(shape.get("up", "")),
        rtt_ms=shape.get("rtt_ms", 0.0),
        loss_percent=shape.get("loss_percent", 0.0),
    )
    return Host(
        name=name,
        address=address,
        profiles=table.profiles,
        memory=size(shape.get("memory", "")),
        cpus=shape.get("cpus", 0.0),
        link=link,
        inventory={**inventory, **table.inventory},
    )


def _set(shape: Shape) -> dict[str, Any]:
    values = {name: getattr(shape, name) for name in Shape.__struct_fields__}
    return {name: value for name, value in values.items() if value is not UNSET}


def size(text: str) -> int:
    """Bytes of "300MB", powers of 1000; "" is 0."""
    return _scaled(text.removesuffix("B"))


def rate(text: str) -> int:
    """Bits a second of "30mbit"; "" is 0."""
    return _scaled(text.removesuffix("bit"))


def _scaled(text: str) -> int:
    digits = text.rstrip("kKMmGg ")
    return round(float(digits or 0) * UNITS[text[len(digits) :].strip().lower()])
