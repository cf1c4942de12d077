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
from typing import Any

import msgspec

from deploy.errors import HostError
from deploy.findings import Facts, Finding, findings, split
from deploy.inventory import Inventory
from deploy.parallel import Say
from deploy.ssh import Remote

PROBE = Path(__file__).with_name("probe.py").read_bytes()
LISTENER = Path(__file__).with_name("listener.py").read_text()
PROBE_SECONDS = 120.0  # a board that starts four Pythons from a slow card
CLOCK_TRIES = 3
CLOCK_SECONDS = 5.0


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
    wanted["reach"] = split(inventory.coordinator.address)
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


@contextmanager
def listening(inventory: Inventory, remotes: Sequence[Remote]) -> Iterator[str]:
    """Something answers on the coordinator's port meanwhile, a coordinator or a stand-in.

    Yields:
        "ready", "taken" (whatever has the port already is what hosts will reach), or why not.
    """
    host, port = split(inventory.coordinator.bind)
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
