"""What a node lets a round take: plans within it by hand, on real sizes, and in real processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from coordinator.events import Assign, NodeLost, NodeReady, Resumed
from coordinator.roster import Roster
from coordinator.state import Training
from deploy.errors import LabError
from fedalgos import split
from fedalgos.fedavg import FedAvg
from fedalgos.flasc import Flasc
from fedalgos.fwdllm import FwdLLM, directions
from fedalgos.hetlora import HetLora
from fedalgos.limits import Limit, Takes, lowered, shortage
from fedalgos.method import Assignment, Contribution, Method, Plan, Work
from fedalgos.optim import Sgd
from fedalgos.registry import AnySettings, build
from fedalgos.spry import Spry
from node.measure import LimitError, Phases
from node.options import parse_limits
from protocol import places, wire
from protocol.messages import Hello
from protocol.parts import Cost, Limits
from protocol.payload import encode, spec_of
from tests.faults import cluster
from tests.faults.cluster import Ended
from tests.faults.cluster import run as play_out
from tests.faults.faults import Fault, Hoard, Kill
from tests.oracles import over_the_wire, space_of, towards
from tests.test_laws import PAIR
from tests.test_rounds import OPEN, A, B, play
from tests.test_server import Make, Peer, Run, make

__all__ = ["make"]  # the fixture

SPACE = space_of(5, 2, 3, 2)  # 12 numbers: 48 bytes down, if all of it changes


# --- sizes -----------------------------------------------------------------------


@given(st.integers(1, 3000), st.data())
def test_no_places_take_more_bytes_than_the_most(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    seed = data.draw(st.integers(0, 99))
    rng = np.random.Generator(np.random.PCG64(seed))
    at = np.sort(rng.permutation(n)[:k]) if data.draw(st.booleans()) else np.arange(n - k, n)
    assert places.nbytes(n, at)[1] <= places.most_nbytes(n, k)


def test_the_most_is_little_more_than_random_places_take() -> None:
    n, k = 100_000, 10_000
    at = np.sort(np.random.Generator(np.random.PCG64(1)).permutation(n)[:k])
    assert places.most_nbytes(n, k) < 1.15 * places.nbytes(n, at)[1]


def test_a_tier_is_lowered_to_the_highest_that_fits_all_clients_of_the_node() -> None:
    def takes(tier: int) -> Takes:
        return (Takes(10, 5), Takes(20, 10), Takes(40, 20))[tier]

    assert [lowered(2, takes, Limit(n)) for n in (60, 59, 30, 29, 15, 3)] == [2, 1, 1, 0, 0, 0]
    assert [lowered(2, takes, Limit(80, clients)) for clients in (2, 3, 6, 7)] == [2, 1, 1, 0]
    assert lowered(1, takes, Limit(1000)) == 1  # never raised
    assert lowered(2, takes, None) == 2
    assert shortage(takes, Limit(25, 3)) is None
    assert shortage(takes, Limit(24, 3)) == (
        "a round takes 10 bytes of payload down and 5 up for each client, "
        "at the least; 24 are too few for 3 clients"
    )
    assert shortage(None, Limit(1)) is None


# --- units: 5, 2, 3 and 2 numbers -------------------------------------------------


def units(plan: Plan) -> list[tuple[int, ...]]:
    return [a.units for a in plan]


def planned(*held: tuple[int, ...]) -> Plan:
    return tuple(Assignment(client, u, slot=client) for client, u in enumerate(held))


def room(numbers: int, clients: int = 1) -> Limit:
    """For updates of so many numbers each, beside the step."""
    return Limit(48 + 4 * numbers * clients, clients)


def test_units_that_a_client_has_no_room_for_go_to_the_least_loaded_that_has() -> None:
    plan = planned((0, 2), (1, 3))
    assert units(split.fit(SPACE, plan, {})) == [(0, 2), (1, 3)]
    assert units(split.fit(SPACE, plan, {0: room(8)})) == [(0, 2), (1, 3)]
    assert units(split.fit(SPACE, plan, {0: room(7)})) == [(0,), (1, 2, 3)]
    assert units(split.fit(SPACE, plan, {0: room(7, 3)})) == [(0,), (1, 2, 3)]
    three = planned((0, 1), (2,), (3,))  # client 2 has the least
    assert units(split.fit(SPACE, three, {0: room(5)})) == [(0,), (2,), (1, 3)]
    assert units(split.fit(SPACE, three, {0: room(5), 2: room(3)})) == [(0,), (1, 2), (3,)]


def test_a_unit_that_nobody_has_room_for_is_trained_by_nobody_and_named() -> None:
    two = planned((0, 2), (1, 3))
    plan = split.fit(SPACE, two, {0: room(3), 1: room(4)})
    assert units(plan) == [(2,), (1, 3)]
    assert split.unheld(SPACE, plan) == ["u0"]
    plan = split.fit(SPACE, two, {0: room(2), 1: room(4)})
    assert units(plan) == [(1,), (1, 3)]  # with neither of its own it shares one that fits
    assert split.unheld(SPACE, plan) == ["u0", "u2"]
    assert split.unheld(SPACE, two) == split.unheld(SPACE, planned(())) == []


def test_a_client_without_room_for_any_unit_gets_the_smallest() -> None:
    plan = split.fit(SPACE, planned((0,), (1, 2, 3)), {0: Limit(0)})
    assert units(plan) == [(1,), (0, 1, 2, 3)]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 6),
    st.dictionaries(st.integers(0, 5), st.integers(0, 60)),
)
def test_whoever_can_keep_within_the_limit_does_and_no_unit_is_lost_that_has_room(
    sizes: list[int], num_clients: int, numbers: dict[int, int]
) -> None:
    space = space_of(*sizes)
    most = {c: n for c, n in numbers.items() if c < num_clients}
    limits = {c: Limit(4 * (space.size + n)) for c, n in most.items()}
    plan = split.fit(space, split.plan(split.split(space), range(num_clients)), limits)
    loads = [space.count(a.units) for a in plan]
    for c, n in most.items():
        assert plan[c].units
        assert loads[c] <= n or (n < min(sizes) and len(plan[c].units) == 1)
    for name in split.unheld(space, plan):
        size = next(u.stop - u.start for u in space.units if u.name == name)
        assert all(c in most and loads[c] + size > most[c] for c in range(num_clients)) or any(
            loads[c] == 0 for c in range(num_clients)
        )
    if len(most) < num_clients:
        assert split.unheld(space, plan) == []


# --- methods within limits ---------------------------------------------------------


TIERS = (0.25, 0.5, 1.0)
BIG = space_of(300, 200, 400, 100)
KINDS: dict[str, AnySettings] = {
    "flasc": Flasc(tiers=TIERS, local=Sgd(lr=0.1), server=Sgd(lr=0.5)),
    "spry": Spry(local=Sgd(lr=0.1), server=Sgd(lr=0.5)),
    "fedavg": FedAvg(split=True, local=Sgd(lr=0.1)),
    "fwdllm": FwdLLM(perturbations=40, gate="none"),
}


@pytest.mark.parametrize("name", KINDS)
def test_without_limits_the_plan_is_as_it_was(name: str) -> None:
    method = build(KINDS[name], BIG, 3)
    state, _ = method.init(np.ones(BIG.size, np.float32))
    plan = method.plan(state, 1, (2, 0, 1))
    assert method.fit(state, plan, {}) == plan
    assert method.fit(state, plan, {1: Limit(1 << 30)}) == plan


def a_round(method: Method[Any], limits: dict[int, Limit]) -> tuple[list[int], int, Plan]:
    """Bytes of each client's update, of the step, and the plan, of a round of three."""
    x = np.linspace(-1, 1, BIG.size, dtype=np.float32)
    state, first = method.init(x)
    x = x if first is None else method.apply(x, 0, first)
    plan = method.fit(state, method.plan(state, 1, (0, 1, 2)), limits)
    sent, sizes = [], []
    for a in plan:
        oracle = towards(np.full(BIG.size, 1.0 + a.client, np.float32))
        value = over_the_wire(method.local(x, oracle, [None], Work(1, a))[0])
        assert method.accepts(a, value) is None
        sent.append(Contribution(a, 4, value))
        sizes.append(spec_of(value).nbytes)
    _, step = method.aggregate(state, x, 1, sent)
    assert np.isfinite(method.apply(x, 1, over_the_wire(step))).all()
    return sizes, len(encode(step)), plan


