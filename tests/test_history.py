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


SNAPSHOT = kept(77, 100)


def sent(h: History, version: int) -> list[int] | None:
    """The versions of the steps, or None for a snapshot."""
    catch_up = h.since(version, lambda: SNAPSHOT)
    assert catch_up.is_snapshot == (catch_up.kept == (SNAPSHOT,))
    return None if catch_up.is_snapshot else [k.message.version for k in catch_up.kept]


def test_a_node_that_is_up_to_date_gets_nothing() -> None:
    assert sent(history(), 0) == []
    assert sent(history(10, 10), 2) == []
    assert sent(history(10, 10), 5) == []


def test_a_node_that_is_behind_gets_the_missed_steps_in_order() -> None:
    assert sent(history(10, 10, 10), 0) == [1, 2, 3]
    assert sent(history(10, 10, 10), 1) == [2, 3]
    assert sent(history(10, 10, 10), 2) == [3]


def test_a_node_with_nothing_of_use_gets_a_snapshot() -> None:
    assert sent(history(), -1) is None
    assert sent(history(10, 10), -1) is None


def test_steps_that_cost_as_much_as_a_snapshot_are_still_sent_and_no_more() -> None:
    assert sent(history(40, 60), 0) == [1, 2]
    assert sent(history(41, 60), 0) is None
    assert sent(history(41, 60), 1) == [2]


def test_a_single_step_dearer_than_a_snapshot_gives_way_to_it() -> None:
    assert sent(history(101), 0) is None
    assert sent(history(100), 0) == [1]


def test_steps_that_nobody_will_be_sent_are_forgotten() -> None:
    h = history(*[30] * 10)
    assert h.oldest == 8
    assert len(h._steps) == 3
    assert sent(h, 7) == [8, 9, 10]
    assert sent(h, 6) is None


def test_the_newest_step_is_kept_whatever_it_costs() -> None:
    assert history(10, 500).oldest == 2
    assert sent(history(10, 500), 1) is None


def test_steps_that_replace_all_make_the_newest_suffice_for_anyone() -> None:
    h = history(100, 100, 100, absolute=True)
    assert h.oldest == 3
    for version in (-1, 0, 1, 2):
        assert sent(h, version) == [3]
    assert sent(h, 3) == []
    assert sent(history(absolute=True), -1) is None


def test_the_oldest_version_before_the_first_step_is_0() -> None:
    assert history().oldest == 0


def test_both_ways_have_their_price_whichever_is_taken() -> None:
    h = History(1000, absolute=False)
    for version, seconds in ((1, 0.5), (2, 0.25), (3, 2.0)):
        h.add(Kept(kept(version, 30).message, kept(version, 30).data, seconds))
    online = h.since(2, lambda: SNAPSHOT)
    assert (online.steps_nbytes, online.steps_seconds, online.snapshot_nbytes) == (300, 2.0, 1000)
    behind = h.since(0, lambda: SNAPSHOT)
    assert (behind.steps_nbytes, behind.steps_seconds) == (900, 2.75)
    assert len(behind.kept) == 3
    lost = h.since(-1, lambda: SNAPSHOT)
    assert (lost.steps_nbytes, lost.steps_seconds, lost.is_snapshot) == (None, None, True)


def test_a_snapshot_is_made_only_where_it_is_sent() -> None:
    def never() -> Kept:
        raise AssertionError

    assert len(history(10, 10).since(0, never).kept) == 2
