"""A whole run on a cluster: coordinator, nodes, results home, and nothing left behind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Container, Sequence

from rich.console import Console

from deploy import nodes
from deploy.centre import Centre, CentreHere, CentreThere, Plan
from deploy.errors import HostError
from deploy.local import FAILED, MAX_RESTARTS, STOP_SECONDS
from deploy.machine import log_path, office
from deploy.nodes import Launch, NodeError
from deploy.parallel import Outcome, Say, each
from deploy.ssh import Remote, remotes

WATCH_SECONDS = 5.0
POLL_SECONDS = 0.1
LEAVE_SECONDS = 2 * STOP_SECONDS  # nodes leave first at the end of a run


def run(plan: Plan, console: Console) -> int:
    """Run an experiment on the hosts to its end; returns the exit code.

    Whichever way it ends, also by Ctrl-C, no node is left running, and what there is of results
    and logs is in the run's directory.

    Raises:
        HostError: a host cannot be reached, or its node cannot be started.
    """

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    with remotes(plan.inventory.hosts) as hosts:
        centre = _centre(plan, hosts, say)
        try:
            return _run(plan, hosts, centre, console, say)
        finally:
            with remotes(plan.inventory.hosts) as again:  # the others may have been aborted
                centre.reach_by(again)
                _end(plan, centre, again, console, say)


def _centre(plan: Plan, hosts: Sequence[Remote], say: Say) -> Centre:
    name = plan.inventory.coordinator.host
    there = next((remote for remote in hosts if remote.host.name == name), None)
    return CentreThere(plan, there, say) if there else CentreHere(plan)


def _run(plan: Plan, hosts: Sequence[Remote], centre: Centre, console: Console, say: Say) -> int:
    announced = centre.start()
    if announced is None:
        code = centre.poll()
        return FAILED if code is None else code
    clients = plan.inventory.deal(announced["clients"])
    _write_labels(plan, clients)
    keys = None if plan.insecure else office(plan.inventory, hosts, plan.keys)
    launch = Launch(plan.inventory.coordinator.address, clients, keys)
    taking = [remote for remote in hosts if remote.host.name in clients]
    outcome = each(taking, lambda remote, say: nodes.start(remote, launch, say), console)
    if outcome.failed:
        return _failed(outcome, say)
    return follow(centre, [Watch(remote, launch, say) for remote in taking])


def _write_labels(plan: Plan, nodes: Container[str]) -> None:
    """The inventory's words about the hosts of these nodes, for whoever reads the results."""
    hosts = [host for host in plan.inventory.hosts if host.name in nodes and host.labels]
    if hosts:
        plan.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({host.name: dict(host.labels) for host in hosts}, indent=1)
        (plan.directory / "labels.json").write_text(text + "\n")


def _failed(outcome: Outcome[nodes.Status], say: Say) -> int:
    for name, error in outcome.failed.items():
        say(f"{name}: {error}")
    codes = [error.code for error in outcome.failed.values() if isinstance(error, NodeError)]
    return next((code for code in codes if code), HostError.exit_code)


def _end(plan: Plan, centre: Centre, hosts: Sequence[Remote], console: Console, say: Say) -> None:
    """Nothing runs on; results and logs are here."""
    try:
        centre.stop()
    except HostError as error:
        say(f"the coordinator's results are still on its host: {error}")
    plan.directory.mkdir(parents=True, exist_ok=True)
    logs = plan.directory / "logs"
    logs.mkdir(exist_ok=True)

    def finish(remote: Remote, say: Say) -> None:
        status = nodes.stop(remote, say)
        if status.was != "absent":
            say("log")
            remote.rsync([remote.path(log_path(remote.host)), f"{logs}/"])
            say("stopped, log is here")

    for name, failure in each(hosts, finish, console).failed.items():
        say(f"{name}: {failure}; seedwire cluster down when it is back")


# --- following -------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks after one host's node: starts it again if it was killed, a few times.

    A host that is not reached is left alone: its node goes on, and finds the coordinator by itself.

    Attributes:
        code: that the run has to end with, once it is known.
        has_left: the node has ended as it should.
    """

    def __init__(self, remote: Remote, launch: Launch, say: Say) -> None:
        super().__init__(daemon=True)
        self.code: int | None = None
        self.has_left = False
        self._remote, self._launch, self._say = remote, launch, say
        self._over = threading.Event()
        self._restarts = 0
        self._is_lost = False

    def run(self) -> None:
        name = self._remote.host.name
        while not self._over.wait(WATCH_SECONDS) and self.code is None and not self.has_left:
            try:
                self._look(name)
            except HostError as error:
                if not self._is_lost and not self._over.is_set():
                    self._say(f"{name} is not reached ({error}); its node goes on")
                self._is_lost = True

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        self._remote.abort()
        self.join()

    def _look(self, name: str) -> None:
        status = nodes.status(self._remote)
        if self._is_lost:
            self._say(f"{name} is reached again")
        self._is_lost = False
        killed = status.code is None or status.code > 128
        if status.is_running:
            return
        if status.code == 0:
            self.has_left = True
        elif not killed or self._restarts == MAX_RESTARTS:
            self._say(f"{name}: the node {status.how}: {status.line or 'no output'}")
            self.code = FAILED if killed or status.code is None else status.code
        else:
            self._restarts += 1
            self._say(f"{name}: the node {status.how}; starting it again")
            nodes.start(self._remote, self._launch, lambda text: None)


def follow(centre: Centre, watches: Sequence[Watch]) -> int:
    """Wait for the coordinator and look after the nodes; returns the exit code."""
    for watch in watches:
        watch.start()
    try:
        left_at: float | None = None
        while (code := centre.poll()) is None:
            if failed := [watch.code for watch in watches if watch.code]:
                return failed[0]
            if all(watch.has_left for watch in watches):
                left_at = left_at or time.monotonic()
                if time.monotonic() > left_at + LEAVE_SECONDS:
                    return FAILED
            time.sleep(POLL_SECONDS)
        return code
    finally:
        for watch in watches:
            watch.end()
