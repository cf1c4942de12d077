"""Our count against the kernel's, round by round: what is on its way, and what nothing explains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from coordinator.arrivals import Arrival, Breach, LoggedIn
from coordinator.desk import Desk
from coordinator.reconcile import LOOKS, Excess, Reconciler
from coordinator.roster import Member, Roster
from protocol.channel import to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.experiment import Nodes
from protocol.messages import Beat, Hello, Refuse, Welcome
from protocol.meter import Key, Meter, Way
from protocol.noise import STREAM
from protocol.router import Router
from protocol.tcp import Growth
from protocol.wire import Frame
from tests.faults.cluster import Plan, run
from tests.faults.faults import Fault, Miscount

PATIENCE = 10.0  # seconds


class Rounds:
    """A meter whose kernel is told what to say, of one node."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.reconciler = Reconciler(self.meter)

    def moved(self, up: int, down: int, is_first: bool = False, is_last: bool = False) -> None:
        """The kernel has."""
        self.meter.grown(Growth("a", down, up, 0, 0.1, is_first, is_last))

    def counted(self, way: Way, nbytes: int) -> None:
        """We have, with the framing."""
        self.meter.message[Key("a", way, "update")] += nbytes

    def close(self, is_idle: bool = True) -> tuple[list[int | None], list[Excess]]:
        """What is unexplained, up and down, and which of it is too much."""
        self.reconciler.look({"a"} if is_idle else set())
        table, compared, excesses = self.reconciler.close(set())
        found = [table["a"][way]["unexplained"] for way in ("up", "down")]
        assert compared == sum(one is not None for one in found)
        return found, excesses


def test_what_is_on_its_way_is_explained_and_what_stays_is_not() -> None:
    r = Rounds()
    r.counted("up", 100)
    r.counted("down", 200)
    r.moved(100, 200, is_first=True)
    assert r.close() == ([0, 0], [])
    r.moved(160, 50)  # a beat of 60 bytes is received, and we have not looked
    r.counted("up", 100)
    r.counted("down", 110)  # one of 60 is sent, and has not left
    assert r.close() == ([0, 0], [])
    r.counted("up", 160)
    r.moved(100, 60)
    assert r.close() == ([0, 0], [])
    r.counted("up", -10)
    r.counted("down", 30)
    lost = [Excess("a", "up", -10, 100), Excess("a", "down", 30, 100)]
    for outcome in [*(LOOKS - 1) * [([0, 0], [])], ([-10, 30], lost)]:  # it may be on its way,
        r.moved(100, 100)
        r.counted("up", 100)
        r.counted("down", 100)
        assert r.close() == outcome  # and was not
    assert r.close() == ([0, 0], [])  # said once


def test_what_cannot_be_on_its_way_is_known_at_once() -> None:
    r = Rounds()
    r.moved(1000, 1000, is_first=True)
    r.counted("up", 1011)  # read, and never received
    r.counted("down", 989)  # never sent, and gone
    both = [Excess("a", "up", 11, 1000), Excess("a", "down", -11, 1000)]
    assert r.close() == ([11, -11], both)


def test_a_hundredth_is_let_pass() -> None:
    r = Rounds()
    r.moved(1000, 1000, is_first=True)
    r.counted("up", 1010)
    r.counted("down", 990)
    assert r.close() == ([10, -10], [])


def test_a_node_that_owes_an_answer_is_looked_at_when_it_has_given_it() -> None:
    r = Rounds()
    r.counted("down", 5000)
    r.moved(0, 100, is_first=True)  # the task is still being sent
    assert r.close(is_idle=False) == ([None, None], [])
    assert r.close(is_idle=False) == ([None, None], [])
    r.moved(0, 4900)
    assert r.close() == ([0, 0], [])


def test_what_waits_to_be_read_may_be_the_difference() -> None:
    r = Rounds()
    r.moved(60, 100, is_first=True)
    r.counted("down", 100)
    for up, found in ((0, [None, 0]), (60, [0, 0]), (0, [0, 0])):
        r.counted("up", up)
        r.reconciler.look({"a"}, is_drained=False)
        table, _, _ = r.reconciler.close(set())
        assert [table["a"][way]["unexplained"] for way in ("up", "down")] == found


@pytest.mark.parametrize("is_read", [True, False])
def test_what_was_lost_with_a_connection_is_no_mistake(is_read: bool) -> None:
    r = Rounds()
    r.moved(0, 0, is_first=True)
    assert r.close() == ([0, 0], [])
    r.counted("down", 700)
    r.moved(50, 100, is_last=is_read)  # 600 bytes never left, 50 were never read
    if not is_read:  # the end of the old connection; the new one is known all the same
        r.meter.connected("a")
        r.meter.connected("a")
        r.moved(2 * 107, 2 * 107)
    r.moved(60, 0, is_first=True)  # a beat is on its way over the next
    assert r.close() == ([None, None], [])
    r.counted("up", 60)
    for _ in range(LOOKS - 1):
        assert r.close() == ([None, None], [])
    r.counted("up", 100)
    r.moved(100, 0)
    assert r.close() == ([0, 0], [])
    r.counted("up", 100)
    r.moved(50, 0)
    assert r.close() == ([50, 0], [Excess("a", "up", 50, 50)])


