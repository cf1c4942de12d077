"""The shell in virtual time: real frames, a real recorder, scripted faults, no sockets."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

from coordinator import eventlog, results, rounds, totals
from coordinator import events as kinds
from coordinator.central import Central
from coordinator.desk import SETTLE_SECONDS
from coordinator.executor import Settings
from coordinator.journal import Journal
from coordinator.policy import policy
from coordinator.record import RunRecorder
from coordinator.run import TURN_SECONDS
from coordinator.server import Server
from coordinator.state import Evaluating, Gathering, State
from fedalgos import registry
from fedalgos.method import Assignment, Work
from fedalgos.space import ParamSpace, digest
from protocol import experiment as experiments
from protocol import payload, wire
from protocol.blobs import CHUNK_BYTES, FAST_CHUNK_BYTES, INLINE_BYTES, WINDOW, Inbox, Outbox
from protocol.channel import read_refusal, to_coordinator, to_node
from protocol.experiment import Nodes
from protocol.messages import (
    Beat,
    Bye,
    Chunk,
    Evaluate,
    Failed,
    Hello,
    Message,
    Pull,
    Ready,
    Refuse,
    Reject,
    Score,
    Step,
    Sync,
    Task,
    Update,
    Welcome,
)
from protocol.messages import Beat as Heartbeat
from protocol.meter import HANDSHAKE, Key, Way
from protocol.noise import STREAM
from protocol.parts import Cost, Progress, TensorInfo, Vitals
from protocol.payload import Dense, Flat, ScalarsSpec
from protocol.tcp import Growth
from protocol.wire import VERSION, Frame
from tests.fakes import FakeNet, Frames
from tests.oracles import Quadratic, space_of

M = TypeVar("M", bound=Message)
Said = tuple[Message, memoryview | None]
TURN = 0.25
MEZO = {"name": "fedmezo", "lr": 0.01, "steps": 1}
AVG = {"name": "fedavg", "steps": 1}
SCALARS = {"name": "spry", "wire": "scalars", "local": {"kind": "sgd", "lr": 0.1}}
QUIET = {"heartbeat_seconds": 1000.0, "patience_seconds": 1e5, "return_seconds": 10.0}
TINY, SMALL, LARGE = space_of(10, 6), space_of(500), space_of(650_001, 10)


class Run:
    """A server on a fake network, and the peers that talk to it."""

    def __init__(
        self, directory: Path, space: ParamSpace = TINY, resumes: bool = False, **sections: Any
    ) -> None:
        table: dict[str, Any] = {
            "run": {"name": "test", "seed": 4},
            "model": {"id": "random:x"},
            "data": {"id": "x.csv"},
            "partition": {"clients": 4},
            "method": MEZO,
            "nodes": QUIET,
            "rounds": {"count": 2, "deadline_seconds": 10.0},
        }
        for name, values in sections.items():
            table[name] = values if name == "method" else table.get(name, {}) | values
        self.directory, self.space = directory, space
        self.experiment = experiments.convert(table, "test")
        self.settings = registry.settings(self.experiment.method)
        self.method = registry.build(self.settings, space, 4)
        self.x0 = np.linspace(-1, 1, space.size, dtype=np.float32)
        self.net = FakeNet(on_send=self.hear)
        self.policy = policy(self.experiment)
        settings = Settings("test-1", "1.0", self.experiment, self.policy)
        self.open = Journal(directory, is_new=not resumes)
        self.recorder = RunRecorder(directory, self.experiment, self.open)
        self.recorder.resume() if resumes else self.recorder.begin()
        self.net.now = self.recorder.account.now
        self.server = Server(settings, self.net, self.recorder, self.net.clock, self.open)
        self.recorder.attach(self.server.desk.meter)
        if resumes:
            self.server.resume()
        self.peers: dict[bytes, Peer] = {}

    def hear(self, peer: bytes, frames: Frames) -> None:
        if peer in self.peers:
            self.peers[peer].hear([bytes(frame) for frame in frames])

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.server.turn(TURN)

    def finish(self) -> dict[str, Any]:
        """To the end; returns the summary."""
        self.until(lambda: self.server.finished is not None)
        assert self.server.finished is not None
        assert self.server.central is not None
        assert (
            self.server.executor.intake.updates == {}
        )  # whatever happened, nothing is left behind
        failure, ended = self.server.finished.reason, self.server.state.ended
        return self.recorder.finish(self.server.central, failure, ended)

    def events(self, kind: type[Any]) -> list[Any]:
        return [e for e in self.journal() if isinstance(e, kind)]

    def journal(self) -> Iterator[kinds.Event]:
        return eventlog.read(self.open)

    def refusal(self) -> Refuse:
        """The last message sent, which must be one."""
        refusal = read_refusal(self.net.sent[-1][1])
        assert refusal is not None
        return refusal


class Peer:
    """A node that keeps to the protocol, with a replica; ``answer`` scripts its faults."""

    def __init__(self, run: Run, name: str, *clients: int, peer: bytes = b"") -> None:
        self.run, self.name, self.clients = run, name, clients
        self.peer = peer or f"{name}'s connection".encode()
        self.x, self.version, self.delay = run.x0, 0, 0.1
        self.answer: Callable[[Task], list[Said]] = lambda task: [self.update(task)]
        self.heard: list[Message] = []
        self.up: list[Message] = []
        self.outbox, self.inbox = Outbox(), Inbox[list[Any]](time.monotonic)
        self.jobs: deque[list[Any]] = deque()
        run.peers[self.peer] = self

    @property
    def evaluates(self) -> bool:
        return not self.clients

    def hello(self, **changes: Any) -> Hello:
        role: Any = "evaluate" if self.evaluates else "train"
        hello = Hello(node=self.name, software="1.0", stream=STREAM, role=role)
        return msgspec.structs.replace(hello, **{"clients": self.clients, **changes})

    def login(self, at: float = 0.0, **changes: Any) -> Peer:
        self.run.net.deliver(at, self.peer, to_coordinator.pack(self.hello(**changes)))
        return self

    def say(self, message: Any, data: memoryview | None = None, delay: float = 0.0) -> None:
        if data is not None and len(data) > INLINE_BYTES and not isinstance(message, Chunk):
            message = msgspec.structs.replace(message, blob=self.outbox.put(data, once=True))
            data = None
        self.up.append(message)
        net = self.run.net
        net.deliver(net.now + delay, self.peer, to_coordinator.pack(message, data))

    def told(self, kind: type[M]) -> list[M]:
        return [m for m in self.heard if isinstance(m, kind)]

    def hear(self, frames: list[bytes]) -> None:
        message, buffer = to_node.unpack(frames)
        self.heard.append(message)
        match message:
            case Welcome():
                self.say(*self.ready(), delay=self.delay)
            case Step() | Task() | Evaluate():
                job = [message, buffer, not isinstance(message, Step) or message.blob is None]
                self.jobs.append(job)
                if isinstance(message, Step) and message.blob is not None:
                    assert message.payload is not None
                    nbytes = message.payload.nbytes
                    for pull in self.inbox.open(b"", message.blob, nbytes, job):
                        self.say(pull)
                self.work()
            case Pull():
                self.say(*self.outbox.answer(message))
            case Chunk():
                pulls, arrived = self.inbox.take(b"", message, buffer)
                for pull in pulls:
                    self.say(pull)
                if arrived is not None:
                    arrived.item[1:] = [arrived.data, True]
                    self.work()
            case _:
                pass

    def work(self) -> None:
        while self.jobs and self.jobs[0][2]:
            message, data, _ = self.jobs.popleft()
            match message:
                case Step():
                    self.apply(message, data)
                case Task():
                    assert message.version == self.version
                    for said in self.answer(message):
                        self.say(*said, delay=self.delay)
                case Evaluate():
                    assert message.version == self.version
                    score = Score(version=self.version, loss=2.0, metric=0.5, examples=9)
                    self.say(score, delay=self.delay)
                case _:
                    raise AssertionError(f"no job: {message}")

    def apply(self, step: Step, data: Frame) -> None:
        assert step.payload is not None
        value = payload.decode(step.payload, data)
        if step.snapshot:
            self.x = value.values.copy()
        else:
            assert self.run.method.absolute or step.version == self.version + 1
            base = self.run.x0 if self.run.method.onto == "initial" else self.x
            self.x = self.run.method.apply(base, step.round, value)
        self.version = step.version
        assert digest(self.x) == step.digest

    def ready(self) -> Said:
        costs = (Cost("load", 1.0, 5_000_000), Cost("inference", 0.1, 6_000_000))
        space = self.run.space
        ready = Ready(version=self.version, digest=digest(self.x), space=space.digest, costs=costs)
        if not self.evaluates:
            return ready, None
        whole = Dense(self.x)
        spec = payload.spec_of(whole)
        ready = msgspec.structs.replace(ready, tensors=space.tensors, payload=spec)
        return ready, payload.encode(whole)

    def update(self, task: Task, x: Flat | None = None) -> Said:
        oracle = Quadratic(np.full(self.run.space.size, 1 + task.client, np.float32))
        asked = Assignment(task.client, task.units, task.lr, task.picks, tier=task.tier)
        work = Work(task.round, asked)
        value, _ = self.run.method.local(self.x, oracle, [None], work)
        if x is not None:
            value = Dense(x)
        update = Update(
            round=task.round,
            attempt=task.attempt,
            client=task.client,
            examples=task.client + 1,
            loss=0.5 + task.client,
            payload=payload.spec_of(value),
            costs=(Cost("train", 0.5, 7_500_000), Cost("encode", 0.25)),
        )
        return update, payload.encode(value)


Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    runs: list[Run] = []

    def build(*args: Any, **sections: Any) -> Run:
        directory = tmp_path / f"run-{len(runs)}"
        directory.mkdir()
        runs.append(Run(directory, *args, **sections))
        return runs[-1]

    yield build
    for run in runs:
        run.open.close()


def two_nodes(run: Run) -> tuple[Peer, Peer, Peer]:
    """Nodes a and b with two clients each, and the evaluator, all logging in at once."""
    peers = Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")
    for peer in peers:
        peer.login()
    return peers


# --- runs without faults ---------------------------------------------------------


def test_a_run_is_read_whatever_the_texts_of_a_node_have_in_them(make: Make) -> None:
    run = make()
    a, *_ = two_nodes(run)
    odd = "hot\u2028\u0085\n\r\x00 \u20ac"

    def answer(task: Task) -> list[Said]:
        update, data = a.update(task)
        return [(msgspec.structs.replace(update, vitals=Vitals(throttled=odd)), data)]

    a.answer = answer
    run.finish()
    (result,) = results.read(run.directory)
    assert {node["node"]: node["throttled"] for node in result.nodes} == {"a": odd, "b": None}


def test_what_is_saved_of_a_run_does_not_grow_with_its_rounds(make: Make) -> None:
    """Or each commit would write all that was before it."""
    run = make(rounds={"count": 40, "evaluate_every": 1})
    two_nodes(run)
    sizes: list[int] = []

    def is_over() -> bool:
        kept = run.open.record("account", "")
        sizes.append(len(kept.plain) if kept else 0)
        return run.server.finished is not None

    run.until(is_over)
    rounds = run.recorder.account.num_rounds
    assert rounds == 40
    assert sizes[-1] - sizes[len(sizes) // 4] < rounds  # numbers get longer


def test_two_nodes_two_rounds(make: Make) -> None:
    run = make()
    a, b, evaluator = two_nodes(run)
    summary = run.finish()
    assert [(t.round, t.client) for t in a.told(Task)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(t.round, t.client) for t in b.told(Task)] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert [(e.version, e.last) for e in evaluator.told(Evaluate)] == [
        (0, False),
        (1, False),
        (2, True),
    ]
    assert summary["status"] == "completed"
    assert summary["rounds"] == 2
    assert run.net.now == pytest.approx(0.6)  # ready, 3 evaluations, 2 rounds: 0.1 each


def test_a_replica_that_replays_the_steps_equals_the_server_to_the_bit(make: Make) -> None:
    run = make(rounds={"count": 3})
    a, b, evaluator = two_nodes(run)
    run.finish()
    central = run.server.central
    assert central is not None
    assert evaluator.version == central.version == 3
    assert evaluator.x.tobytes() == central.x.tobytes()
    assert (central.x != run.x0).all()
    assert a.version == b.version == 2  # the last step is nobody's business any more
    assert digest(a.x) == digest(b.x) == [s.digest for s in evaluator.told(Step)][1]


def test_the_step_weighs_clients_by_their_examples(make: Make) -> None:
    run = make(method=AVG, rounds={"count": 1})
    two_nodes(run)
    run.finish()
    lr, n = 0.1, np.array([1, 2, 3, 4])  # client c has c + 1 examples and gradient c + 1
    assert run.server.central is not None
    np.testing.assert_allclose(run.server.central.x, run.x0 - lr * (n @ n) / n.sum(), rtol=1e-5)


def test_the_same_frames_in_another_order_give_the_same_parameters(
    make: Make, tmp_path: Path
) -> None:
    digests = set()
    for delay in (0.1, 0.3):
        run = make(method=AVG)
        a, *_ = two_nodes(run)
        a.delay = delay
        digests.add(run.finish()["digest"])
    assert len(digests) == 1


def test_the_journal_rebuilds_the_state(make: Make) -> None:
    run = make(rounds={"count": 2, "quorum": 1})
    a, *_ = two_nodes(run)
    a.answer = lambda task: [] if task.round == 1 else [a.update(task)]
    run.finish()
    state = State(phase=Gathering(0.0))
    for event in run.journal():
        state, _ = rounds.step(state, event, run.policy)
    assert state == run.server.state
    ticks = run.events(kinds.Tick)
    assert [t.now for t in ticks] == [pytest.approx(10.2)]  # the deadline, and no idle one


# --- updates that do not count ---------------------------------------------------


def test_a_lost_update_costs_one_deadline_and_no_more(make: Make) -> None:
    run = make()
    _, b, _ = two_nodes(run)
    b.answer = lambda task: [] if (task.round, task.client) == (1, 3) else [b.update(task)]
    run.finish()
    assert run.net.now == pytest.approx(10.5)
    first = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[1])
    assert first["missing"] == {"3": "no answer"}


def missing_after_a_return(run: Run, **at_return: Any) -> dict[str, str]:
    """Node a falls silent over client 0 and logs in anew; who is missing in round 1?"""
    was: dict[str, Any] = {"pid": 7, "oom_kills": 2, "memory_limit": 500_000_000}
    a = Peer(run, "a", 0, 1).login(**was)
    Peer(run, "b", 2, 3).login()
    Peer(run, "evaluator").login()

    def answer(task: Task) -> list[Said]:
        if len(a.told(Welcome)) > 1:
            return [a.update(task)]
        if task.client == 0:
            a.login(run.net.now + 1.0, **(was | at_return))
        return []

    a.answer = answer
    run.finish()
    first = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[1])
    missing: dict[str, str] = first["missing"]
    return missing


def test_a_node_killed_at_its_memory_limit_fails_the_task_it_had_and_no_other(make: Make) -> None:
    run = make()
    assert missing_after_a_return(run, pid=8, oom_kills=3) == {
        "0": "out of memory: the kernel killed node a at its limit of 500 MB"
    }
    assert run.recorder.account.num_rejected == {"task failed": 1}


@pytest.mark.parametrize(
    "how", [{"oom_kills": 3}, {"pid": 8}, {"pid": 8, "oom_kills": None}, {"pid": 8, "oom_kills": 0}]
)
def test_a_node_that_comes_back_otherwise_is_given_its_task_again(
    make: Make, how: dict[str, Any]
) -> None:
    """Another process of the group was killed; or it was stopped by someone, or moved."""
    assert missing_after_a_return(make(), **how) == {}


def test_the_shell_wakes_for_the_deadline_itself(make: Make) -> None:
    run = make(rounds={"count": 1, "deadline_seconds": 1.1, "quorum": 1})
    a, *_ = two_nodes(run)
    a.answer = lambda task: []
    run.finish()
    assert run.net.now == pytest.approx(0.2 + 1.1 + 0.1)


def test_the_shell_does_not_spin_when_a_lost_node_is_given_up(make: Make) -> None:
    run = make(nodes=QUIET | {"return_seconds": 2.0}, rounds={"count": 1})
    a, b, _ = two_nodes(run)
    a.answer = lambda task: [(Bye(reason="power cut"), None)] if task.client == 0 else []

    def answer(task: Task) -> list[Said]:
        b.delay = 8.0
        return [b.update(task)]

    b.answer = answer
    run.finish()
    assert run.net.now == pytest.approx(8.3)
    assert run.net.silences < 40  # of 0.25 s each


def test_a_duplicate_counts_once_and_leaks_nothing(make: Make) -> None:
    run, once = make(), make()
    a, *_ = two_nodes(run)
    a.answer = lambda task: [a.update(task)] * (2 if task.client == 0 else 1)
    summary = run.finish()
    assert summary["rejected"] == {"duplicate": 2}
    assert [(r.client, r.reason) for r in a.told(Reject)] == [(0, "duplicate")] * 2
    two_nodes(once)
    clean = once.finish()
    assert summary["digest"] == clean["digest"]
    assert summary["seconds"]["train"] == clean["seconds"]["train"]


def test_a_nan_update_is_rejected_with_a_reason_counted_and_its_node_told(make: Make) -> None:
    run = make(method=AVG, rounds={"count": 1})
    a, *_ = two_nodes(run)
    nan = np.full(run.space.size, np.nan, np.float32)
    a.answer = lambda task: [a.update(task, nan if task.client == 1 else None)]
    summary = run.finish()
    assert [(r.client, r.reason) for r in a.told(Reject)] == [
        (1, "a value of the payload is not finite")
    ]
    assert sum(summary["rejected"].values()) == 1
    assert run.net.now < 1  # nobody waited for it
    line = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[1])
    assert line["missing"] == {"1": "a value of the payload is not finite"}
    assert np.isfinite(run.server.central.x).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "why"),
    [(np.zeros(3, np.float32), "another size: 3 values, want 16"), (None, "no payload")],
)
def test_an_update_that_cannot_be_an_answer_is_a_fault(
    make: Make, value: Flat | None, why: str
) -> None:
    run = make(method=AVG, rounds={"count": 1})
    a, *_ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        if task.client != 1:
            return [a.update(task)]
        said, data = a.update(task, value)
        return [(said, data) if value is not None else
                (msgspec.structs.replace(said, payload=None), None)]  # fmt: skip

    a.answer = answer
    run.finish()
    assert [r.reason for r in a.told(Reject)] == [why]


def test_replicas_work_out_whose_units_a_step_of_scalars_is_about(make: Make) -> None:
    """Client 1 fails in every round; a step names no unit, and a node knows no slot."""
    units, quiet = space_of(5, 4, 3, 2), {"count": 3, "evaluate_every": 3}
    run = make(units, method=SCALARS | {"server": {"kind": "sgd", "lr": 1.0}}, rounds=quiet)
    a, b, _ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        where = {"round": task.round, "attempt": task.attempt, "client": task.client}
        return [(Failed(**where, reason="no"), None) if task.client == 1 else a.update(task)]

    a.answer = answer
    run.finish()
    central = run.server.central
    assert central is not None
    steps = [m.payload for m in b.told(Step)]
    assert [isinstance(s, ScalarsSpec) and len(s.runs) for s in steps] == [4, 4]
    assert [sum(r.count == 0 for r in s.runs) for s in steps] == [1, 1]  # type: ignore[union-attr]
    sizes = [[task.units for task in peer.told(Task)] for peer in (a, b)]
    assert {u for peer in sizes for (u,) in peer} == {0, 1, 2, 3}
    # each replica has compared its digest with the step's; the last step is still to come
    assert digest(a.x) == digest(b.x) == central._lines[0].digests[2]
    assert central.metrics == {"server_gain": 1.0}


def test_the_servers_gain_is_in_the_line_of_each_committed_round(make: Make) -> None:
    run = make(method=SCALARS | {"server": {"kind": "yogi", "tau": 0.5}}, rounds={"count": 2})
    two_nodes(run)
    run.finish()
    lines = [json.loads(s) for s in (run.directory / "metrics.jsonl").read_text().splitlines()]
    gains = [line["server_gain"] for line in lines if "missing" in line]
    assert 0 < gains[1] < gains[0] < 0.01 / 0.5  # lr / tau, and less as v grows
    assert not any("server_gain" in line for line in lines if "missing" not in line)


def test_a_failed_task_is_counted_and_not_waited_for(make: Make) -> None:
    run = make(rounds={"count": 1})
    a, *_ = two_nodes(run)

    def answer(task: Task) -> list[Said]:
        where = {"round": task.round, "attempt": task.attempt, "client": task.client}
        return [(Failed(**where, reason="MemoryError: no"), None)]

    a.answer = answer
    summary = run.finish()
    assert run.net.now < 1
    assert summary["rejected"] == {"task failed": 2}


def test_an_abandoned_round_is_asked_again_and_the_run_gives_up_in_the_end(make: Make) -> None:
    run = make()
    a, b, _ = two_nodes(run)
    b.answer = lambda task: []
    a.answer = lambda task: [a.update(task)] if task.client == 0 else []
    summary = run.finish()
    assert [t.attempt for t in b.told(Task) if t.client == 2] == list(range(10))
    assert summary["status"].startswith("failed: round 1 failed 10 times, last: 1 of quorum 2")
    assert summary["rejected"] == {"round abandoned": 10}
    assert summary["seconds"]["total"] == pytest.approx(100.0)


def test_an_update_of_an_abandoned_attempt_is_stale(make: Make) -> None:
    run = make(rounds={"count": 1})
    a, b, _ = two_nodes(run)
    late: list[Said] = []

    def answer(task: Task) -> list[Said]:
        if task.attempt == 0:
            late.append(a.update(task))
            return []
        return [*late, a.update(task)]

    a.answer, b.answer = answer, lambda task: []
    run.finish()
    assert {r.reason for r in a.told(Reject)} == {"stale: attempt 0, now 1"}


def test_an_update_for_another_nodes_client_is_dropped(make: Make) -> None:
    run = make(rounds={"count": 1, "quorum": 1})
    a, *_ = two_nodes(run)
    a.answer = lambda task: [a.update(msgspec.structs.replace(task, client=3))]
    summary = run.finish()
    assert summary["rejected"]["bad message"] == 2


# --- peers that do not keep to the protocol --------------------------------------


def test_garbage_is_survived_and_counted(make: Make) -> None:
    run = make()
    a, *_ = two_nodes(run)
    ours = bytes([VERSION])
    garbage: list[Frames] = [[], [b""], [ours, b"\xff"], [ours, b"\xc1", b"x"], [ours] * 9]
    for frames in garbage:
        run.net.deliver(0.15, a.peer, frames)
        run.net.deliver(0.15, b"a stranger", frames)
    summary = run.finish()
    assert summary["status"] == "completed"
    assert summary["rejected"] == {"bad message": 10}


def test_another_protocol_version_gets_a_refusal_readable_by_any_version(make: Make) -> None:
    run = make()
    run.net.deliver(0.0, b"from the future", [b"\x63", b"\x80"])
    run.server.turn(TURN)
    peer, frames = run.net.sent[-1]
    assert peer == b"from the future"
    frames = [b"\x63", *frames[1:]]  # as if that version had sent it
    refusal = read_refusal(frames)
    assert refusal is not None
    assert refusal.code == "version"
    assert "99" in refusal.reason
    assert "install the same seedwire" in refusal.reason


def test_an_unknown_peer_is_told_to_log_in(make: Make) -> None:
    run = make()
    run.net.deliver(0.0, b"a stranger", to_coordinator.pack(Beat()))
    run.server.turn(TURN)
    assert run.net.sent[-1][0] == b"a stranger"
    assert run.refusal().code == "login"


def test_a_client_claimed_twice_is_refused_with_the_other_nodes_name(make: Make) -> None:
    run = make()
    Peer(run, "a", 0, 1).login()
    Peer(run, "b", 1, 2).login(0.2)
    run.until(lambda: run.net.now > 0.4)
    assert run.refusal() == Refuse(code="clients", reason="client 1 is already hosted by node a")


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"software": "0.9"}, "version", "node a has seedwire 0.9, the coordinator has 1.0"),
        ({"stream": "other/1"}, "version", "noise stream other/1"),
        ({"clients": (0, 4)}, "clients", "client 4: the experiment has 4 clients"),
        ({"clients": ()}, "clients", "hosts no client"),
    ],
)
def test_a_login_that_cannot_be_is_refused_with_a_reason(
    make: Make, changes: dict[str, Any], code: str, why: str
) -> None:
    run = make()
    Peer(run, "a", 0).login(**changes)
    run.server.turn(TURN)
    assert run.refusal().code == code
    assert why in run.refusal().reason
    assert list(run.server.desk.roster) == []


def test_a_second_evaluator_is_refused(make: Make) -> None:
    run = make()
    Peer(run, "evaluator").login()
    Peer(run, "another").login(0.2)
    run.until(lambda: run.net.now > 0.3)
    assert run.refusal().reason == "node evaluator evaluates this run already"


def test_a_node_with_other_tensors_than_the_evaluator_is_refused(make: Make) -> None:
    run = make()
    a = Peer(run, "a", 0, 1).login()
    Peer(run, "evaluator").login(0.2)
    ready = msgspec.structs.replace(a.ready()[0], space=bytes(16))
    a.ready = lambda: (ready, None)  # type: ignore[method-assign]
    run.until(lambda: run.server.central is not None)
    refusal = a.told(Refuse)[0]
    assert refusal.reason == "node a trains other tensors than the evaluator"
    assert run.server.state.members == {}


def test_a_sync_before_ready_does_no_harm(make: Make) -> None:
    run = make()
    for peer in (Peer(run, "a", 0, 1), Peer(run, "evaluator")):
        peer.login()
        sync = to_coordinator.pack(Sync(version=0, reason="confused"))
        run.net.deliver(0.0, peer.peer, sync)
    Peer(run, "b", 2, 3).login(0.0)
    assert run.finish()["rejected"] == {"bad message": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": (TensorInfo("t", (16,), "u"), TensorInfo("t", (16,), "u"))},
        {"tensors": ()},
        {"tensors": (TensorInfo("t", (15,), "u"),)},
        {"space": bytes(16)},
    ],
)
def test_parameters_that_do_not_fit_are_a_breach(make: Make, changes: dict[str, Any]) -> None:
    run = make()
    evaluator = Peer(run, "evaluator").login()
    ready, data = evaluator.ready()
    bad = msgspec.structs.replace(ready, **changes)
    evaluator.ready = lambda: (bad, data)  # type: ignore[method-assign]
    run.until(lambda: run.net.now > 0.3)
    assert run.recorder.account.num_rejected == {"bad message": 1}
    assert run.server.central is None


def test_a_payload_that_is_too_large_is_a_breach_before_a_byte_is_pulled(make: Make) -> None:
    run = make(rounds={"count": 1})
    a, *_ = two_nodes(run)
    huge = payload.DenseSpec(1 << 30)

    def answer(task: Task) -> list[Said]:
        said = msgspec.structs.replace(a.update(task)[0], payload=huge, blob=1)
        return [(said, None), a.update(task)]

    a.answer = answer
    assert run.finish()["rejected"] == {"bad message": 2}
    assert a.told(Pull) == []


def test_a_training_node_may_not_announce_a_large_payload_at_login(make: Make) -> None:
    run = make()
    a = Peer(run, "a", 0, 1).login()
    ready, _ = a.ready()
    large = msgspec.structs.replace(ready, payload=payload.DenseSpec(1 << 30), blob=1)
    a.ready = lambda: (large, None)  # type: ignore[method-assign]
    run.until(lambda: run.net.now > 0.3)
    assert run.recorder.account.num_rejected == {"bad message": 1}
    assert run.server.desk._inbox._arriving == {}


# --- nodes that come and go ------------------------------------------------------


def test_the_same_name_supersedes_at_once(make: Make) -> None:
    run = make()
    a, *_ = two_nodes(run)
    a.answer = lambda task: []  # this process hangs
    again = Peer(run, "a", 0, 1, peer=b"another connection").login(1.0)
    run.finish()
    assert [r.code for r in a.told(Refuse)] == ["superseded"]
    assert [t.client for t in again.told(Task)][:2] == [0, 1]
    assert run.net.now < 2
    assert [e.reason for e in run.events(kinds.NodeLost)] == ["superseded by a new login"]


def test_a_login_that_was_overtaken_on_the_way_is_not_obeyed(make: Make) -> None:
    run = make()
    a, *_ = two_nodes(run)
    hello = Hello(node="a", software="1.0", stream=STREAM, clients=(0, 1), login=5, host="h", pid=7)
    run.net.deliver(1.0, b"new", to_coordinator.pack(hello))
    earlier = msgspec.structs.replace(hello, login=4)
    run.net.deliver(1.1, b"old", to_coordinator.pack(earlier))
    run.net.deliver(1.2, b"new", to_coordinator.pack(Heartbeat()))
    while run.net.now < 1.2:
        run.server.turn(0.1)
    assert [m.peer.id for m in run.server.desk.roster if m.name == "a"] == [b"new"]
    assert [r.code for r in a.told(Refuse)] == ["superseded"]


def test_what_the_old_connection_still_says_is_a_strangers(make: Make) -> None:
    run = make()
    a, *_ = two_nodes(run)
    a.answer = lambda task: [(Failed(round=1, attempt=0, client=0, reason="old"), None)]
    a.delay = 1.5
    again = Peer(run, "a", 0, 1, peer=b"another connection").login(1.9)
    again.delay = 0.7
    run.finish()
    assert "login" in {r.code for r in a.told(Refuse)}
    assert run.events(kinds.TaskFailed) == []


def test_silence_loses_a_node_and_its_return_continues_the_round(make: Make) -> None:
    nodes = {"heartbeat_seconds": 1.0, "patience_seconds": 3.0, "return_seconds": 5.0}
    run = make(nodes=nodes, rounds={"count": 1, "deadline_seconds": 100.0})
    a, b, evaluator = two_nodes(run)
    b.answer = lambda task: []
    for peer in (a, evaluator):
        for second in range(1, 20):
            run.net.deliver(float(second), peer.peer, to_coordinator.pack(Heartbeat()))
    back = Peer(run, "b", 2, 3, peer=b"b again").login(7.0)
    run.finish()
    (lost,) = run.events(kinds.NodeLost)
    assert lost.node == "b"
    assert lost.reason.startswith("silent for")
    assert 3.1 < lost.now < 4.6
    assert [t.client for t in back.told(Task)] == [2, 3]
    assert run.net.now == pytest.approx(7.3)  # login, ready, update, score
    assert len(a.told(Beat)) >= 5


def test_a_closed_connection_loses_the_node_at_once(make: Make) -> None:
    """With patience for a day: a beat goes out early, and fails for who is gone."""
    run = make(rounds={"count": 1}, nodes=QUIET | {"return_seconds": 2.0})
    a, b, _ = two_nodes(run)
    b.answer = lambda task: []
    run.until(lambda: bool(b.told(Task)))
    cut_at = run.net.now
    run.net.cut(b.peer)
    run.finish()
    (lost,) = run.events(kinds.NodeLost)
    assert (lost.node, lost.reason) == ("b", "its connection was closed")
    assert lost.now <= cut_at + SETTLE_SECONDS + 2 * TURN
    assert run.net.now == pytest.approx(lost.now + 2.0 + 0.1)
    assert a.told(Beat)  # harmless, whoever gets it


def test_who_trains_for_ten_minutes_is_never_taken_for_dead(make: Make) -> None:
    """Beats say that it lives, and how far it is; the defaults of patience wait for no more."""
    run = make(rounds={"count": 1, "deadline_seconds": 1000.0}, nodes=msgspec.to_builtins(Nodes()))
    a, b, evaluator = two_nodes(run)

    def slowly(task: Task) -> list[Said]:
        b.delay = 600.0
        return [b.update(task)]

    b.answer = slowly
    run.net.max_silences = 10_000
    for tick in range(500):
        for peer in (a, b, evaluator):
            far = Progress(round=1, client=2, done=tick, total=500)
            is_news = peer is b and tick % 5 == 4
            beat = Heartbeat(busy="round 1, client 2", progress=far) if is_news else Heartbeat()
            run.net.deliver(1.5 * tick, peer.peer, to_coordinator.pack(beat))
    seen: list[tuple[str, int]] = []

    def training() -> bool:
        now = (m for m in run.server.desk.roster if m.name == "b")
        seen.extend((m.busy, m.progress.done if m.progress else -1) for m in now)
        return run.server.finished is not None

    run.until(training)
    run.finish()
    assert run.net.now > 600
    assert run.events(kinds.NodeLost) == []
    told = list(dropwhile(lambda said: said[1] < 0, seen))
    assert told == sorted(told)  # and nothing forgotten
    assert {busy for busy, _ in told} == {"round 1, client 2"}
    assert len(set(told)) > 60


def test_who_loads_may_be_silent_for_ten_times_as_long(make: Make) -> None:
    run = make(nodes={"heartbeat_seconds": 1.0, "patience_seconds": 3.0})
    for peer in (Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")):
        peer.delay = 1000.0  # until it is ready
        peer.login()
    run.until(lambda: run.net.now > 29.9)
    assert len(list(run.server.desk.roster)) == 3
    run.until(lambda: run.net.now > 30.5)
    assert list(run.server.desk.roster) == []


def test_a_strangers_closed_connection_loses_nobody(make: Make) -> None:
    run = make(rounds={"count": 1})
    two_nodes(run)
    run.net.cut(b"a stranger")
    run.finish()
    assert run.events(kinds.NodeLost) == []


def test_by_default_silence_is_noticed_within_5_seconds_and_a_closed_connection_within_1() -> None:
    nodes = experiments.Nodes()
    assert nodes.patience_seconds + TURN_SECONDS < 5.0
    assert SETTLE_SECONDS + 2 * TURN_SECONDS < 1.0


def test_a_coordinator_that_was_away_itself_takes_nobody_for_dead(make: Make) -> None:
    """Silence counts only while somebody listens: the beats wait in the queue."""
    nodes = {"heartbeat_seconds": 1.0, "patience_seconds": 3.0, "return_seconds": 5.0}
    for away in (1.5, 2.5, 3.5, 30.0):
        run = make(nodes=nodes)
        a, *_ = two_nodes(run)
        a.answer = lambda task: []
        for quarter in range(1, 400):
            at = quarter / 4
            for peer in run.peers.values():
                run.net.deliver(at, peer.peer, to_coordinator.pack(Heartbeat()))
        run.until(lambda: run.net.now > 2.0)  # noqa: B023
        run.net.now += away
        run.until(lambda: run.net.deliveries[0][0] > run.net.now)  # noqa: B023
        assert len(list(run.server.desk.roster)) == 3


def test_an_orderly_goodbye_is_noticed_at_once(make: Make) -> None:
    run = make(rounds={"count": 1}, nodes=QUIET | {"return_seconds": 2.0})
    _, b, _ = two_nodes(run)
    b.answer = lambda task: [(Bye(reason="stopped on this side"), None)]
    run.finish()
    (lost,) = run.events(kinds.NodeLost)
    assert lost.reason == "stopped on this side"
    assert run.net.now == pytest.approx(lost.now + 2.0 + 0.1)


def test_an_evaluator_that_comes_back_is_asked_again_and_scores_once(make: Make) -> None:
    run = make(rounds={"count": 1})
    *_, evaluator = two_nodes(run)
    evaluator.delay = 0.3
    again = Peer(run, "evaluator", peer=b"evaluator again").login(0.4)
    run.finish()
    assert [e.version for e in again.told(Evaluate)] == [0, 1]
    assert [number for number, _ in run.recorder.account.scores] == [0, 1]


def test_a_second_answer_to_one_evaluation_is_not_recorded(make: Make) -> None:
    run = make(rounds={"count": 1})
    *_, evaluator = two_nodes(run)
    say = evaluator.say

    def twice(message: Any, data: memoryview | None = None, delay: float = 0.0) -> None:
        for _ in range(2 if isinstance(message, Score) else 1):
            say(message, data, delay)

    evaluator.say = twice  # type: ignore[method-assign]
    run.finish()
    assert [number for number, _ in run.recorder.account.scores] == [0, 1]


# --- catching up -----------------------------------------------------------------


def late(run: Run, after: int) -> Peer:
    """Node b, logging in when so many rounds are done; a alone is enough until then."""
    Peer(run, "a", 0, 1).login()
    Peer(run, "evaluator").login()
    run.until(lambda: run.server.state.round == after)
    b = Peer(run, "b", 2, 3).login(run.net.now)
    run.finish()
    return b


SCARCE: dict[str, Any] = {"nodes": QUIET | {"start_clients": 2}}


def test_a_node_that_is_behind_gets_the_steps_while_they_are_cheaper(make: Make) -> None:
    b = late(make(space=SMALL, rounds={"count": 6, "quorum": 2}, **SCARCE), after=3)
    first = b.told(Task)[0].version
    assert first >= 3
    steps = b.told(Step)
    assert [s.version for s in steps][:first] == list(range(1, first + 1))
    assert not any(s.snapshot for s in steps)


def test_a_node_that_is_far_behind_gets_a_snapshot(make: Make) -> None:
    b = late(make(rounds={"count": 15, "quorum": 2}, **SCARCE), after=10)
    first, *others = b.told(
        Step
    )  # 10 steps of about 100 bytes, body and all, against 64 and a body
    assert first.snapshot
    assert first.version == b.told(Task)[0].version
    assert not any(s.snapshot for s in others)


def test_what_a_node_that_was_behind_is_sent_stands_beside_the_other_way(make: Make) -> None:
    run = make(space=SMALL, rounds={"count": 6, "quorum": 2}, **SCARCE)
    b = late(run, after=3)
    (text,) = (run.directory / "catch-up.jsonl").read_text().splitlines()
    line = json.loads(text)
    first = b.told(Task)[0].version
    assert (line["node"], line["from"], line["to"], line["sent"]) == ("b", 0, first, "steps")
    assert line["steps"] == first
    assert line["sent_bytes"] == line["steps_bytes"] < line["snapshot_bytes"]
    assert line["steps_seconds"] > 0


@pytest.mark.parametrize("name", ["commit", "plan"])
def test_nodes_hear_beats_while_the_coordinator_replays_or_plans(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Either takes longer than a node's patience lasts, for many parameters or directions."""
    run = make(rounds={"count": 1}, nodes={"heartbeat_seconds": 0.1, "patience_seconds": 1e5})
    two_nodes(run)
    heard, quick = threading.Event(), getattr(Central, name)

    def slow(*args: Any) -> Any:
        before = len(run.net.sent)
        run.net.now += 1.0  # this much work, and then as much as it takes to be heard
        run.net.on_send = lambda peer, frames: heard.set()
        assert heard.wait(30)
        run.net.on_send = run.hear
        assert all(to_node.unpack(frames)[0] == Heartbeat() for _, frames in run.net.sent[before:])
        return quick(*args)

    monkeypatch.setattr(Central, name, slow)
    assert run.finish()["rounds"] == 1


