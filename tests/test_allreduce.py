"""FedAvg over an all-reduce: by hand, beside FedAvg, and what the coordinator makes of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.collective import Collective
from coordinator.events import Commit, CommitFailed
from coordinator.policy import checked
from fedalgos import registry
from fedalgos.allreduce import FedAvgAllreduce, fedavg_allreduce
from fedalgos.fedavg import FedAvg, fedavg
from fedalgos.method import Collective as Among
from fedalgos.method import Method
from fedalgos.optim import Sgd
from fedalgos.space import digest
from node.admission import Admission
from node.collective import Averaging, Circle, CollectiveError, ring_bytes
from node.engine import Ranks, Setup
from node.lead import Lead
from node.start import Life, Start
from protocol import payload
from protocol.errors import ExperimentError
from protocol.messages import Reduce, Reduced, Step, Task, Update
from protocol.meter import Key
from protocol.parts import Cost, Exchanged, Meeting
from protocol.payload import Dense, Flat, Run, Scalars
from protocol.tcp import Growth
from protocol.wire import RemoteProtocolError
from tests.oracles import contribution, f32, over_the_wire, play, space_of, towards
from tests.test_late import experiment
from tests.test_server import Make, Peer, Said, make
from tests.test_server import Run as Federation

__all__ = ["make"]
SPACE = space_of(2, 1)
METHOD = fedavg_allreduce(FedAvgAllreduce(local=Sgd(lr=0.5)), SPACE)


def collective_of(method: Method[Any]) -> Among:
    assert method.collective is not None
    return method.collective


COLLECTIVE = collective_of(METHOD)
HERE = Meeting(address="127.0.0.1", port=1)
ALLREDUCE = {"name": "fedavg-allreduce", "steps": 1}


def order(rank: int, ranks: int, port: int, **changes: Any) -> Reduce:
    asked = Reduce(
        round=1,
        version=0,
        clients=(rank,),
        examples=8,
        rank=rank,
        ranks=ranks,
        address="127.0.0.1",
        meeting=Meeting(address="127.0.0.1", port=port),
        seconds=30.0,
    )
    return msgspec.structs.replace(asked, **changes)


# --- the method ------------------------------------------------------------------


def test_a_round_by_hand() -> None:
    x = f32(1, 2, 3)
    first = [contribution(Dense(f32(2, 0, -2)), 0, 3), contribution(Dense(f32(0, 4, 2)), 1, 1)]
    second = [contribution(Dense(f32(-4, 4, 8)), 2, 4)]
    shares = [COLLECTIVE.share(first, 8), COLLECTIVE.share(second, 8)]
    # (3 * 2 + 1 * 0) / 8, (3 * 0 + 1 * 4) / 8, (3 * -2 + 1 * 2) / 8; and 4 / 8 of the other
    assert [list(s) for s in shares] == [[0.75, 0.5, -0.5], [-2.0, 2.0, 4.0]]
    assert list(COLLECTIVE.step(x, shares[0] + shares[1]).values) == [-0.25, 4.5, 6.5]
    _, step = METHOD.aggregate(None, x, 1, [*first, *second])
    assert list(step.values) == [-0.25, 4.5, 6.5]


def test_it_is_fedavg_to_1e_6() -> None:
    o = {c: towards(f32(c, -2, 5)) for c in range(3)}
    plain = fedavg(FedAvg(local=Sgd(lr=0.5)), SPACE)
    examples = {0: 3, 1: 5, 2: 8}
    ours = [r.x for r in play(METHOD, o, f32(0.1, 0.2, 0.3), 5, examples=examples)]
    theirs = [r.x for r in play(plain, o, f32(0.1, 0.2, 0.3), 5, examples=examples)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(ours[0], ours[-1])


def test_what_is_sent_of_an_update_is_its_norm() -> None:
    said = over_the_wire(COLLECTIVE.announce(Dense(f32(3, 0, -4))))
    assert list(said.values) == [5.0]
    asked = contribution(said).assignment
    assert COLLECTIVE.accepts(asked, said) is None
    below, two = Scalars((Run(0, 1),), f32(-1)), Scalars((Run(0, 2),), f32(1, 1))
    for wrong in (below, two, Dense(f32(1, 2, 3))):
        assert COLLECTIVE.accepts(asked, wrong) is not None


def test_a_robust_rule_is_refused_as_there_is_nothing_to_compare() -> None:
    with pytest.raises(ExperimentError, match="stay on their nodes"):
        registry.settings(ALLREDUCE | {"robust": {"kind": "clip"}})


def test_what_is_not_encrypted_has_to_be_asked_for_where_there_are_keys(tmp_path: Path) -> None:
    def of(method: dict[str, Any]) -> Any:
        e = experiment(method)
        return msgspec.structs.replace(e, rounds=msgspec.structs.replace(e.rounds, late="refuse"))

    checked(of(ALLREDUCE))  # without keys
    checked(of(ALLREDUCE | {"plaintext": True}), tmp_path)
    checked(of({"name": "fedavg"}), tmp_path)
    with pytest.raises(ExperimentError, match="not encrypted: plaintext = true"):
        checked(of(ALLREDUCE), tmp_path)


# --- on the node -----------------------------------------------------------------


@pytest.mark.net
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_node_has_the_same_bits_of_the_sum(ranks: int) -> None:
    circles = [Circle() for _ in range(ranks)]
    rng = np.random.default_rng(ranks)
    parts = [rng.normal(size=1001).astype(np.float32) for _ in range(ranks)]
    sums = [part.copy() for part in parts]
    where = circles[0].port
    run_all([partial(circles[r].sum_, sums[r], order(r, ranks, where)) for r in range(ranks)])
    np.testing.assert_allclose(sums[0], np.sum(np.array(parts, np.float64), 0), atol=1e-5)
    assert len({s.tobytes() for s in sums}) == 1


@pytest.mark.net
def test_who_does_not_come_is_waited_for_so_long_and_no_longer() -> None:
    circle = Circle()
    with pytest.raises(CollectiveError) as failed:
        circle.sum_(f32(1, 2), order(0, 2, circle.port, seconds=1.0))
    assert "\n" not in str(failed.value)


@pytest.mark.net
def test_an_update_of_another_attempt_is_not_reduced_and_a_result_is_held_once() -> None:
    averaging = Averaging(COLLECTIVE)
    update = contribution(Dense(f32(1, 2, 3)), 0, 8)
    averaging.keep((1, 0), update)
    with pytest.raises(CollectiveError, match="client 0 is not here"):
        averaging.reduce(f32(0, 0, 0), order(0, 1, averaging.port, attempt=1))
    averaging.keep((1, 1), update)
    answer, data = averaging.reduce(f32(1, 1, 1), order(0, 1, averaging.port, attempt=1))
    assert answer.payload is not None
    assert data is not None
    x = f32(2, 3, 4)
    assert list(payload.decode(answer.payload, data).values) == list(x)
    assert answer.digest == digest(x)
    made = averaging.result(digest(x))
    assert made is not None
    assert list(made) == list(x)
    assert averaging.result(digest(x)) is None


@pytest.mark.parametrize("is_idle", [True, False])
def test_an_orderly_end_does_not_unwind_a_thread_that_is_inside_torch(
    monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    life = Life(Start(Setup((0,)), Admission("tcp://x:1", "a", Path(), None, 0.0)))
    with life.ending():
        life.is_idle = is_idle
    assert codes == ([] if is_idle else [0])


def test_a_node_of_several_ranks_is_refused_in_one_line() -> None:
    with pytest.raises(ExperimentError, match="without --ranks"):
        Lead(experiment(ALLREDUCE), Setup((0,), ranks=Ranks(2)), Ranks(2))


def test_the_bytes_of_a_ring() -> None:
    assert ring_bytes(4_000_000, 2) == (4_000_000, 4_000_000 + 4 * 144)
    assert ring_bytes(4_000_000, 3) == (5_333_333, 5_333_333 + 8 * 144)


def run_all(jobs: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --- at the coordinator ----------------------------------------------------------


class Averager(Peer):
    """A peer whose nodes are all in this process: their sum is that of a list."""

    def __init__(self, run: Federation, name: str, *clients: int, ring: dict[int, Flat]) -> None:
        super().__init__(run, name, *clients)
        self.ring, self.kept = ring, dict[int, Any]()
        self.collective = collective_of(run.method)
        self.faults: dict[str, Any] = {}  # of its first answer
        self.reduce: Callable[[Reduce], list[Said]] = lambda order: [self.reduced(order)]

    def ready(self) -> Said:
        ready, data = super().ready()
        return msgspec.structs.replace(ready, meeting=HERE), data

    def update(self, task: Task, x: Flat | None = None) -> Said:
        update, data = super().update(task, x)
        assert isinstance(update, Update)
        assert update.payload is not None
        assert data is not None
        value = payload.decode(update.payload, bytes(data))
        self.kept[task.client] = contribution(value, task.client, update.examples)
        said = self.collective.announce(value)
        return msgspec.structs.replace(update, payload=payload.spec_of(said)), payload.encode(said)

    def hear(self, frames: list[bytes]) -> None:
        super().hear(frames)
        if isinstance(last := self.heard[-1], Reduce):
            for said in self.reduce(last):
                self.say(*said, delay=self.delay)

    def reduced(self, order: Reduce, **changes: Any) -> Said:
        self.ring[order.rank] = self.collective.share([self.kept[c] for c in order.clients], 10)
        assert order.examples == 10
        total = sum(self.ring[rank] for rank in sorted(self.ring))
        step = self.collective.step(self.x, np.asarray(total, np.float32))
        made = Reduced(
            round=order.round,
            attempt=order.attempt,
            digest=digest(step.values),
            exchanged=Exchanged(payload=64, message=70, sent=75, received=76),
            costs=(Cost("reduce", 0.5, 9_000_000),),
        )
        if order.rank == 0:
            made = msgspec.structs.replace(made, payload=payload.spec_of(step))
        made = msgspec.structs.replace(made, **(changes | self.faults))
        self.faults = {}
        return made, payload.encode(step) if made.payload is not None else None

    def apply(self, step: Step, data: Any) -> None:
        if step.payload is None:
            total = np.asarray(sum(self.ring.values()), np.float32)
            self.x, self.version = self.collective.step(self.x, total).values, step.version
            assert digest(self.x) == step.digest
        else:
            super().apply(step, data)


def circle(make: Make, rounds: int = 2) -> tuple[Federation, list[Averager]]:
    """Nodes a and b with two clients each; b answers first, as a's sum needs b's part."""
    run = make(method=ALLREDUCE, rounds={"count": rounds})
    ring: dict[int, Flat] = {}
    nodes = [Averager(run, "a", 0, 1, ring=ring), Averager(run, "b", 2, 3, ring=ring)]
    for peer in (*nodes, Peer(run, "evaluator")):
        peer.login()
    return run, nodes


def both(nodes: list[Averager]) -> None:
    """Have both nodes' parts in the ring before either answers."""
    a, b = nodes
    waiting: list[tuple[Averager, Reduce]] = []

    def join(node: Averager, order: Reduce) -> list[Said]:
        waiting.append((node, order))
        if len(waiting) == 2:
            for n, o in waiting:
                n.ring[o.rank] = n.collective.share([n.kept[c] for c in o.clients], o.examples)
            for n, o in waiting:
                n.say(*n.reduced(o), delay=n.delay)
            waiting.clear()
        return []

    a.reduce, b.reduce = (lambda order: join(a, order)), (lambda order: join(b, order))