@pytest.mark.parametrize("name", ["spry", "fedavg", "fwdllm"])
@pytest.mark.parametrize("share", [0.95, 0.7])
def test_a_client_with_a_limit_keeps_within_it_and_others_do_what_is_left(
    name: str, share: float
) -> None:
    method = build(KINDS[name], BIG, 3)
    sizes, step, _ = a_round(method, {})
    client = sizes.index(max(sizes))
    limit = Limit(step + int(share * sizes[client]))
    fitted, after, _ = a_round(method, {client: limit})
    assert after + fitted[client] <= limit.nbytes
    assert fitted[client] < sizes[client]
    assert all(fitted[c] >= sizes[c] for c in range(3) if c != client)


def test_a_client_of_flasc_with_a_limit_works_as_the_tier_that_fits() -> None:
    method = build(KINDS["flasc"], BIG, 3)
    assert method.takes is not None
    sizes, _, _ = a_round(method, {})  # tiers 0, 1 and 2
    for tier in (0, 1):
        takes = method.takes(tier)
        limits = {c: Limit(takes.down + 2 * takes.up, 2) for c in range(3)}
        fitted, _, plan = a_round(method, limits)
        assert [a.tier for a in plan] == [*[None] * (tier + 1), *[tier] * (2 - tier)]
        assert fitted[: tier + 1] == sizes[: tier + 1]
        assert all(4000 * TIERS[tier] < n <= takes.up for n in fitted[tier:])


