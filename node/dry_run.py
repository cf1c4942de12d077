"""``seedwire node --dry-run``: all that a node does before it needs torch, and what came of it.

It parses, reads keys, finds the machine's meters, and asks the coordinator's port who is there;
it logs in nowhere, enrols nobody and writes nothing.  What it is made of is what a node holds
while it waits for a run, so its resident memory is what that costs a board.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import msgspec

from node import energy
from node.admission import Admission
from node.files import text
from node.machine import Machine
from node.session import Session  # noqa: F401 - what a node holds: it is to be in the figure
from node.start import Start, mending
from protocol import keys
from protocol.channel import read_refusal, to_node
from protocol.channel import to_coordinator as outward
from protocol.dealer import Dealer
from protocol.errors import (
    ExperimentError,
    KeyRefusedError,
    KeyStoreError,
    ModelError,
    NetworkError,
    SeedwireError,
)
from protocol.keys import Identity
from protocol.messages import Beat, Refuse
from protocol.parts import Limits
from protocol.wire import VersionError

ANSWER_SECONDS = 5.0
ASK_SECONDS = 1.0  # between two questions: one may be lost while the connection is being made


class Report(msgspec.Struct, kw_only=True):
    """What a dry run found; what the machine does not say is None, never zero.

    Attributes:
        is_ready: a node started now would take part.
        exit_code: 0, or that of the first problem.
        problems: a line each, with what to do.
        admitted: the coordinator answered, and admits the key; None if that could not be asked.
        energy: the meter, as the class that reads it.
        memory_limit: bytes that the control group may have.
        torch, numba: versions installed; torch is looked for and not loaded.
        resident, resident_peak: bytes of this process, at the end of the dry run.
    """

    is_ready: bool = True
    exit_code: int = 0
    problems: list[str] = []
    node: str
    coordinator: str
    clients: list[int]
    limits: Limits | None
    admitted: bool | None = None
    energy: str | None = None
    memory_limit: int | None = None
    celsius: float | None = None
    cores: int | None = None
    python: str
    system: str
    architecture: str
    seedwire: str
    torch: str | None
    numba: str | None
    resident: int | None = None
    resident_peak: int | None = None


def look(start: Start) -> Report:
    """Go through everything; one fault does not hide the next."""
    it, setup, machine = start.admission, start.setup, Machine()
    report = Report(
        node=it.name,
        coordinator=it.endpoint,
        clients=list(setup.clients),
        limits=setup.limits,
        memory_limit=machine.group().limit,
        celsius=machine.celsius(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        seedwire=metadata.version("seedwire"),
        torch=_installed("torch"),
        numba=_installed("numba"),
    )
    with _noting(report):
        if report.torch is None:
            raise ModelError("torch is not installed here: pip install torch, or the vendor's")
    with _noting(report):
        report.energy = _meter(setup.energy, setup.device)
    with _noting(report):
        _try_state(setup.state)
    with _noting(report):
        report.admitted = _ask(start)
    report.resident, report.resident_peak = _kib("VmRSS"), _kib("VmHWM")
    return report


@contextmanager
def _noting(report: Report) -> Iterator[None]:
    try:
        yield
    except SeedwireError as error:
        report.is_ready = False
        report.exit_code = report.exit_code or error.exit_code
        report.problems = [*report.problems, str(error)]


def _installed(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a vendor's build beside the package system
        return "unknown"


def _meter(command: str, device: str) -> str | None:
    """The meter that a node would read; a command of the user's has to say a number."""
    meter = energy.find(command, device=device)
    if meter is None:
        return None
    joules = meter.joules()
    meter.close()
    if joules is None and command:
        raise ExperimentError(f"--energy {command}: it prints no number")
    return type(meter).__name__.lower()


def _try_state(state: Path | None) -> None:
    """Whether the directory is there, or can be made."""
    if state is None:
        return
    place = state.absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ExperimentError(f"cannot keep state in {state}: {place} cannot be written")


def _ask(start: Start) -> bool | None:
    """Whether the coordinator admits this node; None if only a login could tell."""
    identity, it = _identity(start), start.admission
    dealer = Dealer(it.endpoint, identity)
    try:
        if identity is not None and it.token is not None and identity == it.token.identity:
            return None  # the only word that a token may say is the enrolment itself
        return _answers(dealer, it.endpoint)
    except KeyRefusedError as error:
        if it.token is not None:
            return None  # a node would enrol now
        raise KeyRefusedError(f"{error}: {mending(it)}") from error
    finally:
        dealer.close()


def _identity(start: Start) -> Identity | None:
    """As ``Admission.identity``, and nothing is written or handed in."""
    it: Admission = start.admission
    if start.is_insecure or start.given is not None:
        return start.given
    try:
        own, trusted = keys.load(it.directory, it.name), keys.pinned(it.directory)
    except OSError as error:
        raise KeyStoreError(f"cannot read keys in {it.directory}: {error.strerror}") from error
    if own is not None and trusted is not None:
        return Identity(own, trusted)
    return it.token.identity if it.token is not None else it.identity()  # says what it lacks


def _answers(dealer: Dealer, endpoint: str) -> bool:
    """Say a word that no stranger may: a coordinator that admits the key says "log in first"."""
    until = time.monotonic() + ANSWER_SECONDS
    while (left := until - time.monotonic()) > 0:
        dealer.send(outward.pack(Beat()))
        frames = dealer.recv(min(left, ASK_SECONDS))
        if frames is None:
            continue
        try:
            answer, _ = to_node.unpack(frames)
        except VersionError as error:
            refusal = read_refusal(frames)
            why = refusal.reason if refusal else str(error)
            raise NetworkError(f"{endpoint}: {why}: install the same seedwire on both") from error
        if isinstance(answer, Refuse):
            return True
    raise NetworkError(f"no coordinator answers at {endpoint}: does it run, is its port open?")


def _kib(field: str) -> int | None:
    for line in text(Path("/proc/self/status")).splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def describe(report: Report) -> str:
    """A line for each thing found."""
    lines = [f"{'ready' if report.is_ready else 'not ready'}: node {report.node}"]
    lines += [f"problem: {line}" for line in report.problems]
    for name, value in msgspec.to_builtins(report).items():
        if name not in ("is_ready", "exit_code", "problems", "node"):
            lines.append(f"{name.replace('_', ' '):14} {_said(name, value)}")
    return "\n".join(lines)


def _said(name: str, value: object) -> str:
    if isinstance(value, int) and name in ("memory_limit", "resident", "resident_peak"):
        return f"{value / 1e6:.1f} MB"
    return "unknown" if value is None else str(value)