def test_the_nodes_mean_is_committed_and_they_are_not_sent_it(make: Make) -> None:
    run, nodes = circle(make)
    both(nodes)
    summary = run.finish()
    assert summary["status"] == "completed"
    lr, n = 0.1, np.array([1, 2, 3, 4])  # client c has c + 1 examples and gradient c + 1
    assert run.server.central is not None
    np.testing.assert_allclose(run.server.central.x, run.x0 - 2 * lr * (n @ n) / n.sum(), atol=1e-6)
    for node, clients in zip(nodes, [(0, 1), (2, 3)], strict=True):
        asked = node.told(Reduce)
        assert [(o.round, o.clients, o.rank, o.ranks) for o in asked] == [
            (r, clients, node.name == "b", 2) for r in (1, 2)
        ]
        assert [s.payload for s in node.told(Step)] == [None]
    assert summary["bytes_by_kind"]["collective"] == {"up": 4 * 70, "down": 4 * 70}
    assert summary["seconds"]["by_phase"]["reduce"] == 2.0
    assert summary["memory_bytes"]["reduce"] == 9_000_000


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"digest": None, "fault": "Connection closed"}, "failed at node b: Connection closed"),
        ({"digest": bytes(16)}, "the nodes' results differ: a, b"),
    ],
)
def test_what_nodes_do_not_agree_on_fails_the_attempt_with_the_reason(
    make: Make, fault: dict[str, Any], reason: str
) -> None:
    run, nodes = circle(make, rounds=1)
    a, b = nodes
    both(nodes)
    b.faults = fault
    assert run.finish()["status"] == "completed"
    assert [o.attempt for o in a.told(Reduce)] == [0, 1]
    (told,) = (e.reason for e in run.events(CommitFailed))
    assert reason in told


