"""A coordinator and node processes on this machine, over real TCP, all ended together.

Each child holds the read end of a pipe as its standard input and stops when we are
gone, even by kill -9; and each is in a session of its own, so that Ctrl-C reaches only us,
who then stop them in order.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NODE = "node-{}"
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
MAX_RESTARTS = 3  # of one node that is killed
FAILED = 8  # the exit code of a run that could not go on, as in docs/errors.md

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to start.

    Attributes:
        threads: of torch in each node; 0 shares the machine's cores among the nodes.
        keys: directory of the run's own keys; its processes are given no other.
    """

    experiment: Path
    nodes: int
    directory: Path
    overrides: tuple[str, ...] = ()
    threads: int = 0
    keys: Path = Path()

    @property
    def state(self) -> Path:
        """What nodes keep for a restart, by name; gone once the run is over."""
        return self.directory / "state"

    @property
    def token(self) -> Path:
        """The file by which the nodes enrol."""
        return self.keys / "token"


@dataclass
class Node:
    """A node's process, and the clients it hosts."""

    clients: str
    process: subprocess.Popen[bytes]


@dataclass
class Cluster:
    """The processes of one run."""

    coordinator: subprocess.Popen[bytes]
    nodes: dict[str, Node] = field(default_factory=dict)


def run(plan: Plan, say: Say) -> int:
    """Run an experiment to its end; returns the exit code.

    Keys are made for this run alone.  Neither they nor any process that was started are left
    behind, whichever way this function ends.
    """
    with tempfile.TemporaryDirectory(prefix="seedwire-keys-") as keys:  # mode 700
        plan = replace(plan, keys=Path(keys))
        token = ["keys", "token", "--keys", keys, "--uses", str(plan.nodes), "--valid", "1d"]
        made = start(["seedwire", *token, "--out", str(plan.token)], None)
        try:
            if (code := made.wait() or _run(plan, say)) == 0:
                _forget(plan)
            return code
        finally:
            stop([made])


def _run(plan: Plan, say: Say) -> int:
    command = ["coordinator", "--experiment", str(plan.experiment), "--lifeline"]
    command += ["--bind", "tcp://127.0.0.1:*", "--directory", str(plan.directory)]
    command += ["--keys", str(plan.keys)]
    for override in plan.overrides:
        command += ["--set", override]
    cluster = Cluster(start(command, None))
    try:
        announced = announcement(plan.directory, cluster.coordinator)
        if announced is None:
            return cluster.coordinator.wait()
        for name, clients in _deal(announced["clients"], plan.nodes).items():
            process = _start_node(plan, name, clients, announced["endpoint"])
            cluster.nodes[name] = Node(clients, process)
        pids = {name: node.process.pid for name, node in cluster.nodes.items()}
        pids = {"coordinator": cluster.coordinator.pid, **pids}
        (plan.directory / "pids.json").write_text(json.dumps(pids, indent=2) + "\n")
        return _follow(cluster, plan, announced["endpoint"], say)
    finally:
        stop([cluster.coordinator, *(node.process for node in cluster.nodes.values())])


def _forget(plan: Plan) -> None:
    """Remove what the nodes kept for a restart: of each as much as all that is trained."""
    for i in range(plan.nodes):
        shutil.rmtree(plan.state / NODE.format(i), ignore_errors=True)
    with suppress(OSError):  # not there, or something of somebody else is in it
        plan.state.rmdir()


def start(arguments: list[str], log: Path | None) -> subprocess.Popen[bytes]:
    """Start a module of ours, with its output in a log or, without one, as our own."""
    command = [sys.executable, "-m", *arguments]
    env = os.environ | {"PYTHONSAFEPATH": "1"}  # a folder "node" in here must not shadow ours
    with (log or Path(os.devnull)).open("ab") as file:
        output = file if log else None
        return subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=env,
        )


def _start_node(plan: Plan, name: str, clients: str, endpoint: str) -> subprocess.Popen[bytes]:
    threads = plan.threads or max(1, (os.cpu_count() or 1) // plan.nodes)
    command = ["node", "--coordinator", endpoint, "--name", name, "--clients", clients]
    command += ["--threads", str(threads), "--lifeline"]
    command += ["--state", str(plan.state / name)]
    command += ["--keys", str(plan.keys), "--token-file", str(plan.token)]
    return start(command, _log(plan.directory, name))


def _log(directory: Path, name: str) -> Path:
    return directory / "logs" / f"{name}.log"


def announcement(directory: Path, coordinator: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """What the coordinator says once it listens, or None when it ended before."""
    path = directory / "coordinator.json"
    while coordinator.poll() is None:
        if path.exists():
            announced: dict[str, Any] = json.loads(path.read_text())
            if announced["pid"] == coordinator.pid:  # else an earlier run's, in this directory
                return announced
        time.sleep(POLL_SECONDS)
    return None


def _deal(clients: int, nodes: int) -> dict[str, str]:
    """Consecutive clients for each node, as even as can be; no node without a client."""
    nodes = min(nodes, clients)
    bounds = [clients * i // nodes for i in range(nodes + 1)]
    spans = itertools.pairwise(bounds)
    return {NODE.format(i): f"{a}-{b - 1}" for i, (a, b) in enumerate(spans)}


def _follow(cluster: Cluster, plan: Plan, endpoint: str, say: Say) -> int:
    """Wait for the coordinator, and look after the nodes.

    One that was killed is started again, a few times; one that gave up by itself, e.g.
    for want of its model, ends the run.
    """
    restarts: Counter[str] = Counter()
    left: set[str] = set()
    while cluster.coordinator.poll() is None:
        for name, node in cluster.nodes.items():
            code = node.process.poll()
            if code is None or name in left:
                continue
            if code == 0:
                left.add(name)
            elif code > 0 or restarts[name] == MAX_RESTARTS:
                say(f"{name} {_how(code)}: {_last_line(_log(plan.directory, name))}")
                return code if code > 0 else FAILED
            else:
                restarts[name] += 1
                say(f"{name} {_how(code)}; starting it again")
                node.process = _start_node(plan, name, node.clients, endpoint)
        if len(left) == len(cluster.nodes) and _outlives(cluster.coordinator):
            say("every node has left; stopping")
            return FAILED
        time.sleep(POLL_SECONDS)
    return cluster.coordinator.returncode


def _outlives(coordinator: subprocess.Popen[bytes]) -> bool:
    """Nodes leave first at the end of a run: give the coordinator time to follow them."""
    try:
        coordinator.wait(2 * STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no output"


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to end, then make them."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
