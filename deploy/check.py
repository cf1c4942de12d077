"""Whether hosts are fit for a run: facts by ``deploy.probe``, and what to do about each fault."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from deploy.errors import HostError
from deploy.inventory import Host, Inventory
from deploy.parallel import Say
from deploy.ssh import Remote

PROBE = Path(__file__).with_name("probe.py").read_bytes()
LISTENER = Path(__file__).with_name("listener.py").read_text()
PROBE_SECONDS = 120.0  # a board that starts four Pythons from a slow card
CLOCK_TRIES = 3
CLOCK_SECONDS = 5.0
LEAST_PYTHON = (3, 10)
DISK_BYTES = 3_000_000_000  # torch, what else is imported, a small model
MEMORY_BYTES = 900_000_000
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
UNITS = {"k": 1000.0, "K": 1000.0, "M": 1e6, "G": 1e9}


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One host.

    Attributes:
        facts: None if it could not be asked.
        offset: of its clock to ours, in seconds, known to ``uncertainty``.
    """

    host: str
    facts: Facts | None = None
    offset: float = 0.0
    uncertainty: float = 0.0
    findings: tuple[Finding, ...] = ()

    @property
    def is_fit(self) -> bool:
        return not any(finding.level == "fail" for finding in self.findings)


def unreachable(host: str, why: str) -> Report:
    """The report of a host that could not be asked; ``why`` says what to do."""
    return Report(host=host, findings=(Finding("fail", why, ""),))


def look(remote: Remote, inventory: Inventory, say: Say) -> Report:
    """Look at a host.

    Raises:
        HostError: it cannot be reached, or has no Python.
    """
    host = remote.host
    say("clock")
    offset, uncertainty = clock(remote)
    say("probe")
    wanted: dict[str, Any] = {"interpreter": host.interpreter, "directory": host.directory}
    wanted["reach"] = _split(inventory.coordinator.address)
    command = [host.python, "-", json.dumps(wanted)]
    done = remote.run(command, stdin=PROBE, timeout=PROBE_SECONDS)
    try:
        facts = msgspec.json.decode(done.out, type=Facts)
    except msgspec.DecodeError:
        raise HostError(f"{host.python}: {done.why}") from None
    found = tuple(findings(host, inventory, facts, metadata.version("seedwire")))
    if abs(offset) - uncertainty > CLOCK_SECONDS:
        found += (Finding("warn", f"clock {offset:+.0f} s", "sudo timedatectl set-ntp true"),)
    report = Report(
        host=host.name, facts=facts, offset=offset, uncertainty=uncertainty, findings=found
    )
    say("fit" if report.is_fit else f"{len(found)} to mend")
    return report


def clock(remote: Remote) -> tuple[float, float]:
    """How far a host's clock is ahead of ours, and how far that may be wrong, in seconds.

    Raises:
        HostError: it cannot be reached, or has no Python.
    """
    best = (0.0, float("inf"))
    python = remote.host.python
    for _ in range(CLOCK_TRIES):
        began, start = time.time(), time.monotonic()
        done = remote.run([python, "-c", "import time; print(time.time())"])
        half = (time.monotonic() - start) / 2
        if done.rc != 0:
            raise HostError(f"{python}: {done.why}: sudo apt install python3, or correct `python`")
        if half < best[1]:
            best = (float(done.text) - (began + half), half)
    return best


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
    if facts.memory and bytes_of(host.limits.memory) > facts.memory:
        text = f"limits.memory is {host.limits.memory}, there is {facts.memory / 1e6:.0f} MB"
        yield Finding("warn", text, "correct `limits` in the inventory")
    if facts.throttled:
        yield Finding("warn", facts.throttled, "a stronger power supply, a fan; then restart it")


def _of_port(port: str, inventory: Inventory) -> Finding:
    address, bind = inventory.coordinator.address, inventory.coordinator.bind
    number = _split(address)[1]
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


def bytes_of(size: str) -> float:
    """Bytes of "1500MB"; 0 for ""."""
    number = size.rstrip("kKMGB ")
    unit = size[len(number) :].strip()[:1]
    return float(number) * UNITS.get(unit, 1.0) if number else 0.0


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


@contextmanager
def listening(inventory: Inventory, remotes: Sequence[Remote]) -> Iterator[str]:
    """Something answers on the coordinator's port meanwhile, a coordinator or a stand-in.

    Yields:
        "ready", "taken" (whatever has the port already is what hosts will reach), or why not.
    """
    host, port = _split(inventory.coordinator.bind)
    words = ["-c", LISTENER, host, str(port)]
    there = [r for r in remotes if r.host.name == inventory.coordinator.host]
    process = (
        there[0].stream([there[0].host.python, *words])
        if there
        else subprocess.Popen(  # noqa: S603
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    )
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        yield process.stdout.readline().decode(errors="replace").strip()
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
