"""Each fault once, in a whole run: it strikes, and the run ends as if it had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cluster import CHUNKED, Plan, run
from tests.faults.faults import (
    HELD,
    Act,
    BitFlip,
    Cut,
    Duplicate,
    Fault,
    HalfOpen,
    Jump,
    Kill,
    Partition,
    Poison,
    Reorder,
    Slow,
    Stop,
    Truncate,
)

pytestmark = [pytest.mark.net, pytest.mark.slow]

Digest = Callable[[str, int], str]
DAY = 86_400.0

HARMLESS: dict[str, tuple[Act, str]] = {
    "stopped for a moment": (Stop(0.5), "train"),
    "stopped until it is taken for dead": (Stop(2.0), "train"),
    "cut before the update is sent": (Cut(), "send update"),
    "cut after the update is sent": (Cut(), "sent update"),
    "half open when the task comes": (HalfOpen(), "got task"),
    "half open when the update is sent": (HalfOpen(), "send update"),
    "partitioned while training": (Partition(2.0), "train"),
    "truncated update": (Truncate(), "send update"),
    "update sent twice": (Duplicate(), "send update"),
    "updates in another order": (Reorder(), "send update"),
    "clock a day ahead": (Jump(DAY), "train"),
    "clock a day behind": (Jump(-DAY), "train"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_fault_changes_nothing_in_the_result(
    tmp_path: Path, name: str, undisturbed: Digest
) -> None:
    act, phase = HARMLESS[name]
    fault = Fault("node-0", phase, act, round=2)
    plan = Plan(script=[fault], linked=["node-0"], patience_seconds=1.0)
    ended = run(plan, tmp_path / "it")
    assert ended.fired == [fault]
    assert ended.digest == undisturbed("scalar", 24)
    assert not any(ended.missing.values())
    assert ended.summary["unexplained"] == {}


def test_a_flipped_bit_on_the_way_is_noticed_where_there_are_keys(
    tmp_path: Path, undisturbed: Digest
) -> None:
    fault = Fault("node-0", "send update", BitFlip(), round=2)
    ended = run(Plan(script=[fault], linked=["node-0"], is_secure=True), tmp_path / "it")
    assert ended.digest == undisturbed("scalar", 24)
    assert not any(ended.missing.values())
    assert [m.phase for m in ended.seen if m.who == "node-0"].count("send hello") > 1  # cut off


def test_keys_outlive_their_processes(tmp_path: Path, undisturbed: Digest) -> None:
    """Node and coordinator are killed in one round; the token that let the node in is used up."""
    script = [
        Fault("node-1", "train", Kill(), round=2),
        Fault("coordinator", "got update", Kill(), round=2, nth=2),
    ]
    ended = run(Plan(script=script, is_secure=True), tmp_path / "it")
    assert ended.digest == undisturbed("scalar", 24)
    assert not any(ended.missing.values())


def test_an_update_sent_twice_is_refused_once(tmp_path: Path) -> None:
    ended = run(Plan(script=[Fault("node-2", "send update", Duplicate(), 2)]), tmp_path / "it")
    assert sum(ended.summary["rejected"].values()) == 1, ended.summary["rejected"]


def test_an_update_that_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    fault = Fault("node-2", "send update", Poison(), round=2)
    ended = run(Plan("dense", script=[fault]), tmp_path / "it")
    assert list(ended.missing[2]) == ["4"]
    assert "finite" in ended.missing[2]["4"]
    assert ended.missing[1] == ended.missing[3] == {}


def test_a_slow_link_slows_its_own_node_only(tmp_path: Path, undisturbed: Digest) -> None:
    fault = Fault("node-2", "got welcome", Slow(300_000))
    plan = Plan("dense", CHUNKED, script=[fault, *HELD], linked=["node-2"], patience_seconds=30.0)
    ended = run(plan, tmp_path / "it")
    assert ended.digest == undisturbed("dense", CHUNKED)
    assert [line["node"] for line in ended.lines("costs.jsonl")[4::5]] == ["node-2"] * 3


def test_a_node_that_stays_away_is_named_with_the_reason(tmp_path: Path) -> None:
    fault = Fault("node-1", "train", Kill(), round=2)
    plan = Plan(script=[fault], left_down=["node-1"], return_seconds=0.5)
    ended = run(plan, tmp_path / "it")
    assert ended.summary["status"] == "completed"
    assert set(ended.missing[2]) == {"2", "3"}
    assert all("node-1 lost" in why for why in ended.missing[2].values())
    assert ended.missing[1] == {}
