"""What is wrong with a host, by the facts about it, and what to do about each fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from deploy.hosts import Host
from deploy.inventory import Inventory

LEAST_PYTHON = (3, 10)
DISK_BYTES = 3_000_000_000  # torch, what else is imported, a small model
MEMORY_BYTES = 900_000_000
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")


class Software(msgspec.Struct, frozen=True):
    """What a Python has: versions, or None; ``cuda`` is what torch was built for."""

    python: str
    torch: str | None
    cuda: str | None
    seedwire: str | None
    venv: bool


class Facts(msgspec.Struct, frozen=True):
    """What ``deploy.probe`` says; bytes, None where the host does not say."""

    system: Software | None
    venv: Software | None
    machine: str
    memory: int | None
    available: int | None
    cores: int | None
    disk: int
    writable: bool
    throttled: str | None
    rsync: bool
    gpu: bool
    port: str | None

    @property
    def software(self) -> Software | None:
        """The venv's, or the system's where there is none yet."""
        return self.venv or self.system


class Finding(msgspec.Struct, frozen=True):
    """Something that has to be mended ("fail") or looked at ("warn"), and how."""

    level: Literal["fail", "warn"]
    what: str
    mend: str


def findings(host: Host, inventory: Inventory, facts: Facts, version: str) -> Iterator[Finding]:
    """What is wrong with a host, and what to do about it.

    Args:
        host: of the inventory.
        inventory: says where the coordinator is.
        facts: about the host.
        version: of Seedwire here.
    """
    yield from _of_software(host, facts, version)
    yield from _of_hardware(host, facts)
    if facts.port:
        yield _of_port(facts.port, inventory)


def _of_software(host: Host, facts: Facts, version: str) -> Iterator[Finding]:
    found, push = facts.software, "seedwire cluster push"
    if found is None:
        yield Finding("fail", f"{host.python} does not start", "correct `python` in the inventory")
        return
    if tuple(int(part) for part in found.python.split(".")[:2]) < LEAST_PYTHON:
        why = "install a newer one, and name it as `python` in the inventory"
        yield Finding("fail", f"Python {found.python}, 3.10 is the oldest that will do", why)
    if facts.venv is None and host.venv:
        yield Finding("fail", f"no Python in {host.venv}", "correct `venv` in the inventory")
    elif facts.venv is None and not found.venv:
        name = ".".join(found.python.split(".")[:2])
        yield Finding("fail", "this Python makes no venv", f"sudo apt install python{name}-venv")
    if facts.venv is None or facts.venv.seedwire is None:
        yield Finding("warn", "no Seedwire yet", push)
    elif facts.venv.seedwire != version:
        yield Finding("fail", f"Seedwire {facts.venv.seedwire}, here is {version}", push)
    elif facts.venv.torch is None:
        yield Finding("fail", "no torch in the venv", push)
    if host.device.startswith("cuda") and found.torch and found.cuda is None:
        yield Finding("fail", "its torch is built without CUDA", "install the vendor's torch")
    if not facts.rsync:
        yield Finding("fail", "no rsync", "sudo apt install rsync")


def _of_hardware(host: Host, facts: Facts) -> Iterator[Finding]:
    if facts.machine not in MACHINES:
        yield Finding("fail", f"{facts.machine}: torch has no wheels", "install a 64-bit system")
    if host.device.startswith("cuda") and not facts.gpu:
        yield Finding("fail", "no NVIDIA device", 'install the driver, or device = "cpu"')
    if not facts.writable:
        yield Finding("fail", f"{host.directory} cannot be written", "chown it, or `directory`")
    if facts.disk < DISK_BYTES and facts.venv is None:
        yield Finding("fail", f"{facts.disk / 1e9:.1f} GB of disk free", "make room: 3 GB")
    if facts.available is not None and facts.available < MEMORY_BYTES:
        text = f"{facts.available / 1e6:.0f} MB of memory free"
        yield Finding("warn", text, "end what else runs, or a smaller model: seedwire memory")
    if facts.memory and (host.limits.memory_bytes or 0) > facts.memory:
        text = f"limits.memory is {host.limits.memory}, there is {facts.memory / 1e6:.0f} MB"
        yield Finding("warn", text, "correct `limits` in the inventory")
    if facts.throttled:
        yield Finding("warn", facts.throttled, "a stronger power supply, a fan; then restart it")


def _of_port(port: str, inventory: Inventory) -> Finding:
    address, bind = inventory.coordinator.address, inventory.coordinator.bind
    number = split(address)[1]
    local = "127." in bind or "localhost" in bind
    mend = {
        "refused": f'bind = "tcp://0.0.0.0:{number}"'
        if local
        else "correct coordinator.address: another machine answers there",
        "silent": f"a firewall drops it: sudo ufw allow {number}/tcp on the coordinator's machine",
        "unknown": "correct coordinator.address: the host does not know this name",
        "stranger": "another service has this port: choose another in bind and address",
    }.get(port, "is coordinator.address on a network of this host?")
    return Finding("fail", f"{address} is not reached ({port})", mend)


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of an endpoint."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)