def test_a_client_of_hetlora_with_a_limit_trains_a_lower_rank() -> None:
    method = build(HetLora(ranks=(1, 2), local=Sgd(lr=0.1), server=Sgd(lr=0.5)), PAIR, 3)
    assert method.takes is not None  # ranks of 3 + 2 + 2 and 6 + 4 + 2 numbers
    assert [method.takes(tier) for tier in (0, 1)] == [Takes(28, 28), Takes(48, 48)]
    x = np.linspace(-1, 1, PAIR.size, dtype=np.float32)
    state, _ = method.init(x)
    plan = method.plan(state, 1, (0, 1))
    assert method.fit(state, plan, {0: Limit(96), 1: Limit(96)}) == plan
    (_, low) = method.fit(state, plan, {0: Limit(95), 1: Limit(95)})
    assert low.tier == 0
    oracle = towards(np.ones(PAIR.size, np.float32))
    value, _ = method.local(x, oracle, [None], Work(1, low))
    assert len(value.values) == 7
    assert method.accepts(low, value) is None
    _, step = method.aggregate(state, x, 1, [Contribution(low, 1, value)])
    assert np.isfinite(step.values).all()


def test_fwdllm_asks_for_as_many_directions_as_there_is_room_for() -> None:
    method = build(KINDS["fwdllm"], BIG, 3)
    state, _ = method.init(np.zeros(BIG.size, np.float32))
    plan = method.plan(state, 1, (0, 1))  # 80 scalars down at the most: 320 bytes
    limits = {0: Limit(320 + 4 * 7), 1: Limit(320 + 4 * 7 * 3 + 3, 3)}
    a, b = method.fit(state, plan, limits)
    assert [directions(a), directions(b)] == [list(range(7)), list(range(40, 47))]
    (least, _) = method.fit(state, plan, {0: Limit(5)})
    assert directions(least) == [0]


@pytest.mark.parametrize(
    ("estimator", "passes", "most"),
    [("central", 24.0, 6), ("central", 23.9, 5), ("central", 0.1, 1), ("jvp", 27.0, 6)],
)
def test_fwdllm_asks_for_as_many_directions_as_there_is_time_for(
    estimator: Literal["central", "jvp"], passes: float, most: int
) -> None:
    """Of two mini-batches each."""
    o = msgspec.structs.replace(KINDS["fwdllm"], estimator=estimator, steps=2)
    method = build(o, BIG, 3)
    state, _ = method.init(np.zeros(BIG.size, np.float32))
    plan = method.plan(state, 1, (0, 1))
    limited, free = method.fit(state, plan, {0: Limit(passes=passes)})
    assert directions(limited) == list(range(most))
    assert free == plan[1]
    both = method.fit(state, plan, {0: Limit(320 + 4 * 3, passes=passes)})
    assert directions(both[0]) == list(range(min(3, most)))  # whichever is less


def test_how_long_a_pass_over_the_data_takes_is_not_known() -> None:
    method = build(msgspec.structs.replace(KINDS["fwdllm"], steps=0), BIG, 3)
    state, _ = method.init(np.zeros(BIG.size, np.float32))
    plan = method.plan(state, 1, (0, 1))
    assert method.fit(state, plan, {0: Limit(passes=1.0)}) == plan