def test_a_round_has_its_bytes_by_node_way_kind_and_level() -> None:
    meter = Meter("curve")
    meter.count(Key("a", "up", "update"), [bytes(1), bytes(100)], 90)
    reconciler = Reconciler(meter)
    meter.count(Key("a", "up", "update"), [bytes(1), bytes(300)], 280)
    meter.count(Key("a", "up", "heartbeat"), [bytes(1)], 0)
    meter.count(Key("a", "down", "task"), [bytes(10)], 0)
    meter.count(Key("judge", "up", "evaluate"), [bytes(10)], 0)
    meter.grown(Growth("a", 45, 420, 7, 0.1, True))
    meter.grown(Growth("judge", 45, 420, 7, 0.1, True))
    reconciler.look({"a", "judge"})
    table, compared, _ = reconciler.close({"judge"})
    assert table == {
        "a": {
            "up": {
                "payload": {"update": 280},
                "message": {"update": 301 + 2 * 33 + 2 + 9, "heartbeat": 36},
                "zmtp": 2 + 9 + 2,
                "curve": 3 * 33,
                "tcp": 420,
                "unexplained": None,  # of a run that was resumed: something may have been lost
            },
            "down": {
                "message": {"task": 45},
                "zmtp": 2,
                "curve": 33,
                "tcp": 45,
                "resent": 7,
                "unexplained": 0,
            },
        }
    }
    assert compared == 1
    assert reconciler.close({"judge"})[0]["a"]["up"] == {"tcp": 0, "unexplained": None}


# --- real processes ----------------------------------------------------------------


@pytest.mark.net
@pytest.mark.parametrize("is_known", [False, True])
def test_what_is_said_before_a_login_is_counted_with_it(is_known: bool) -> None:
    """As the kernel does, from a connection's beginning; so is what is no message."""
    router = Router("tcp://127.0.0.1:*")
    dealer = Dealer(router.endpoint)
    desk = Desk(router, Roster(1, "1"), Nodes(), time.monotonic)
    hello = Hello(node="a", software="1", stream=STREAM, clients=(0,))

    def say(frames: Sequence[Frame]) -> list[Arrival]:
        assert dealer.send(frames)
        return list(desk.receive(PATIENCE))

    def log_in(login: int) -> Member:
        (came,) = say(to_coordinator.pack(msgspec.structs.replace(hello, login=login)))
        assert isinstance(came, LoggedIn)
        desk.send(came.member, Welcome(run="r", experiment={}))
        assert dealer.recv(PATIENCE) is not None
        return came.member

    try:
        if is_known:  # then taken for silent
            desk.drop(log_in(1))
        assert say(to_coordinator.pack(Beat())) == []
        assert dealer.recv(PATIENCE) == to_node.pack(Refuse(code="login", reason="log in first"))
        (breach,) = say([b"nonsense"])
        assert breach == Breach(None, "version frame of 8 bytes")
        member = log_in(2)
        (breach,) = say([b"more nonsense"])
        assert isinstance(breach, Breach)
        desk.measure()
        for (node, _), gap in desk.meter.gaps().items():
            assert (node, gap.ours) == (member.name, gap.kernel)
        assert len(desk.meter.gaps()) == 2
    finally:
        dealer.close()
        router.close()


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize(("method", "size"), [("scalar", 24), ("sparse", 400), ("dense", 60_000)])
@pytest.mark.parametrize("is_secure", [False, True])
def test_the_bytes_of_every_round_are_the_kernels(
    tmp_path: Path, method: str, size: int, is_secure: bool
) -> None:
    plan = Plan(method, size, rounds=8, is_secure=is_secure, patience_seconds=30.0)
    ended = run(plan, tmp_path / "it")
    assert ended.summary["unexplained"] == {}
    lines = ended.lines("bytes.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    found = [
        node[way]["unexplained"]
        for line in lines
        for node in line["nodes"].values()
        for way in ("up", "down")
    ]
    assert set(found) <= {0, None}
    # some may have logged in twice at the start, or have had a beat waiting
    assert ended.summary["compared"] == len(found) - found.count(None) > 0
    total = ended.lines("metrics.jsonl")[-2]["bytes"]  # the last round's
    for way in ("up", "down"):
        sides = [node[way] for line in lines for node in line["nodes"].values()]
        assert sum(side["tcp"] for side in sides) == total[f"tcp_{way}"]
        for level in ("payload", "message"):
            both = sum(n for side in sides for n in side.get(level, {}).values())
            assert both == total[f"{level}_{way}"]
        assert all(bool(side["curve"]) == is_secure for side in sides if "curve" in side)


@pytest.mark.net
@pytest.mark.slow
def test_a_miscount_is_a_line_in_the_log_once_for_each_node_and_in_the_summary(
    tmp_path: Path,
) -> None:
    fault = Fault("coordinator", "got update", Miscount(4), round=2)
    ended = run(Plan(rounds=12, script=[fault], patience_seconds=30.0), tmp_path / "it")
    found = ended.summary["unexplained"]
    assert found.keys() == {"node-0", "node-1", "node-2"}
    for ways in found.values():
        assert ways["up"]["first"] >= 2
        assert ways["up"]["bytes"] >= 2 * 3 * 4  # rounds, and an update's three frames
        assert ways["down"]["bytes"] > 0
    log = (ended.directory / "logs" / "coordinator.log").read_text()
    assert log.count("counted beside the kernel's") == 6
    assert log.count("node node-0 up: ") == 1
