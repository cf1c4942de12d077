"""The adaptive deadline: numbers by hand, laws, and what the round machine makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.deadline import ENOUGH, WINDOW, Deadline, remember, times
from coordinator.events import EvaluatorReady, Event, Scored, Tick
from coordinator.state import Gathering, State, Training
from tests.test_rounds import OPEN, POLICY, A, B, all_in, play, update

ADAPTIVE = Deadline(600.0, least=10.0, mads=3.0)
seconds = st.floats(0.001, 1e5)
seen = st.lists(seconds, min_size=ENOUGH, max_size=40)


def test_it_is_the_median_and_k_times_the_mad_for_each_task_of_a_node() -> None:
    taken = [10.0, 12.0, 14.0, 20.0, 90.0]  # median 14, distances 4 2 0 6 76: MAD 4
    assert ADAPTIVE.seconds(taken, 1) == 14 + 3 * 4
    assert ADAPTIVE.seconds(taken, 5) == 5 * 26
    assert ADAPTIVE.seconds(taken, 1, num_failures=2) == 4 * 26
    assert ADAPTIVE.seconds(taken, 50) == 600
    assert ADAPTIVE.seconds([0.1] * 4, 1) == 10


def test_a_fixed_one_and_one_that_knows_nothing_yet_are_the_most() -> None:
    assert Deadline(600.0, 10.0).seconds([1.0] * 9, 1) == 600
    assert ADAPTIVE.seconds([1.0] * (ENOUGH - 1), 1) == 600


@given(seen, st.integers(1, 100), st.integers(0, 100), st.randoms())
def test_it_is_within_its_bounds_and_the_order_of_the_times_is_nothing(
    taken: list[float], num_tasks: int, failures: int, random: object
) -> None:
    found = ADAPTIVE.seconds(taken, num_tasks, failures)
    assert 10 <= found <= 600
    assert ADAPTIVE.seconds(sorted(taken), num_tasks, failures) == found
    assert ADAPTIVE.seconds(taken, num_tasks + 1, failures) >= found
    assert ADAPTIVE.seconds(taken, num_tasks, failures + 1) >= found


@given(seen, st.floats(1e5, 1e9))
def test_one_straggler_moves_it_no_further_than_the_times_of_the_others(
    taken: list[float], straggler: float
) -> None:
    """Median and MAD of five and more stay among the others' times and their distances."""
    free = Deadline(1e12, 0.0, 3.0)
    assert free.seconds([*taken, straggler], 1) <= max(taken) + 3 * (max(taken) + 0.0)


@given(st.lists(seconds, max_size=40), st.lists(seconds, max_size=600))
def test_the_newest_times_are_remembered(old: list[float], new: list[float]) -> None:
    assert remember(tuple(old), new) == tuple([*old, *new][-WINDOW:])


def test_a_node_trains_its_clients_one_after_another() -> None:
    arrived = {0: 14.0, 1: 11.0, 7: 99.0}
    assert times((0, 1, 2), arrived, 10.0, None) == [1.0, 3.0]
    assert times((0, 1, 2), arrived, 10.0, 30.0) == [1.0, 3.0, 16.0]  # the third was cut off
    assert times((0, 1), arrived, 10.0, 30.0) == [1.0, 3.0]
    assert times((3, 4), arrived, 10.0, 30.0) == [20.0]  # the first of them ran all the time


@given(st.lists(seconds, max_size=8), seconds)
def test_the_times_of_a_node_add_up_to_the_round(gaps: list[float], rest: float) -> None:
    at, arrived = 5.0, dict[int, float]()
    for client, gap in enumerate(gaps):
        at += gap
        arrived[client] = at
    found = times(range(len(gaps) + 1), arrived, 5.0, at + rest)
    assert sum(found) == pytest.approx(at + rest - 5.0)
    assert all(t >= 0 for t in found)


# --- in the round machine --------------------------------------------------------

POLICY_3 = replace(POLICY, rounds=9, deadline_mads=2.0, least_seconds=1.0)


def open_for(state: State) -> float:
    assert isinstance(state.phase, Training)
    return state.phase.closes_at - state.phase.opened_at


def test_rounds_close_by_what_earlier_ones_took() -> None:
    """Clients 0 and 1 on node a, 2 on b; all_in answers 6, 7 and 8 s after 4, then 16, ..."""
    first, second = all_in(1, 10.0), all_in(2, 20.0)
    state, _ = play(*OPEN, *first, policy=POLICY_3)
    assert state.seen == (6.0, 1.0, 8.0)  # a: 10 - 4 and 11 - 10; b: 12 - 4
    assert open_for(state) == 100.0  # three times are too few
    state, _ = play(*OPEN, *first, *second, policy=POLICY_3)
    assert state.seen == (6.0, 1.0, 8.0, 6.0, 1.0, 8.0)  # opened at 14
    assert open_for(state) == 2 * (6.0 + 2 * 2.0)  # median 6, MAD 2, and a has two to do


def test_what_the_deadline_cut_off_counts_with_the_time_it_had() -> None:
    before: tuple[Event, ...] = (*OPEN, *all_in(1, 10.0), *all_in(2, 20.0))  # open 24 to 44
    cut = (update(25, 2, 3), update(26, 0, 3), Tick(44.0))
    state, _ = play(*before, *cut, policy=POLICY_3)
    assert state.seen[-3:] == (2.0, 18.0, 1.0)


def test_a_failed_attempt_doubles_the_deadline_of_the_next() -> None:
    before: tuple[Event, ...] = (*OPEN, *all_in(1, 10.0), *all_in(2, 20.0))
    state, _ = play(*before, Tick(44.0), policy=POLICY_3)
    assert state.failures == 1
    assert open_for(state) == 40.0
    state, _ = play(*before, Tick(44.0), Tick(84.0), Tick(164.0), policy=POLICY_3)
    assert open_for(state) == 100.0  # the fixed one is the most


def test_a_fixed_deadline_stays_what_it_is() -> None:
    policy = replace(POLICY, rounds=9)
    state, _ = play(*OPEN, *all_in(1, 10.0), *all_in(2, 20.0), policy=policy)
    assert open_for(state) == 100.0


def test_nothing_is_known_before_the_first_commit() -> None:
    state, _ = play(A, B, EvaluatorReady(3.0), Scored(4.0, 0), policy=POLICY_3)
    assert state.seen == ()
    assert not isinstance(state.phase, Gathering)