def test_a_node_that_was_started_again_since_it_trained_is_not_asked(make: Make) -> None:
    run, nodes = circle(make, rounds=1)
    both(nodes)
    run.server.executor.collectives._processes = Changed()
    run.until(lambda: bool(run.events(CommitFailed)))
    assert not nodes[0].told(Reduce)
    assert "started again" in run.events(CommitFailed)[0].reason


def test_a_node_that_goes_while_the_others_average_is_named(make: Make) -> None:
    run, (a, b) = circle(make, rounds=1)
    a.reduce = lambda order: [a.reduced(order, digest=None, fault="closed", payload=None)]

    def leave(order: Reduce) -> list[Said]:
        del order
        run.net.cut(b.peer)
        return []

    b.reduce = leave
    run.until(lambda: bool(run.events(CommitFailed)))
    assert run.events(CommitFailed)[0].reason.startswith("node b was lost in the all-reduce")


def test_a_node_that_answers_after_all_was_over_says_what_it_cost_and_breaks_no_rule(
    make: Make,
) -> None:
    run, (a, b) = circle(make, rounds=1)
    b.reduce = lambda order: []
    a.reduce = lambda order: []
    run.until(lambda: bool(run.events(CommitFailed)))
    assert "in time" in run.events(CommitFailed)[0].reason
    late = b.reduced(b.told(Reduce)[0], digest=None, fault="too slow")
    b.say(*late)
    b.say(*late)  # a second answer to one question
    key = Key("b", "up", "collective")
    run.until(lambda: bool(run.recorder.account.num_rejected.get("bad message")))
    assert run.recorder.account.num_rejected["bad message"] == 1
    assert run.server.desk.meter.message[key] == 70


