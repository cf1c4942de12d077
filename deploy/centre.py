"""The coordinator of a run on a cluster: a child of ours here, or detached on a host."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy import local, nodes
from deploy.errors import HostError
from deploy.inventory import Inventory
from deploy.local import FAILED
from deploy.parallel import Say
from deploy.ssh import Remote

START_SECONDS = 120.0
POLL_SECONDS = 2.0
LISTENS = "listening on"


@dataclass(frozen=True)
class Plan:
    """A run on a cluster.

    Attributes:
        directory: of the run, here; results are brought to it.
        keys: the coordinator's, where it runs here; None is the user's.
        insecure: without keys.
    """

    experiment: Path
    inventory: Inventory
    directory: Path
    overrides: tuple[str, ...] = ()
    keys: Path | None = None
    insecure: bool = False

    @property
    def settings(self) -> list[str]:
        """The coordinator's options that are the same wherever it runs."""
        options = ["--bind", self.inventory.coordinator.bind]
        for override in self.overrides:
            options += ["--set", override]
        return options + (["--insecure"] if self.insecure else [])


class Centre(Protocol):
    """A coordinator."""

    def start(self) -> dict[str, Any] | None:
        """Start it; what it announces once it listens, or None if it has ended before."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def reach_by(self, hosts: Sequence[Remote]) -> None:
        """Use other logins from now on."""

    def stop(self) -> None:
        """End it if it runs, and have its results in the run's directory."""


class CentreHere:
    """On this machine: it ends with us, whatever happens, and its output is ours."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> dict[str, Any] | None:
        plan = self._plan
        command = ["coordinator", "--experiment", str(plan.experiment), "--lifeline"]
        command += ["--directory", str(plan.directory), *plan.settings]
        if plan.keys is not None:
            command += ["--keys", str(plan.keys)]
        self._process = local.start(command, None)
        return local.announcement(plan.directory, self._process)

    def poll(self) -> int | None:
        return self._process.poll() if self._process else FAILED

    def reach_by(self, hosts: Sequence[Remote]) -> None:
        del hosts

    def stop(self) -> None:
        if self._process is not None:
            local.stop([self._process])


class CentreThere:
    """On a host: it goes on while we cannot reach it, and what it says is shown here.

    Args:
        plan: of the run.
        remote: its host.
        say: shows a line.
    """

    def __init__(self, plan: Plan, remote: Remote, say: Say) -> None:
        self._plan, self._remote, self._say = plan, remote, say
        self._directory = remote.host.at("runs", plan.directory.name)
        self._next, self._read = 0.0, 0
        self._is_lost = self._has_started = False

    def start(self) -> dict[str, Any] | None:
        plan, remote, host = self._plan, self._remote, self._remote.host
        file = host.at("runs", f"{plan.directory.name}.toml")
        remote.run(["mkdir", "-p", host.at("runs")], check=True)
        remote.run(["sh", "-c", 'cat > "$1"', "sh", file], stdin=plan.experiment.read_bytes())
        command = [host.interpreter, "-m", "coordinator", "--experiment", file, *plan.settings]
        command += ["--directory", self._directory]
        command += [] if plan.insecure else ["--keys", host.at("keys")]
        if nodes.ask(remote, "status", nodes.COORDINATOR).is_running:
            raise HostError(f"{host.name}: a coordinator runs there already: seedwire cluster down")
        self._has_started = True
        status = nodes.ask(
            remote,
            "start",
            nodes.COORDINATOR,
            timeout=START_SECONDS + 30.0,
            command=command,
            env=nodes.environment(host) | {"COLUMNS": "100"},
            until=LISTENS,
            within=START_SECONDS,
        )
        self._read = status.offset
        if not status.is_running or not status.seen:
            self._show()
            return None
        found = remote.run(["cat", f"{self._directory}/coordinator.json"], check=True)
        announced: dict[str, Any] = json.loads(found.out)
        return announced

    def poll(self) -> int | None:
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + POLL_SECONDS
        try:
            status = self._show()
        except HostError as error:
            if not self._is_lost:
                self._say(f"{self._remote.host.name} is not reached ({error}); its run goes on")
            self._is_lost = True
            return None
        if self._is_lost:
            self._say(f"{self._remote.host.name} is reached again")
        self._is_lost = False
        if status.is_running:
            return None
        return FAILED if status.code is None else status.code

    def reach_by(self, hosts: Sequence[Remote]) -> None:
        name = self._remote.host.name
        self._remote = next(remote for remote in hosts if remote.host.name == name)

    def stop(self) -> None:
        if not self._has_started:
            return
        nodes.ask(self._remote, "stop", nodes.COORDINATOR, timeout=nodes.STOP_SECONDS)
        self._plan.directory.mkdir(parents=True, exist_ok=True)
        source = self._remote.path(f"{self._directory}/")
        self._remote.rsync(["-a", source, f"{self._plan.directory}/"])

    def _show(self) -> nodes.Status:
        """Pass on what it has said since."""
        status = nodes.ask(self._remote, "status", nodes.COORDINATOR, after=self._read)
        whole = status.text.rpartition("\n")[0]
        for line in whole.splitlines():
            self._say(line)
        self._read += len(whole.encode()) + 1 if whole else 0
        return status
