"""A coordinator, nodes and an evaluator: processes of their own, over real sockets.

Whoever is killed is started again, the coordinator with ``--resume``, as systemd would.
Processes are forked from one that has imported everything, so that a start takes a
hundredth of a second; what runs in them is the command of the product.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import seedwire
from deploy.errors import LabError
from deploy.lab.cgroups import CONTROLLERS, Groups
from deploy.lab.network import Network
from tests.faults import coordinator, node
from tests.faults.actor import die_with_parent
from tests.faults.director import Director
from tests.faults.faults import Fault, Moment
from tests.faults.link import Link, Links
from tests.faults.netns import enter

PATIENCE_SECONDS = 90.0
POLL_SECONDS = 0.02
FAREWELL_SECONDS = 2.0  # for the last goodbye to arrive
NODES = {"node-0": "0,1", "node-1": "2,3", "node-2": "4"}  # the clients of each

METHODS = {
    "scalar": 'name = "fedmezo"\nsteps = 2\nlr = 0.5\neps = 1e-3',
    "sparse": 'name = "flasc"\nsteps = 2\ndensity_up = 0.5\ndensity_down = 0.5\n'
    'local = { kind = "sgd", lr = 0.5 }\nserver = { kind = "sgd", lr = 1.0, momentum = 0.9 }',
    "tiers": 'name = "flasc"\nsteps = 2\ntiers = [0.25, 0.5, 1.0]\n'
    'local = { kind = "sgd", lr = 0.5 }\nserver = { kind = "sgd", lr = 1.0 }',
    "dense": 'name = "fedavg"\nsteps = 2\nlocal = { kind = "sgd", lr = 0.5 }\n'
    'server = { kind = "adam", lr = 0.1 }',
    "averaging": 'name = "fedavg"\nsteps = 2\nlocal = { kind = "sgd", lr = 0.5 }',
    "allreduce": 'name = "fedavg-allreduce"\nsteps = 2\nlocal = { kind = "sgd", lr = 0.5 }\n'
    "plaintext = true\ntimeout_seconds = 5",
}
EXPERIMENT = """
[run]
name = "{method}"
seed = {seed}
[model]
id = "{model}:{size}"
[data]
id = "none.csv"
[partition]
clients = 5
[rounds]
count = {rounds}
deadline_seconds = {deadline_seconds}
evaluate_every = 2
[nodes]
heartbeat_seconds = {heartbeat_seconds}
patience_seconds = {patience_seconds}
return_seconds = {return_seconds}
{more}
[method]
batch_size = 4
{settings}
"""
OPEN = ["--insecure"]  # most faults are the same with keys, and a run starts sooner without
CHUNKED = 60_000  # numbers: so many travel in chunks


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        method: a key of ``METHODS``, or any name where there are ``settings``.
        size: of the model: trained numbers, or LoRA pairs.
        model: see ``trainee.MODELS``.
        settings: lines of the method's table.
        script: what goes wrong.
        linked: nodes that connect through a proxy.
        left_down: processes that are not started again.
        is_secure: with keys, of which each node gets one by a token.
        more: further sections of the experiment file.
        options: of nodes, by name.
        memory: bytes that the memory control group of a process may have, by name.
        must_strike: a fault whose moment never comes is an error.
    """

    method: str = "scalar"
    size: int = 24
    model: str = "tiny"
    settings: str = ""
    seed: int = 5
    rounds: int = 3
    script: Sequence[Fault] = ()
    linked: Collection[str] = ()
    left_down: Collection[str] = ()
    is_secure: bool = False
    must_strike: bool = True
    more: str = ""
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    deadline_seconds: float = 30.0
    return_seconds: float = 20.0
    patience_seconds: float = 2.0
    heartbeat_seconds: float = 0.25

    def write(self, path: Path) -> None:
        """The experiment file."""
        numbers = {"size": self.size, "rounds": self.rounds, "more": self.more}
        numbers |= {"settings": self.settings or METHODS[self.method]}
        numbers |= {
            "model": self.model,
            "seed": self.seed,
            "patience_seconds": self.patience_seconds,
        }
        numbers |= {"heartbeat_seconds": self.heartbeat_seconds}
        numbers |= {"deadline_seconds": self.deadline_seconds}
        numbers |= {"return_seconds": self.return_seconds}
        path.write_text(EXPERIMENT.format(method=self.method, **numbers))