def test_beats_are_sent_again_in_the_round_after_the_first_that_takes_long(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was quick is done in the same thread, and the nodes do not hear of it."""
    run = make(rounds={"count": 4}, nodes={"heartbeat_seconds": 0.1, "patience_seconds": 1e5})
    two_nodes(run)
    rounds, beats, commit = itertools.count(1), threading.Event(), Central.commit

    def slow(central: Central, *args: Any) -> None:
        number = next(rounds)
        is_here = threading.current_thread() is threading.main_thread()
        assert is_here == (number in (2, 3))
        if number > 2:
            run.net.now += 1.0
        if number == 4:
            run.net.on_send = lambda peer, frames: beats.set()
            assert beats.wait(30)
            run.net.on_send = run.hear
        commit(central, *args)

    monkeypatch.setattr(Central, "commit", slow)
    assert run.finish()["rounds"] == 4


def test_a_method_whose_steps_replace_all_sends_only_the_newest(make: Make) -> None:
    run = make(method=AVG, rounds={"count": 6, "quorum": 2}, **SCARCE)
    b = late(run, after=3)
    assert b.told(Step)[0].version == b.told(Task)[0].version >= 3
    assert not any(s.snapshot for s in b.told(Step))


def test_a_sync_gets_a_snapshot_and_its_task_again(make: Make) -> None:
    run = make(rounds={"count": 1})
    a, *_ = two_nodes(run)
    seen: list[Task] = []

    def answer(task: Task) -> list[Said]:
        seen.append(task)
        if len(seen) <= 2:  # both tasks came before it could say so
            return [(Sync(version=0, reason="the digest differs"), None)] * (len(seen) == 1)
        return [a.update(task)]

    a.answer = answer
    summary = run.finish()
    (step,) = a.told(Step)
    assert step.snapshot
    assert step.version == 0
    assert [t.client for t in seen] == [0, 1, 0, 1]
    assert summary["resyncs"] == 1
    assert run.net.now < 1


@pytest.mark.parametrize("version", [0, 7])
def test_a_node_that_starts_from_other_parameters_gets_a_snapshot(make: Make, version: int) -> None:
    """Another build of the model, or what is left of an earlier run of this name."""
    run = make(rounds={"count": 1})
    a, *_ = two_nodes(run)
    a.x, a.version = run.x0 + 1, version
    assert run.finish()["resyncs"] == 1
    assert [(s.version, s.snapshot) for s in a.told(Step)] == [(0, True)]


# --- large payloads --------------------------------------------------------------


def watch_pulls(run: Run) -> tuple[Counter[tuple[bytes, str]], Counter[str]]:
    """Bytes pulled and not yet there, by who asks: now, and the most there ever were of a peer."""
    waiting: Counter[tuple[bytes, str]] = Counter()
    most: Counter[str] = Counter()

    def watch(peer: bytes, message: object, nbytes: int, pulls: str, chunks: str) -> None:
        if isinstance(message, Pull):
            waiting[peer, pulls] += message.nbytes
            assert message.nbytes <= FAST_CHUNK_BYTES
            most[pulls] = max(most[pulls], waiting[peer, pulls])
        if isinstance(message, Chunk):
            waiting[peer, chunks] -= nbytes

    hear, recv = run.net.on_send, run.net.recv

    def sent(peer: bytes, frames: Frames) -> None:
        watch(peer, to_node.unpack(frames)[0], len(frames[-1]), "coordinator", "node")
        hear(peer, frames)

    def received(within_seconds: float) -> tuple[wire.Peer, list[bytes]] | None:
        got = recv(within_seconds)
        message = to_coordinator.unpack(got[1])[0] if got is not None else None
        if got is not None and isinstance(message, Chunk):
            watch(got[0].id, message, len(got[1][-1]), "node", "coordinator")
        return got

    for peer in run.peers.values():
        say = peer.say

        def said(
            message: Any,
            data: memoryview | None = None,
            delay: float = 0.0,
            who: bytes = peer.peer,
            say: Callable[..., None] = say,
        ) -> None:
            if isinstance(message, Pull):
                watch(who, message, 0, "node", "coordinator")
            say(message, data, delay)

        peer.say = said  # type: ignore[method-assign]
    run.net.on_send, run.net.recv = sent, received  # type: ignore[method-assign]
    return waiting, most


def test_large_payloads_travel_in_chunks_both_ways_within_the_window(make: Make) -> None:
    run = make(LARGE, method=AVG, partition={"clients": 2}, rounds={"count": 2})
    a, evaluator = Peer(run, "a", 0).login(), Peer(run, "evaluator").login()
    b = Peer(run, "b", 1).login()
    waiting, most = watch_pulls(run)
    summary = run.finish()
    nbytes = 4 * LARGE.size
    assert nbytes > 4 * CHUNK_BYTES
    assert most == dict.fromkeys(("node", "coordinator"), WINDOW * CHUNK_BYTES)
    assert not any(waiting.values())
    central = run.server.central
    assert central is not None
    assert evaluator.x.tobytes() == central.x.tobytes()
    meter = run.server.desk.meter
    for node in (a, b):
        assert meter.payload[Key(node.name, "up", "update")] == 2 * nbytes
        assert meter.payload[Key(node.name, "down", "step")] == nbytes
        assert meter.message[Key(node.name, "up", "update")] > 2 * nbytes
        chunks = 2 * -(-nbytes // CHUNK_BYTES)
        assert meter.message[Key(node.name, "up", "update")] < 2 * nbytes + 50 * chunks + 1000
        pulls = meter.message[Key(node.name, "up", "step")]  # are on the step's account
        assert 20 * 2 * -(-nbytes // FAST_CHUNK_BYTES) < pulls < 40 * chunks
        assert meter.message[Key(node.name, "down", "model")] == 0
    assert meter.payload[Key("evaluator", "up", "model")] == nbytes
    assert meter.payload[Key("evaluator", "down", "step")] == 2 * nbytes
    assert summary["bytes"]["payload_up"] == 4 * nbytes
    assert summary["bytes"]["payload_down"] == 2 * nbytes


def test_a_large_snapshot_is_on_the_models_account(make: Make) -> None:
    run = make(LARGE, partition={"clients": 2}, rounds={"count": 1})
    a, _ = Peer(run, "a", 0).login(), Peer(run, "b", 1).login()
    Peer(run, "evaluator").login()
    a.x = run.x0 + 1
    run.finish()
    meter = run.server.desk.meter
    assert meter.payload[Key("a", "down", "model")] == 4 * LARGE.size
    assert meter.payload[Key("a", "down", "step")] == 0


def test_an_old_step_is_not_offered_for_ever(make: Make) -> None:
    run = make(LARGE, method=AVG, partition={"clients": 1}, rounds={"count": 4})
    Peer(run, "a", 0).login()
    Peer(run, "evaluator").login()
    run.finish()
    desk = run.server.desk
    offers = desk._offers
    assert list(offers._blobs) == [(4, False, 0)]
    assert len(offers._outbox._blobs) == len(offers._steps) == 1
    assert desk._inbox._arriving == {}


def test_a_half_sent_update_of_a_lost_node_is_forgotten(make: Make) -> None:
    run = make(LARGE, method=AVG, partition={"clients": 1}, rounds={"count": 1})
    a = Peer(run, "a", 0).login()
    Peer(run, "evaluator").login()
    hear = a.hear

    def dies(frames: list[bytes]) -> None:
        if not isinstance(to_node.unpack(frames)[0], Pull):
            hear(frames)

    a.hear = dies  # type: ignore[method-assign]
    inbox = run.server.desk._inbox
    run.until(lambda: any(peer == wire.Peer(a.peer) for peer, _ in inbox._arriving))
    again = Peer(run, "a", 0, peer=b"a again").login(run.net.now)
    run.finish()
    assert again.told(Task)[0].client == 0
    assert inbox._arriving == {}


def test_a_half_sent_update_of_a_node_that_left_is_forgotten(make: Make) -> None:
    run = make(LARGE, method=AVG, partition={"clients": 1}, rounds={"count": 1})
    a = Peer(run, "a", 0).login()
    Peer(run, "evaluator").login()
    a.answer = lambda task: [
        (msgspec.structs.replace(a.update(task)[0], blob=77), None),
        (Bye(reason="stopped on this side"), None),
    ]
    a.say = lambda message, *rest, say=a.say, **more: (  # type: ignore[method-assign]
        None if isinstance(message, Chunk) and message.blob == 77 else say(message, *rest, **more)
    )
    run.until(lambda: bool(run.events(kinds.NodeLost)))
    assert run.server.desk._inbox._arriving == {}
    Peer(run, "a", 0, peer=b"a again").login(run.net.now)
    run.finish()


def test_a_second_login_on_one_connection_gives_up_what_was_on_its_way(make: Make) -> None:
    """The node begins to number its blobs anew, so an old transfer must not go on."""
    run = make(LARGE, method=AVG, partition={"clients": 1}, rounds={"count": 1})
    a = Peer(run, "a", 0).login()
    Peer(run, "evaluator").login()
    inbox, old = run.server.desk._inbox, list[object]()

    def again(task: Task) -> list[Said]:
        a.answer = lambda task: [a.update(task)]
        update = msgspec.structs.replace(a.update(task)[0], blob=77)  # and never serves it
        return [(update, None), (a.hello(), None)]

    a.answer = again
    hear = a.hear

    def mute(frames: list[bytes]) -> None:
        message, _ = to_node.unpack(frames)
        if isinstance(message, Pull) and message.blob == 77:
            old.append(message)
        else:
            hear(frames)

    a.hear = mute  # type: ignore[method-assign]
    run.finish()
    assert old
    assert inbox._arriving == {}
    assert a.told(Refuse) == []


# --- the account -----------------------------------------------------------------


def on_the_wire(frames: list[bytes]) -> int:
    """ZMTP 3: a flag byte, then one or eight bytes of length, before each frame."""
    return sum(len(f) + (2 if len(f) <= 255 else 9) for f in frames)


@pytest.mark.parametrize("space", [TINY, LARGE])
def test_bytes_equal_the_sum_over_the_frames_that_were_sent(make: Make, space: ParamSpace) -> None:
    run = make(space, method=AVG, rounds={"count": 2})
    received: list[tuple[bytes, list[bytes]]] = []
    recv = run.net.recv

    def listening(within_seconds: float) -> tuple[wire.Peer, list[bytes]] | None:
        got = recv(within_seconds)
        received.extend([(got[0].id, got[1])] if got is not None else [])
        return got

    run.net.recv = listening  # type: ignore[method-assign]
    a, b, evaluator = two_nodes(run)
    a.answer = lambda task: [a.update(task)] * 2
    summary = run.finish()
    meter = run.server.desk.meter
    ways: dict[Way, Any] = {"up": received, "down": run.net.sent}
    for peer in (a, b, evaluator):
        for way, frames in ways.items():
            total = sum(on_the_wire([bytes(f) for f in fs]) for who, fs in frames
                        if who == peer.peer)  # fmt: skip
            counted = sum(
                n for key, n in meter.message.items() if (key.node, key.way) == (peer.name, way)
            )
            assert counted == total + HANDSHAKE["null"][way], (peer.name, way)
    nodes = (a.peer, b.peer)
    up = sum(on_the_wire([bytes(f) for f in fs]) for who, fs in received if who in nodes)
    down = sum(on_the_wire([bytes(f) for f in fs]) for who, fs in run.net.sent if who in nodes)
    up, down = up + 2 * HANDSHAKE["null"]["up"], down + 2 * HANDSHAKE["null"]["down"]
    assert summary["bytes"]["message_up"] == up
    assert summary["bytes"]["message_down"] == down
    per = summary["bytes"]["per_client_round"]
    assert per["message_up"] == up / 8
    by_kind = summary["bytes_by_kind"]
    assert sum(row["up"] for row in by_kind.values()) == up
    assert sum(row["down"] for row in by_kind.values()) == down


def test_what_could_not_be_sent_is_not_counted(make: Make) -> None:
    run = make(rounds={"count": 1, "quorum": 1, "deadline_seconds": 2.0})
    a, *_ = two_nodes(run)
    run.until(lambda: isinstance(run.server.state.phase, Evaluating))
    before = run.recorder.meter.message[Key("a", "down", "task")]
    run.net.gone.add(a.peer)
    run.finish()
    assert run.recorder.meter.message[Key("a", "down", "task")] == before == 0


def test_an_evaluator_of_any_name_is_no_part_of_the_training_bytes(make: Make) -> None:
    run = make(rounds={"count": 1})
    for peer in (Peer(run, "evaluator", 0, 1), Peer(run, "b", 2, 3), Peer(run, "judge")):
        peer.login()
    summary = run.finish()
    assert summary["bytes"]["payload_up"] == 16  # one scalar of each client
    assert summary["bytes"]["payload_down"] == 0
    assert "evaluate" not in summary["bytes_by_kind"]
    assert summary["nodes"] == 2


def test_summary_keeps_its_promise(make: Make) -> None:
    run = make()
    two_nodes(run)
    summary = run.finish()
    assert json.loads((run.directory / "summary.json").read_text()) == summary
    assert summary["method"] == "fedmezo"
    assert summary["model"] == "random:x"
    assert summary["data"] == "x.csv"
    assert (summary["seed"], summary["rounds"], summary["clients"]) == (4, 2, 4)
    assert summary["nodes"] == 2
    assert summary["trained_parameters"] == 16
    assert summary["metric"] == {"name": "accuracy", "before": 0.5, "after": 0.5}
    assert summary["loss"] == {"before": 2.0, "after": 2.0}
    assert summary["bytes"]["payload_up"] == 2 * 4 * 4
    assert summary["bytes"]["payload_down"] == 2 * 4 * 4  # to two nodes, the step of round 1
    assert summary["bytes"]["per_client_round"]["payload_up"] == 4
    ways = {f"{level}_{way}" for level in ("payload", "message") for way in ("up", "down")}
    assert set(summary["bytes"]) == ways | {"per_client_round"}
    assert set(summary["bytes"]["per_client_round"]) == ways
    assert summary["memory_bytes"] == {
        "load": 5_000_000,
        "inference": 6_000_000,
        "train": 7_500_000,
        "over_inference": 1_500_000,
    }
    # A node trains 2 clients for 0.75 s in each of 2 rounds; a round takes 0.1 s here.
    assert summary["seconds"] == {
        "total": pytest.approx(0.2),
        "train": 3.0,
        "wait": 0.0,
        "by_phase": {"train": 4.0, "encode": 2.0},
    }
    assert summary["own_over_kernel"] == {}  # nothing here is known to a kernel
    assert summary["digest"] == digest(run.server.central.x).hex()  # type: ignore[union-attr]
    assert summary["rejected"] == {}
    assert summary["resyncs"] == 0


def test_the_run_directory_has_a_line_per_evaluation_round_and_update(make: Make) -> None:
    run = make()
    two_nodes(run)
    run.finish()
    lines = [json.loads(s) for s in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], "metric" in line) for line in lines] == [
        *((0, True), (1, False), (1, True), (2, False), (2, True))
    ]
    losses = [0.5, 1.5, 2.5, 3.5]
    weighed = sum((c + 1) * loss for c, loss in enumerate(losses)) / 10
    assert lines[1]["train_loss"] == pytest.approx(weighed)
    costs = [json.loads(s) for s in (run.directory / "costs.jsonl").read_text().splitlines()]
    assert len(costs) == 8
    nothing = {"joules": None, "rss": None, "cuda": None, "reserved": None}
    assert costs[0]["train"] == nothing | {"seconds": 0.5, "rss": 7_500_000}
    assert costs[0]["encode"] == nothing | {"seconds": 0.25}
    assert experiments.load(run.directory / "experiment.toml") == run.experiment
    assert json.loads((run.directory / "nodes.json").read_text())["b"]["clients"] == [2, 3]


def test_the_kernels_bytes_are_in_the_account_when_it_knows_every_training_node(make: Make) -> None:
    run = make()
    two_nodes(run)
    growths = [Growth("a", 300, 200, 7, 0.1, True), Growth("evaluator", 9, 9, 0, 0.1, True)]
    run.net.grown = lambda: [growths.pop()] if growths else []  # type: ignore[method-assign]
    assert "tcp_up" not in run.finish()["bytes"]  # b's are not known
    run.server.desk.meter.grown(Growth("b", 1, 2, 0, 0.1, True))
    total = totals.nbytes(run.recorder.account, run.recorder.meter)
    assert (total["tcp_up"], total["tcp_down"], total["tcp_resent_down"]) == (202, 301, 7)
    ratio = totals.own_over_kernel(total)
    assert ratio == {"up": total["message_up"] / 202, "down": total["message_down"] / 301}
