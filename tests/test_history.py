"""What a node that is behind is sent."""

from __future__ import annotations

from coordinator.history import History, Kept
from protocol.messages import Step


def kept(version: int, size: int) -> Kept:
    """A step that costs ``10 * size`` bytes, body and all."""
    step = Step(version=version, round=version, digest=bytes(16))
    body = Kept(step, memoryview(b"")).nbytes
    assert 0 < body < 100
    return Kept(step, memoryview(bytes(10 * size - body)))


def history(*sizes: int, snapshot: int = 100, absolute: bool = False) -> History:
    made = History(10 * snapshot, absolute)
    for version, nbytes in enumerate(sizes, 1):
        made.add(kept(version, nbytes))
    return made


def versions(steps: list[Kept] | None) -> list[int] | None:
    return None if steps is None else [k.message.version for k in steps]


def test_a_node_that_is_up_to_date_gets_nothing() -> None:
    assert history().since(0) == []
    assert history(10, 10).since(2) == []
    assert history(10, 10).since(5) == []


def test_a_node_that_is_behind_gets_the_missed_steps_in_order() -> None:
    assert versions(history(10, 10, 10).since(0)) == [1, 2, 3]
    assert versions(history(10, 10, 10).since(1)) == [2, 3]
    assert versions(history(10, 10, 10).since(2)) == [3]


def test_a_node_with_nothing_of_use_gets_a_snapshot() -> None:
    assert history().since(-1) is None
    assert history(10, 10).since(-1) is None


def test_steps_that_cost_as_much_as_a_snapshot_are_still_sent_and_no_more() -> None:
    assert versions(history(40, 60).since(0)) == [1, 2]
    assert history(41, 60).since(0) is None
    assert versions(history(41, 60).since(1)) == [2]


def test_a_single_step_dearer_than_a_snapshot_gives_way_to_it() -> None:
    assert history(101).since(0) is None
    assert versions(history(100).since(0)) == [1]


def test_steps_that_nobody_will_be_sent_are_forgotten() -> None:
    h = history(*[30] * 10)
    assert h.oldest == 8
    assert len(h._steps) == 3
    assert versions(h.since(7)) == [8, 9, 10]
    assert h.since(6) is None


def test_the_newest_step_is_kept_whatever_it_costs() -> None:
    assert history(10, 500).oldest == 2
    assert history(10, 500).since(1) is None


def test_steps_that_replace_all_make_the_newest_suffice_for_anyone() -> None:
    h = history(100, 100, 100, absolute=True)
    assert h.oldest == 3
    for version in (-1, 0, 1, 2):
        assert versions(h.since(version)) == [3]
    assert h.since(3) == []
    assert history(absolute=True).since(-1) is None


def test_the_oldest_version_before_the_first_step_is_0() -> None:
    assert history().oldest == 0