@dataclass(frozen=True)
class Ended:
    """What a run left behind."""

    directory: Path
    seen: list[Moment]
    struck: dict[Fault, float]
    starts: Mapping[str, int]
    seconds: float

    @property
    def fired(self) -> list[Fault]:
        """The faults that have struck, in order."""
        return list(self.struck)

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return found

    @property
    def digest(self) -> str:
        found: str = self.summary["digest"]
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Of a file in the run directory."""
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    @property
    def missing(self) -> dict[int, dict[str, str]]:
        """Who was missing in each committed round, and why."""
        return {m["round"]: m["missing"] for m in self.lines("metrics.jsonl") if "missing" in m}


@dataclass
class Cluster:
    """The processes of one run; ends them all on leaving."""

    plan: Plan
    directory: Path
    network: Network | None = None
    is_cold: bool = False  # processes import everything themselves, as on a real machine
    director: Director = field(init=False)
    links: Links = field(init=False)
    processes: dict[str, Any] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    groups: dict[str, list[Path]] = field(default_factory=dict)  # what to write 0 to
    _groups: Groups | None = None

    def __enter__(self) -> Cluster:
        (self.directory / "logs").mkdir(parents=True)
        self.plan.write(self.directory / "plan.toml")
        self._host = self.network.addresses["coordinator"] if self.network else "127.0.0.1"
        self._port = free_port()
        self.links = Links({name: Link((self._host, self._port)) for name in self.plan.linked})
        if self.plan.is_secure:
            self._issue_token()
        self.director = Director(self.plan.script, self.links, self.network)
        if self.plan.memory:
            self._limit_memory()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
            process.close()
        for link in self.links.values():
            link.close()
        self.director.close()
        if self._groups is not None:
            self._groups.remove()

    def run(self) -> Ended:
        """Start everyone and look after them until the run is over.

        Raises:
            AssertionError: it took too long, or a process gave up by itself; with the logs.
        """
        began = time.monotonic()
        for name in ("coordinator", "evaluator", *NODES):
            self.start(name)
        self.follow(lambda: self.processes["coordinator"].exitcode == 0)
        self._dismiss()
        missed = self.director.missed if self.plan.must_strike else []
        assert not missed, f"never came: {missed}{self.logs()}"
        return Ended(
            self.directory / "run",
            self.director.seen,
            self.director.struck,
            self.starts,
            time.monotonic() - began,
        )

    def follow(self, is_over: Callable[[], bool]) -> None:
        """Start again whoever is killed, until something has come about."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_over():
            for name, process in list(self.processes.items()):
                code = process.exitcode
                if code is not None and code < 0 and name not in self.plan.left_down:
                    self.start(name)
                assert code is None or code <= 0, f"{name} ended with {code}{self.logs()}"
            assert time.monotonic() < deadline, f"the run does not end{self.logs()}"
            time.sleep(POLL_SECONDS)  # a poll of other processes, not a guess at their speed

    def _dismiss(self) -> None:
        """After the run: whoever was away when it ended still looks for it, and is told to end."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        for name, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.terminate()
                process.join(PATIENCE_SECONDS)
            code = process.exitcode
            assert code in (0, -signal.SIGKILL), f"{name} ended with {code}{self.logs()}"

    def start(self, name: str) -> None:
        """Start a process, for the first time or again."""
        if name in self.processes:
            self.processes[name].join()
            self.processes[name].close()
        self.starts[name] += 1
        run = coordinator.run if name == "coordinator" else node.run
        log = self.directory / "logs" / f"{name}.log"
        machine = self.network.path(name) if self.network else None
        groups = self.groups.get(name, [])
        args = (run, self.director.address, name, self._arguments(name), log, machine, groups)
        make = multiprocessing.get_context("spawn") if self.is_cold else _forks()
        self.processes[name] = process = make.Process(target=_be, args=args, daemon=True)
        process.start()

    def exit_code(self, name: str) -> int:
        """How a process ends that must, in good time."""
        process = self.processes[name]
        process.join(PATIENCE_SECONDS)
        code: int | None = process.exitcode
        assert code is not None, f"{name} does not end{self.logs()}"
        return code

    def logs(self) -> str:
        """What every process has said lately, and where it is."""
        last = {moment.who: f"{moment.round} {moment.phase}" for moment in self.director.seen}
        parts = []
        for path in sorted((self.directory / "logs").iterdir()):
            said = path.read_text(errors="replace").splitlines()[-25:]
            parts.append(f"--- {path.stem}, last at {last.get(path.stem)}\n" + "\n".join(said))
        return "\n" + "\n".join(parts)

    def _issue_token(self) -> None:
        """Have the coordinator's keys made, and a token for everyone else."""
        command = ["keys", "token", "--keys", str(self._keys("coordinator")), "--valid", "1d"]
        command += ["--uses", str(len(NODES) + 1), "--out", str(self._token)]
        process = _forks().Process(target=seedwire.app, args=(command,))
        process.start()
        process.join()
        assert process.exitcode == 0

    def _limit_memory(self) -> None:
        """Have groups for the processes.

        Raises:
            LabError: the kernel has none, or they are not for us to make.
        """
        self._groups = made = Groups(f"seedwire-{os.getpid()}")
        if CONTROLLERS["memory"] in made.absent():
            raise LabError("the kernel has no memory groups for us")
        self.groups = {
            name: made.make(name, limit, 0.0) for name, limit in self.plan.memory.items()
        }

    def _keys(self, name: str) -> Path:
        return self.directory / "keys" / name

    @property
    def _token(self) -> Path:
        return self.directory / "token"

    def _guard(self, name: str) -> list[str]:
        """The arguments that say how a process is secured."""
        if not self.plan.is_secure:
            return OPEN
        token = [] if name == "coordinator" else ["--token-file", str(self._token)]
        return ["--keys", str(self._keys(name)), *token]

    def _arguments(self, name: str) -> list[str]:
        guard = self._guard(name)
        if name == "coordinator":
            directory, bind = self.directory / "run", f"tcp://{self._host}:{self._port}"
            if self.starts[name] > 1:
                return ["--resume", str(directory), "--bind", bind, *guard, "--no-evaluator"]
            fresh = ["--experiment", str(self.directory / "plan.toml"), *guard, "--no-evaluator"]
            return [*fresh, "--bind", bind, "--directory", str(directory)]
        direct = f"tcp://{self._host}:{self._port}"
        at = self.links[name].endpoint if name in self.links else direct
        role = ["--evaluate"] if name == "evaluator" else ["--clients", NODES[name]]
        label = "judge" if name == "evaluator" else name  # that name is the coordinator's to give
        options = self.plan.options.get(name, ())
        return ["--coordinator", at, "--name", label, *guard, *role, *options]


def run(plan: Plan, directory: Path, network: Network | None = None) -> Ended:
    """Play a plan to its end, on this machine or on those of a network."""
    with Cluster(plan, directory, network) as cluster:
        return cluster.run()


def free_port() -> int:
    """One that nobody uses just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@cache
def _forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm"])
    return context


def _be(
    run: Callable[[str, str, list[str]], None],
    address: str,
    who: str,
    arguments: list[str],
    log: Path,
    machine: Path | None,
    groups: Sequence[Path],
) -> None:
    """The life of a child, its output in a file."""
    for group in groups:
        group.write_text("0")  # is whoever writes it
    if machine is not None:
        enter(machine)
    die_with_parent()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    run(address, who, arguments)