def test_flascs_tiers_take_no_more_than_they_say() -> None:
    method = build(KINDS["flasc"], BIG, 3)
    assert method.takes is not None
    x = np.linspace(-1, 1, BIG.size, dtype=np.float32)
    _, step = method.init(x)
    assert step is not None
    for tier in range(3):
        assert len(encode(method.view(step, tier))) <= method.takes(tier).down


# --- the machine -----------------------------------------------------------------


def test_a_round_is_planned_within_the_limits_as_of_its_opening() -> None:
    mine, other = Limit(500, 2), Limit(7, 2)
    first = (A.__class__(1.0, "a", (0, 1), mine), B, *OPEN[2:])
    state, said = play(*first)
    assert said[-1] == Assign(1, 0, (2, 1, 0), (2, 1, 0), {0: mine, 1: mine})
    assert isinstance(state.phase, Training)
    back = NodeReady(6.0, "a", (0, 1), other)
    again, said = play(*first, NodeLost(5.0, "a", "gone"), back)
    assert said[-1] == Assign(1, 0, (2, 1, 0), (1, 0), {0: mine, 1: mine})
    assert again.limits == {0: other, 1: other}  # of the next round
    assert play(*first, Resumed(9.0))[0].limits == {0: mine, 1: mine}
    assert play(*first, NodeReady(9.0, "a", (0, 1)))[0].limits == {}


# --- the shell -------------------------------------------------------------------

WIDE = space_of(40, 30, 20, 10)
TIERED = {"name": "flasc", "tiers": [0.1, 0.5, 1.0], "server": {"kind": "sgd", "lr": 1.0}}


def nodes(run: Run, limits: Limits | None) -> tuple[Peer, Peer]:
    a, b, judge = Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")
    judge.login()
    a.login()
    b.login(limits=limits)
    return a, b


def up(run: Run, name: str) -> int:
    """Payload bytes of a node's updates."""
    return sum(n for k, n in run.recorder.meter.payload.items() if k[:] == (name, "up", "update"))


def down(run: Run, name: str) -> int:
    """Payload bytes of a node's steps, or of snapshots where those are shorter."""
    return sum(n for k, n in run.recorder.meter.payload.items() if k[:2] == (name, "down"))


@pytest.mark.parametrize("method", [TIERED, {"name": "fedavg", "split": True}])
def test_a_limited_nodes_rounds_are_within_it_and_it_stands_in_the_run_directory(
    make: Make, method: dict[str, Any]
) -> None:
    free = make(WIDE, method=method)
    nodes(free, None)
    free.finish()
    limit = 200 if method is TIERED else 400 + 2 * 80
    run = make(WIDE, method=method)
    nodes(run, Limits(bytes=limit))
    summary = run.finish()
    assert summary["rejected"] == {}
    assert summary["status"] == "completed"
    assert down(run, "b") + up(run, "b") <= 2 * limit  # two rounds
    assert up(run, "b") < up(free, "b")
    assert up(run, "a") >= up(free, "a")
    known = json.loads((run.directory / "nodes.json").read_text())
    assert known["b"]["limits"] == {"bytes": limit}
    assert known["a"]["limits"] is None


def test_a_node_with_little_time_is_asked_for_fewer_directions(make: Make) -> None:
    """By the inference that it has measured, which a later login does not say again."""
    method = {"name": "fwdllm", "perturbations": 40, "gate": "none"}
    run = make(WIDE, method=method)
    a, b, judge = Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")
    judge.login()
    a.login()
    b.login(limits=Limits(seconds=1.25))  # of inferences of 0.1
    summary = run.finish()
    assert summary["rejected"] == {}
    assert up(run, "a") == 2 * 2 * 40 * 4  # rounds, clients, directions
    assert up(run, "b") == 2 * 2 * 6 * 4


def test_an_inference_that_is_said_to_take_no_time_at_all_stops_nobody(make: Make) -> None:
    run = make(WIDE, method={"name": "fwdllm", "perturbations": 40, "gate": "none"})
    a, b, judge = Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")
    said, data = b.ready()
    said = msgspec.structs.replace(said, costs=(Cost("inference", 5e-324),))
    b.ready = lambda: (said, data)  # type: ignore[method-assign]
    judge.login()
    a.login()
    b.login(limits=Limits(seconds=1e9))
    assert run.finish()["status"] == "completed"
    assert up(run, "a") == up(run, "b")