def test_more_examples_than_a_client_can_have_are_not_too_many_for_all_together(
    make: Make,
) -> None:
    """Of a pass over the data nobody knows how many there should be."""
    run = make(method=ALLREDUCE | {"steps": 0}, rounds={"count": 1})
    ring: dict[int, Flat] = {}
    nodes = [Averager(run, "a", 0, 1, ring=ring), Averager(run, "b", 2, 3, ring=ring)]
    a, b = nodes
    most = (1 << 40) - 1
    of_a = a.update

    def boasts(task: Task) -> list[Said]:
        update, data = of_a(task)
        return [(msgspec.structs.replace(update, examples=most), data)]

    a.answer = boasts
    a.reduce = b.reduce = lambda order: []
    for peer in (*nodes, Peer(run, "evaluator")):
        peer.login()
    run.until(lambda: bool(b.told(Reduce)))
    assert b.told(Reduce)[0].examples == 2 * most + 3 + 4


class Changed(dict[int, int]):
    """Whatever process it was, it is another now."""

    def get(self, key: int, default: Any = None) -> Any:
        return -1


def test_an_answer_that_nobody_asked_for_has_no_effect() -> None:
    commit = Commit(3, 0, (0,), ((0, "ref"),), ())
    made = Collective(commit, 10.0, waiting={"a"})
    answer = Reduced(round=3, digest=bytes(16))
    for name, said in (("b", answer), ("a", msgspec.structs.replace(answer, attempt=1))):
        with pytest.raises(RemoteProtocolError, match="no reduce"):
            made.hear(name, said, None)
    assert not made.is_over(9.9)
    assert made.is_over(10.0)
    assert made.fault == "node a did not end its all-reduce in time"
    made.hear("a", answer, None)
    with pytest.raises(RemoteProtocolError, match="no reduce"):
        made.hear("a", answer, None)
    assert made.fault == "no node brought the result"


def test_what_a_node_sent_to_others_is_up_and_what_came_is_down(make: Make) -> None:
    meter = make().server.desk.meter
    meter.grown(Growth("a", 10, 20, 0, 0.1, True))
    meter.exchanged("a", Exchanged(payload=64, message=70, sent=75, received=76, resent=3))
    assert meter.payload[Key("a", "up", "collective")] == 64
    assert meter.message[Key("a", "down", "collective")] == 70
    traffic = meter.traffic["a"]
    assert (traffic.sent, traffic.received, traffic.resent) == (10 + 76, 20 + 75, 0)
    meter.exchanged("a", Exchanged(payload=64, message=70))  # a kernel that does not count
    meter.grown(Growth("a", 10, 20, 0, 0.1, False))
    assert "a" not in meter.traffic