def test_a_later_login_of_a_node_keeps_how_long_an_inference_takes() -> None:
    roster = Roster(4, "1")
    here = wire.Peer(b"there")
    hello = Hello(node="a", software="1", stream="x", clients=(0, 1), limits=Limits(seconds=3.0))
    first, _ = roster.admit(hello, here, 0.0)
    limits = [first.limit]  # not known yet
    roster.probed(first, (Cost("load", 9.0), Cost("inference", 0.25)))
    limits.append(first.limit)
    roster.drop(first)
    limits.append(roster.admit(hello, here, 1.0)[0].limit)
    assert limits == [None, Limit(clients=2, passes=12.0), Limit(clients=2, passes=12.0)]


def test_limits_that_change_nothing_leave_the_digest_as_it_is(make: Make) -> None:
    digests = set()
    for limits in (None, Limits(), Limits(bytes=1 << 30), Limits(memory=1, seconds=1.0)):
        run = make(WIDE, method=TIERED)
        nodes(run, limits)
        digests.add(run.finish()["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_node_that_cannot_keep_its_limit_is_refused_with_one_line(make: Make, late: bool) -> None:
    run = make(WIDE, method={"name": "fedavg"}, nodes={"start_clients": 2}, rounds={"count": 9})
    a, judge = Peer(run, "a", 0, 1), Peer(run, "evaluator")
    b = Peer(run, "b", 2, 3)
    judge.login(at=1.0)
    a.login()
    b.login(at=1.5 if late else 0.0, limits=Limits(bytes=1199))  # 400 down, 400 up for each
    summary = run.finish()
    (refusal,) = (m for m in b.heard if type(m).__name__ == "Refuse")
    assert refusal.code == "limits"  # type: ignore[attr-defined]
    assert refusal.reason == (  # type: ignore[attr-defined]
        "node b: a round takes 400 bytes of payload down and 400 up for each client, "
        "at the least; 1199 are too few for 2 clients"
    )
    assert summary["status"] == "completed"
    exact = make(WIDE, method={"name": "fedavg"})
    nodes(exact, Limits(bytes=1200))
    exact.finish()


def test_a_limit_that_the_method_cannot_plan_within_is_said_to_be_idle(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for name, is_idle in (("fedmezo", True), ("sparse-adapter", True), ("fwdllm", False)):
        caplog.clear()
        run = make(WIDE, method={"name": name})
        a, b, judge = Peer(run, "a", 0, 1), Peer(run, "b", 2, 3), Peer(run, "evaluator")
        a.login()
        b.login(limits=Limits(bytes=5))
        judge.login(at=1.0)  # the parameters are known after the node was ready
        assert run.finish()["status"] == "completed"
        said = [m for m in caplog.messages if m.startswith("node b: --max-bytes has no effect")]
        assert len(said) == is_idle


# --- the node --------------------------------------------------------------------


def test_limits_on_the_command_line() -> None:
    assert parse_limits("", "", 0.0) is None
    assert parse_limits("900MB", "200kB", 30.0) == Limits(
        memory=900_000_000, bytes=200_000, seconds=30.0
    )
    assert parse_limits("", "1.5 GB", 0) == Limits(bytes=1_500_000_000)
    assert parse_limits("", "1500", 0) == Limits(bytes=1500)
    for text in ("0", "-1", "9 TB", "9999GB", "x", "9" * 400):
        with pytest.raises(typer.BadParameter, match=r"--max-memory .*want a size"):
            parse_limits(text, "", 0)
        with pytest.raises(typer.BadParameter, match=r"--max-bytes .*want a size"):
            parse_limits("", text, 0)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(typer.BadParameter, match="--max-seconds"):
            parse_limits("", "", seconds)


def test_a_phase_past_a_limit_says_so() -> None:
    phases = Phases()
    with phases("train"):
        phases.check(Limits())
        phases.check(Limits(memory=1 << 40, seconds=1e6))
        with pytest.raises(LimitError, match=r"s, and --max-seconds is 1e-09"):
            phases.check(Limits(seconds=1e-9))
        block = np.ones(25_000_000)  # 200 MB
        with pytest.raises(LimitError, match="MB resident, and --max-memory is 200 MB"):
            phases.check(Limits(memory=int(block.nbytes)))
    with phases("train"):
        del block


# --- real processes ----------------------------------------------------------------


@pytest.mark.net
@pytest.mark.slow
def test_a_node_with_a_limit_of_bytes_in_real_processes(tmp_path: Path) -> None:
    """Node 0 hosts clients 0 and 1, of tiers 0 and 1, and is held to tier 0."""
    size, rounds = 4000, 3
    free = play_out(cluster.Plan("tiers", size, rounds=rounds), tmp_path / "free")
    options = {"node-0": ["--max-bytes", "14kB"]}
    ended = [
        play_out(cluster.Plan("tiers", size, rounds=rounds, options=options), tmp_path / name)
        for name in ("one", "two")
    ]
    assert not any(ended[0].missing.values())
    assert ended[0].summary["rejected"] == {}
    assert ended[0].digest == ended[1].digest != free.digest
    assert rounds * 14_000 < payload_of(free, "node-0")
    assert payload_of(ended[0], "node-0") <= rounds * 14_000
    assert payload_of(ended[0], "node-1") == payload_of(free, "node-1")
    assert "refused" not in str(ended[0].lines("metrics.jsonl"))
    known = json.loads((ended[0].directory / "nodes.json").read_text())
    assert known["node-0"]["limits"] == {"bytes": 14_000}


@pytest.mark.net
@pytest.mark.slow
def test_killed_processes_go_on_within_the_same_limits(tmp_path: Path) -> None:
    options = {"node-0": ["--max-bytes", "14kB"]}
    script = [
        Fault("node-0", "train", Kill(), round=2),
        Fault("coordinator", "got update", Kill(), round=2, nth=2),
    ]
    quiet = play_out(cluster.Plan("tiers", 4000, options=options), tmp_path / "quiet")
    ended = play_out(cluster.Plan("tiers", 4000, script=script, options=options), tmp_path / "it")
    assert len(ended.fired) == 2
    assert ended.digest == quiet.digest
    assert not any(ended.missing.values())


def payload_of(ended: Ended, node: str) -> int:
    """Of a node's steps and updates in a whole run."""
    status = json.loads((ended.directory / "status.json").read_text())
    (found,) = (n for n in status["nodes"] if n["node"] == node)
    kinds = found["bytes"]["payload"]
    down = kinds.get("step", kinds["model"])["down"]  # a snapshot, where that is shorter
    return int(down + kinds["update"]["up"])


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--max-seconds", "1e-7"), "s, and --max-seconds is 1e-07"),
        (("--max-memory", "1MB"), "MB resident, and --max-memory is 1 MB"),
    ],
)
def test_a_task_past_its_nodes_limit_ends_with_the_reason_and_the_round_goes_on(
    tmp_path: Path, option: Sequence[str], said: str
) -> None:
    ended = play_out(cluster.Plan(rounds=2, options={"node-0": option}), tmp_path / "it")
    assert ended.summary["status"] == "completed"
    assert len(ended.missing) == 2
    for missing in ended.missing.values():
        assert missing.keys() == {"0", "1"}
        assert all(said in why for why in missing.values())
    assert ended.summary["rejected"] == {"task failed": 4}
    assert "Traceback" not in (tmp_path / "it" / "logs" / "node-0.log").read_text()


@pytest.mark.net
@pytest.mark.slow
def test_a_node_that_breaks_its_groups_limit_is_killed_and_the_round_goes_on(
    tmp_path: Path,
) -> None:
    """By the kernel, in the middle of a task of round 2; it comes back, and trains in round 3."""
    limit, clients = 200_000_000, {"0", "1"}  # what is node-0's alone of a forked process is less
    script = [Fault("node-0", "train", Hoard(2 * limit), round=2)]
    plan = cluster.Plan(script=script, memory={"node-0": limit}, patience_seconds=10.0)
    try:
        ended = play_out(plan, tmp_path / "it")
    except LabError as error:  # not as root, or not with this kernel
        pytest.skip(str(error))
    assert ended.starts["node-0"] == 2
    assert ended.summary["status"] == "completed"
    assert [bool(missing) for missing in ended.missing.values()] == [False, True, False]
    (client,) = ended.missing[2].keys() & clients
    why = ended.missing[2][client]
    assert why == "out of memory: the kernel killed node node-0 at its limit of 200 MB"
    assert ended.missing[2].keys() == {client}  # the other is trained by who came back
    assert ended.summary["rejected"] == {"task failed": 1}
    assert why in (ended.directory / "logs" / "coordinator.log").read_text()
    known = json.loads((ended.directory / "nodes.json").read_text())
    assert known["node-0"]["memory_limit"] == pytest.approx(limit, abs=1 << 16)
    assert known["node-1"]["memory_limit"] != known["node-0"]["memory_limit"]
