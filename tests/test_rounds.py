"""The round machine: scripts of events, then any order of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.cohort import draw, waited_for, wake_at
from coordinator.events import (
    Abandon,
    Assign,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Discard,
    Evaluate,
    EvaluatorLost,
    EvaluatorReady,
    Event,
    Finish,
    NodeLost,
    NodeReady,
    Resumed,
    Scored,
    TaskFailed,
    Tick,
    UpdateArrived,
)
from coordinator.rounds import step
from coordinator.state import (
    Committing,
    Evaluating,
    Finished,
    Gathering,
    Policy,
    State,
    Training,
    held,
)

POLICY = Policy(
    clients=3,
    start_clients=3,
    cohort=3,
    target=3,
    quorum=2,
    rounds=2,
    evaluate_every=1,
    deadline_seconds=100.0,
    return_seconds=10.0,
    seed=0,
)
COHORT = (2, 1, 0)  # of round 1
A, B = NodeReady(1.0, "a", (0, 1)), NodeReady(2.0, "b", (2,))
OPEN: tuple[Event, ...] = (A, B, EvaluatorReady(3.0), Scored(4.0, 0))  # round 1, until 104


def play(*events: Event, policy: Policy = POLICY) -> tuple[State, list[Command]]:
    state, said = State(), list[Command]()
    for event in events:
        state, commands = step(state, event, policy)
        said += commands
    return state, said


def news(*events: Event, after: tuple[Event, ...] = OPEN, policy: Policy = POLICY) -> list[Command]:
    """What is said from the end of ``after`` on."""
    return play(*after, *events, policy=policy)[1][len(play(*after, policy=policy)[1]) :]


def update(
    now: float, client: int, round: int = 1, attempt: int = 0, fault: str | None = None
) -> UpdateArrived:
    return UpdateArrived(now, client, round, attempt, f"{round}/{attempt}/{client}@{now:g}", fault)


def discard(event: UpdateArrived, reason: str) -> Discard:
    return Discard(event.ref, event.client, event.round, event.attempt, reason)


def all_in(round: int, at: float) -> tuple[Event, ...]:
    """Every update of a round, its commit, and its evaluation."""
    updates = (update(at + c, c, round) for c in range(3))
    return (*updates, Committed(at + 3, round), Scored(at + 4, round))


def refs(*events: UpdateArrived) -> tuple[tuple[int, str], ...]:
    return tuple((event.client, event.ref) for event in events)


# --- starting and ending ---------------------------------------------------------


def test_start_waits_for_all_clients_and_the_evaluator() -> None:
    assert play(A, EvaluatorReady(2.0), Tick(1e6)) == (
        State(
            members={"a": (0, 1)},
            evaluator=True,
            phase=Gathering(0.0),
        ),
        [],
    )
    assert play(A, B, Tick(1e6))[1] == []
    assert play(A, EvaluatorReady(2.0), B)[1] == [Evaluate(0, False)]
    assert play(A, B, EvaluatorReady(2.0))[1] == [Evaluate(0, False)]


def test_start_with_fewer_clients_when_the_experiment_says_so() -> None:
    policy = replace(POLICY, start_clients=2)
    assert play(A, EvaluatorReady(2.0), policy=policy)[1] == [Evaluate(0, False)]


def test_no_round_opens_before_the_first_evaluation_is_in() -> None:
    assert news(Tick(50.0), Scored(51.0, 3), after=OPEN[:3]) == []
    assert news(Scored(51.0, 0), after=OPEN[:3]) == [Assign(1, 0, COHORT, COHORT)]


def test_a_round_is_open_for_the_deadline_and_asks_the_cohort_in_the_order_drawn() -> None:
    state, said = play(*OPEN)
    assert said == [Evaluate(0, False), Assign(1, 0, COHORT, COHORT)]
    assert state.phase == Training(COHORT, opened_at=4.0, closes_at=104.0)


def test_two_rounds_finish_with_an_evaluation_after_the_last() -> None:
    state, said = play(*OPEN, *all_in(1, 10.0), *all_in(2, 20.0))
    assert [type(c).__name__ for c in said] == [
        *("Evaluate", "Assign", "Commit", "Evaluate"),
        *("Assign", "Commit", "Evaluate", "Finish"),
    ]
    assert said[-2:] == [Evaluate(2, True), Finish()]
    assert state.phase == Finished()


@pytest.mark.parametrize(
    ("every", "rounds", "expected"),
    [(1, 3, [0, 1, 2, 3]), (2, 5, [0, 2, 4, 5]), (3, 6, [0, 3, 6]), (100, 2, [0, 2])],
)
def test_evaluation_before_round_1_every_k_rounds_and_after_the_last(
    every: int, rounds: int, expected: list[int]
) -> None:
    policy = replace(POLICY, evaluate_every=every, rounds=rounds)
    events = [*OPEN]
    for number in range(1, rounds + 1):
        events += all_in(number, 10.0 * number)
    state, said = play(*events, policy=policy)
    asked = [c for c in said if isinstance(c, Evaluate)]
    assert [c.round for c in asked] == expected
    assert [c.last for c in asked] == [False] * (len(expected) - 1) + [True]
    assert state.phase == Finished()


# --- how a round closes ----------------------------------------------------------


def test_all_updates_close_the_round_at_once_in_client_order() -> None:
    two, zero, one = update(5, 2), update(6, 0), update(7, 1)
    state, _ = play(*OPEN, two, zero, one)
    commit = Commit(1, 0, COHORT, refs(zero, one, two), ())
    assert news(two, zero) == []
    assert news(two, zero, one) == [commit]
    assert state.phase == Committing(commit)


def test_target_below_the_cohort_closes_early() -> None:
    policy = replace(POLICY, target=2)
    two, zero = update(5, 2), update(6, 0)
    assert news(two, policy=policy) == []
    missing = ((1, "no answer"),)
    assert news(two, zero, policy=policy) == [Commit(1, 0, COHORT, refs(zero, two), missing)]


def test_deadline_with_quorum_commits_what_arrived_and_names_the_missing_with_reasons() -> None:
    first, second = update(5, 1), update(6, 2)
    assert news(first, second, Tick(103.9)) == []
    missing = ((0, "no answer"),)
    assert news(first, second, Tick(104.0)) == [Commit(1, 0, COHORT, refs(first, second), missing)]


def test_every_kind_of_absence_has_its_own_reason() -> None:
    policy = replace(POLICY, clients=5, cohort=5, target=5, quorum=1, return_seconds=1000.0)
    cohort = draw(policy, 1, 0)
    one = update(5, 2)
    script = (
        *OPEN[:2],
        NodeReady(2.5, "c", (3,)),
        *OPEN[2:],
        one,
        TaskFailed(6, 0, 1, 0, "out of memory"),
        NodeLost(7, "c", "silent for 5 s"),
        Tick(104.0),
    )
    commit = play(*script, policy=policy)[1][-1]
    assert isinstance(commit, Commit)
    assert [c for c, _ in commit.missing] == [c for c in cohort if c != 2]
    assert dict(commit.missing) == {
        0: "out of memory",
        1: "no answer",
        3: "node c lost: silent for 5 s",
        4: "no node hosts it",
    }


def test_deadline_below_quorum_abandons_says_why_and_asks_again_with_the_next_attempt() -> None:
    one = update(5, 1)
    state, _ = play(*OPEN, one, Tick(104.0))
    again = draw(POLICY, 1, 1)
    assert news(one, Tick(104.0)) == [
        Abandon(1, 0, refs(one), "1 of quorum 2 at the deadline; client 2: no answer"),
        Assign(1, 1, again, again),
    ]
    assert (state.round, state.attempt, state.failures) == (0, 1, 1)
    assert state.phase == Training(again, opened_at=104.0, closes_at=204.0)


def test_an_update_exactly_at_the_deadline_is_late_even_before_a_tick() -> None:
    first, second, late = update(5, 1), update(6, 2), update(104.0, 0)
    assert news(first, second, late) == [
        discard(late, "after the deadline"),
        Commit(1, 0, COHORT, refs(first, second), ((0, "no answer"),)),
    ]


def test_an_update_just_before_the_deadline_counts() -> None:
    answers = (update(103.999, 0), update(103.999, 1), update(103.999, 2))
    assert news(*answers) == [Commit(1, 0, COHORT, refs(*answers), ())]


# --- what does not count ---------------------------------------------------------


def test_duplicate_update_is_discarded_and_the_first_kept() -> None:
    first, second = update(5, 1), update(6, 1)
    assert news(first, second) == [discard(second, "duplicate")]
    phase = play(*OPEN, first, second)[0].phase
    assert isinstance(phase, Training)
    assert phase.refs == {1: first.ref}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (update(5, 1, round=0), "stale: round 0, now 1"),
        (update(5, 1, round=2), "stale: round 2, now 1"),
        (update(5, 1, attempt=1), "stale: attempt 1, now 0"),
        (update(5, 9), "not in the cohort"),
        (update(5, 1, fault="not finite"), "not finite"),
    ],
)
def test_what_does_not_fit_the_open_round_is_discarded_with_a_reason(
    bad: UpdateArrived, reason: str
) -> None:
    assert news(bad) == [discard(bad, reason)]
    state, _ = play(*OPEN, bad)
    assert isinstance(state.phase, Training)
    assert state.phase.refs == {}


def test_a_fault_in_what_does_not_count_anyway_is_not_held_against_the_client() -> None:
    stale = update(5, 1, attempt=7, fault="not finite")
    state, _ = play(*OPEN, stale)
    assert news(stale) == [discard(stale, "stale: attempt 7, now 0")]
    assert isinstance(state.phase, Training)
    assert state.phase.failed == {}


def test_a_faulty_update_is_not_waited_for() -> None:
    first, second, faulty = update(5, 1), update(6, 2), update(7, 0, fault="not finite")
    assert news(first, second, faulty) == [
        discard(faulty, "not finite"),
        Commit(1, 0, COHORT, refs(first, second), ((0, "not finite"),)),
    ]


def test_a_failed_client_is_not_waited_for() -> None:
    first, second = update(5, 1), update(6, 2)
    commit = Commit(1, 0, COHORT, refs(first, second), ((0, "out of memory"),))
    assert news(first, second, TaskFailed(7, 0, 1, 0, "out of memory")) == [commit]
    assert news(first, TaskFailed(7, 0, 1, 0, "out of memory"), second) == [commit]


@pytest.mark.parametrize(
    "failed",
    [
        TaskFailed(7, 0, 0, 0, "old round"),
        TaskFailed(7, 0, 1, 1, "another attempt"),
        TaskFailed(7, 9, 1, 0, "not in the cohort"),
        TaskFailed(7, 1, 1, 0, "has answered"),
    ],
)
def test_a_failure_of_something_else_changes_nothing(failed: TaskFailed) -> None:
    before = (*OPEN, update(5, 1), update(6, 2))
    assert play(*before, failed) == play(*before)


def test_below_quorum_with_nobody_left_to_wait_for_does_not_wait_for_the_deadline() -> None:
    failures = [TaskFailed(7, c, 1, 0, "out of memory") for c in (0, 2)]
    abandon = news(*failures, update(8, 1, fault="not finite"))[1]
    reason = "0 of quorum 2 and nobody left to wait for; client 2: out of memory"
    assert abandon == Abandon(1, 0, (), reason)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ((A,), "no round is open"),
        (OPEN[:3], "no round is open"),
        ((*OPEN, update(5, 0), update(6, 1), update(7, 2)), "the round is closed"),
        ((*OPEN, *all_in(1, 10.0)[:-1]), "no round is open"),
        ((*OPEN, *all_in(1, 10.0), *all_in(2, 20.0)), "the run is over"),
    ],
)
def test_updates_in_every_other_phase_are_discarded(before: tuple[Event, ...], reason: str) -> None:
    late = update(30, 1, round=1)
    assert news(late, after=before) == [discard(late, reason)]


def test_an_update_and_the_opening_of_a_round_in_one_event_discards_first() -> None:
    """Gathering ends with the first event after the wait, whichever it is."""
    policy = replace(POLICY, clients=9, start_clients=2, cohort=2, target=2, quorum=2)
    gathering = (A, B, EvaluatorReady(3.0), Scored(4.0, 0))
    state, said = play(*gathering, policy=policy)
    assert said == [Evaluate(0, False)]
    assert isinstance(state.phase, Gathering)
    early = update(20, 1)
    first, second = news(early, after=gathering, policy=policy)
    assert first == discard(early, "no round is open")
    assert isinstance(second, Assign)


# --- nodes that come and go ------------------------------------------------------


def test_a_lost_node_is_waited_for_return_seconds_and_then_not() -> None:
    answers = (update(5, 0), update(6, 1))
    script = (*answers, NodeLost(7, "b", "silent"))
    assert news(*script, Tick(16.9)) == []
    commit = Commit(1, 0, COHORT, refs(*answers), ((2, "node b lost: silent"),))
    assert news(*script, Tick(17.0)) == [commit]
    assert wake_at(play(*OPEN, *script)[0], POLICY, 7.0) == 17.0


def test_the_machine_is_woken_for_what_is_still_to_come_and_never_for_what_is_past() -> None:
    """A lost node's time may pass while others still train: no reason to spin."""
    lost = (*OPEN, NodeLost(7, "b", "silent"))
    assert wake_at(play(*OPEN)[0], POLICY, 4.0) == 104.0
    assert wake_at(play(*lost)[0], POLICY, 7.0) == 17.0
    state, said = play(*lost, Tick(17.0))
    assert said == play(*lost)[1]
    assert wake_at(state, POLICY, 17.0) == 104.0
    assert wake_at(play(*lost, NodeLost(9, "a", "silent"))[0], POLICY, 17.0) == 19.0


def test_nobody_is_woken_for_a_client_that_has_answered() -> None:
    state, _ = play(*OPEN, update(5, 2), NodeLost(7, "b", "silent"))
    assert wake_at(state, POLICY, 7.0) == 104.0


def test_only_an_open_round_needs_waking() -> None:
    assert wake_at(State(), POLICY, 0.0) is None
    closed = Commit(1, 0, COHORT, (), ())
    for phase in (Gathering(), Committing(closed), Evaluating(), Finished()):
        assert wake_at(replace(play(*OPEN)[0], phase=phase), POLICY, 0.0) is None


def test_a_node_that_comes_back_gets_its_unreported_tasks_again() -> None:
    lost = (update(5, 0), NodeLost(7, "a", "silent"))
    assert news(*lost, NodeReady(9, "a", (0, 1))) == [Assign(1, 0, COHORT, (1,))]
    failed = TaskFailed(6, 1, 1, 0, "out of memory")
    assert news(failed, NodeLost(7, "a", "silent"), NodeReady(9, "a", (0, 1))) == [
        Assign(1, 0, COHORT, (0,))
    ]
    assert news(update(5, 2), NodeLost(7, "b", "silent"), NodeReady(9, "b", (2,))) == []


def test_a_node_that_comes_back_late_is_still_asked_but_not_after_the_deadline() -> None:
    lost = (update(5, 0), NodeLost(7, "b", "silent"), Tick(30.0))
    assert news(*lost, NodeReady(50, "b", (2,))) == [Assign(1, 0, COHORT, (2,))]
    state, _ = play(*OPEN, *lost, NodeReady(50, "b", (2,)))
    assert state.lost == {}
    closing = news(update(5, 0), update(6, 1), NodeReady(104.0, "b", (2,)))
    assert [type(c) for c in closing] == [Commit]


def test_a_superseding_login_loses_the_node_and_asks_it_again_once_it_is_ready() -> None:
    superseded = (NodeLost(7, "b", "superseded by a new login"), NodeReady(8, "b", (2,)))
    assert news(*superseded) == [Assign(1, 0, COHORT, (2,))]
    state, _ = play(*OPEN, *superseded)
    assert state.members == {"a": (0, 1), "b": (2,)}
    assert state.lost == {}


def test_losing_a_node_that_was_never_ready_changes_nothing() -> None:
    assert play(*OPEN, NodeLost(7, "x", "superseded")) == play(*OPEN)


def test_a_node_that_comes_back_with_other_clients_hosts_those() -> None:
    state, _ = play(*OPEN, NodeLost(7, "a", "restarted"), NodeReady(8, "a", (1,)))
    assert state.hosted == {1, 2}
    assert list(state.lost) == [0]


def test_clients_that_are_offline_at_the_start_of_a_round_are_not_waited_for() -> None:
    """Lost long before: the round closes with those that are there."""
    first = (*OPEN, *all_in(1, 10.0)[:-1])
    gone = (*first, NodeLost(14, "b", "silent"))
    opened = (*gone, Scored(40, 1))
    assert play(*opened)[1][-1] == Assign(2, 0, draw(POLICY, 2, 0), (1, 0))
    state, _ = play(*opened)
    assert isinstance(state.phase, Training)
    assert waited_for(state, state.phase, POLICY, 40) == [1, 0]
    assert wake_at(state, POLICY, 40.0) == 140.0
    commit = news(update(41, 0, 2), update(42, 1, 2), after=opened)
    assert [type(c) for c in commit] == [Commit]


def test_a_client_lost_just_before_the_round_is_waited_for_as_long_as_any_other() -> None:
    opened = (*OPEN, *all_in(1, 10.0)[:-1], NodeLost(13.5, "b", "silent"), Scored(14, 1))
    answers = (update(15, 0, 2), update(16, 1, 2))
    assert news(*answers, after=opened) == []
    assert [type(c) for c in news(*answers, Tick(23.5), after=opened)] == [Commit]
    assert wake_at(play(*opened)[0], POLICY, 14.0) == 23.5


def test_too_few_hosted_clients_are_waited_for_however_long() -> None:
    away = (*OPEN, NodeLost(5, "a", "silent"), update(6, 2), Tick(15.0), Tick(1e6))
    state, said = play(*away)
    assert isinstance(state.phase, Gathering)
    assert isinstance(said[-1], Abandon)
    assert state.failures == 1
    back = news(NodeReady(1e6 + 1, "a", (0, 1)), after=away)
    assert back == [Assign(1, 1, draw(POLICY, 1, 1), draw(POLICY, 1, 1))]


def test_an_unreachable_cohort_is_waited_for_and_then_another_is_drawn() -> None:
    policy = replace(POLICY, clients=9, start_clients=2, cohort=2, target=2, quorum=2)
    cohorts = [draw(policy, 1, attempt) for attempt in range(200)]
    number = next(i for i, cohort in enumerate(cohorts) if set(cohort) <= {0, 1, 2})
    assert number > 0
    assert not set(cohorts[0]) <= {0, 1, 2}
    after = (A, B, EvaluatorReady(3.0), Scored(4.0, 0))  # gathering since 4.0
    assert news(Tick(13.9), after=after, policy=policy) == []
    chosen = cohorts[number]
    assert news(Tick(14.0), after=after, policy=policy) == [Assign(1, number, chosen, chosen)]
    state, _ = play(*after, Tick(14.0), policy=policy)
    assert (state.attempt, state.failures) == (number, 0)  # drawing again is no failure


def test_a_cohort_that_becomes_reachable_in_time_is_asked_at_once() -> None:
    policy = replace(POLICY, clients=9, start_clients=2, cohort=2, target=2, quorum=2)
    cohort = draw(policy, 1, 0)
    after = (A, B, EvaluatorReady(3.0), Scored(4.0, 0))
    rest = NodeReady(9.0, "c", tuple(c for c in cohort if c not in (0, 1, 2)))
    assert news(rest, after=after, policy=policy) == [Assign(1, 0, cohort, cohort)]


def test_a_cohort_no_draw_can_reach_is_waited_for_again_without_a_hot_loop() -> None:
    policy = replace(POLICY, clients=500, start_clients=1, quorum=3)
    after = (NodeReady(1, "a", (0, 1, 2)), EvaluatorReady(3.0), Scored(4.0, 0))
    state, said = play(*after, Tick(14.0), policy=policy)
    assert said == [Evaluate(0, False)]
    assert state.phase == Gathering(14.0)
    assert play(*after, Tick(14.0), Tick(23.9), policy=policy)[0].phase == Gathering(14.0)


def test_the_run_gives_up_after_max_attempts_with_a_reason() -> None:
    policy = replace(POLICY, max_attempts=3)
    ticks = [Tick(104.0), Tick(204.0), Tick(304.0)]
    state, _ = play(*OPEN, *ticks, policy=policy)
    *_, abandon, finish = news(*ticks, policy=policy)
    first = draw(policy, 1, 2)[0]
    last = f"0 of quorum 2 at the deadline; client {first}: no answer"
    assert abandon == Abandon(1, 2, (), last)
    assert finish == Finish(f"round 1 failed 3 times, last: {last}")
    assert state.phase == Finished(finish.reason)
    assert [type(c) for c in news(*ticks[:2], policy=policy)] == [Abandon, Assign] * 2


def test_failures_are_counted_per_round() -> None:
    policy = replace(POLICY, max_attempts=2)
    again = [update(105 + c, c, 1, 1) for c in range(3)]
    one: tuple[Event, ...] = (Tick(104.0), *again, Committed(108, 1))
    state, said = play(*OPEN, *one, Scored(109, 1), Tick(209), policy=policy)
    assert isinstance(state.phase, Training)
    assert isinstance(said[-1], Assign)
    assert (said[-1].round, said[-1].attempt) == (2, 1)


def test_a_commit_that_failed_is_an_abandoned_attempt() -> None:
    closed = (*OPEN, update(5, 0), update(6, 1), update(7, 2))
    again = draw(POLICY, 1, 1)
    assert news(CommitFailed(8, 1, "not finite"), after=closed) == [
        Abandon(1, 0, (), "not finite"),
        Assign(1, 1, again, again),
    ]
    state, _ = play(*closed, CommitFailed(8, 1, "not finite"))
    assert (state.round, state.attempt, state.failures) == (0, 1, 1)
    assert play(*closed, CommitFailed(8, 2, "not finite")) == play(*closed)
    policy = replace(POLICY, max_attempts=1)
    finish = news(CommitFailed(8, 1, "not finite"), after=closed, policy=policy)[-1]
    assert finish == Finish("round 1 failed 1 times, last: not finite")


def test_committed_for_another_round_changes_nothing() -> None:
    closed = (*OPEN, update(5, 0), update(6, 1), update(7, 2))
    assert play(*closed, Committed(8, 5)) == play(*closed)


def test_scored_for_another_round_changes_nothing() -> None:
    evaluating = (*OPEN, *all_in(1, 10.0)[:-1])
    assert play(*evaluating, Scored(20, 0)) == play(*evaluating)


# --- the coordinator itself ------------------------------------------------------


def test_after_a_restart_nodes_are_waited_for_and_asked_what_they_had_not_answered() -> None:
    back = (update(5, 0), Resumed(6.0))
    assert news(*back, Tick(15.9)) == []
    assert news(*back, NodeReady(15.9, "a", (0, 1))) == [Assign(1, 0, COHORT, (1,))]
    (commit,) = news(*back, NodeReady(15.9, "a", (0, 1)), update(15.95, 1), Tick(16.0))[1:]
    assert isinstance(commit, Commit)
    assert commit.missing == ((2, "node b lost: the coordinator restarted"),)


def test_a_node_that_was_lost_before_a_restart_is_not_waited_for_any_longer() -> None:
    back = (update(5, 0), update(5, 1), NodeLost(6, "b", "silent"), Resumed(7.0))
    assert news(*back, Tick(15.9)) == []
    (commit,) = news(*back, Tick(16.0))
    assert isinstance(commit, Commit)
    assert commit.missing == ((2, "node b lost: silent"),)


def test_a_round_that_was_being_committed_at_a_restart_is_committed_again() -> None:
    closed = (*OPEN, update(5, 0), update(6, 1), update(7, 2))
    (commit,) = news(update(5, 0), update(6, 1), update(7, 2))
    assert news(Resumed(8.0), after=closed) == [commit]
    assert news(Committed(9.0, 1), after=(*closed, Resumed(8.0))) == []  # nobody to evaluate it


def test_an_evaluation_under_way_at_a_restart_is_asked_again() -> None:
    assert news(Resumed(4.0), EvaluatorReady(9.0), after=OPEN[:3]) == [Evaluate(0, False)]


def test_between_rounds_the_drawn_clients_may_come_back_after_a_restart() -> None:
    """Else the first nodes to be back would open a round with another cohort."""
    policy = replace(POLICY, clients=4, cohort=2, target=2, start_clients=4, quorum=2)
    cohort = draw(policy, 1, 0)
    here, away = (tuple(sorted(set(range(4)) - set(cohort))), cohort)
    ready = (NodeReady(1, "a", here), NodeReady(2, "b", away), EvaluatorReady(3))
    gathered = (*ready, NodeLost(3.5, "b", "silent"), Scored(4, 0))
    back = (Resumed(13.0), NodeReady(14.0, "a", here))
    assert news(*back, after=gathered, policy=policy) == []
    (assign,) = news(*back, NodeReady(22.9, "b", away), after=gathered, policy=policy)
    assert assign == Assign(1, 0, cohort, cohort)


def test_a_restart_after_the_end_changes_nothing() -> None:
    done = (*OPEN, *all_in(1, 10.0), *all_in(2, 20.0))
    state, _ = play(*done, Resumed(30.0))
    assert state.phase == Finished()
    assert news(Resumed(30.0), after=done) == []


# --- the evaluator ---------------------------------------------------------------


def test_an_evaluator_that_is_lost_and_back_is_asked_again() -> None:
    asked = OPEN[:3]
    lost = EvaluatorLost(5.0)
    assert news(lost, after=asked) == []
    assert news(lost, EvaluatorReady(9.0), after=asked) == [Evaluate(0, False)]
    last = (*OPEN, *all_in(1, 10.0), *all_in(2, 20.0)[:-1])
    assert news(EvaluatorLost(30.0), EvaluatorReady(31.0), after=last) == [Evaluate(2, True)]


def test_an_evaluation_that_is_due_waits_for_the_evaluator() -> None:
    lost = (*OPEN, update(5, 0), EvaluatorLost(5.5), update(6, 1), update(7, 2), Committed(8, 1))
    state, said = play(*lost)
    assert state.phase == Gathering(8)
    assert isinstance(said[-1], Commit)
    assert news(EvaluatorReady(20.0), after=lost) == [Evaluate(1, False)]


def test_a_round_goes_on_without_the_evaluator() -> None:
    policy = replace(POLICY, evaluate_every=2)
    lost = (*OPEN, EvaluatorLost(5.0))
    *_, assign = news(*all_in(1, 10.0)[:-1], after=lost, policy=policy)
    assert isinstance(assign, Assign)
    assert assign.round == 2


def test_evaluator_coming_back_in_an_open_round_is_asked_nothing() -> None:
    assert news(EvaluatorLost(5.0), EvaluatorReady(6.0)) == []


# --- the cohort ------------------------------------------------------------------


def test_cohort_is_a_function_of_seed_round_and_attempt_alone() -> None:
    policy = replace(POLICY, clients=100, cohort=5)
    cohort = draw(policy, 7, 2)
    assert cohort == (99, 11, 61, 58, 82)  # pinned: a restarted run asks the same clients
    assert len(set(cohort)) == 5
    other = replace(policy, quorum=1, deadline_seconds=1.0, start_clients=1, target=4)
    assert draw(other, 7, 2) == cohort
    assert draw(policy, 8, 2) != cohort
    assert draw(policy, 7, 3) != cohort
    assert draw(replace(policy, seed=1), 7, 2) != cohort


def test_every_client_is_drawn_as_often_as_any_other() -> None:
    policy = replace(POLICY, clients=10, cohort=3)
    counts = [0] * 10
    for round in range(1000):
        for client in draw(policy, round, 0):
            counts[client] += 1
    assert min(counts) > 240
    assert max(counts) < 360


# --- any order -------------------------------------------------------------------

HOSTS = {"a": (0, 1), "b": (2,), "c": (3, 4), "d": (5,)}
SCALE = Policy(
    clients=6,
    start_clients=3,
    cohort=4,
    target=3,
    quorum=2,
    rounds=3,
    evaluate_every=2,
    deadline_seconds=20.0,
    return_seconds=5.0,
    seed=1,
    max_attempts=50,
)


class Rounds(RuleBasedStateMachine):
    """Any order of joins, losses, updates, faults, duplicates, failures and clock jumps."""

    policy = SCALE

    def __init__(self) -> None:
        super().__init__()
        self.state, self.now, self.log = State(), 0.0, list[Event]()
        self.said: list[Command] = []
        self.refs = 0

    nodes = st.sampled_from(sorted(HOSTS))
    clients = st.integers(0, 6)
    offsets = st.sampled_from([0, 0, 0, 0, -1, 1])

    def feed(self, event: Event) -> None:
        self.log.append(event)
        self.state, commands = step(self.state, event, self.policy)
        self.said += commands

    @rule(node=nodes)
    def join(self, node: str) -> None:
        self.feed(NodeReady(self.now, node, HOSTS[node]))

    @rule(node=nodes)
    def lose(self, node: str) -> None:
        self.feed(NodeLost(self.now, node, "silent"))

    def _update(self, client: int, round: int, attempt: int, fault: str | None) -> None:
        self.refs += 1
        self.feed(UpdateArrived(self.now, client, round, attempt, f"ref{self.refs}", fault))

    @rule(client=clients, back=offsets, older=offsets, fault=st.sampled_from([None, None, "NaN"]))
    def update(self, client: int, back: int, older: int, fault: str | None) -> None:
        self._update(client, self.state.round + 1 + back, self.state.attempt + older, fault)

    @precondition(lambda self: bool(getattr(self.state.phase, "cohort", None)))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        assert isinstance(self.state.phase, Training)
        client = data.draw(st.sampled_from(self.state.phase.cohort))
        self._update(client, self.state.round + 1, self.state.attempt, None)

    @rule(client=clients, back=offsets)
    def fail(self, client: int, back: int) -> None:
        number = self.state.round + 1 + back
        self.feed(TaskFailed(self.now, client, number, self.state.attempt, "out of memory"))

    @rule(dt=st.one_of(st.floats(0, 3), st.floats(0, 30)))
    def jump(self, dt: float) -> None:
        self.now += dt
        self.feed(Tick(self.now))

    @precondition(lambda self: isinstance(self.state.phase, Committing))
    @rule()
    def commit(self) -> None:
        self.feed(Committed(self.now, self.state.round + 1))

    @precondition(lambda self: isinstance(self.state.phase, Committing))
    @rule()
    def commit_fails(self) -> None:
        self.feed(CommitFailed(self.now, self.state.round + 1, "not finite"))

    @rule(back=offsets)
    def score(self, back: int) -> None:
        self.feed(Scored(self.now, self.state.round + back))

    @rule(is_there=st.booleans())
    def evaluator(self, is_there: bool) -> None:
        self.feed(EvaluatorReady(self.now) if is_there else EvaluatorLost(self.now))

    @rule()
    def restart(self) -> None:
        """The coordinator ends and is back; a commit that was asked for is asked for again."""
        asked = self.said.copy()
        self.feed(Resumed(self.now))
        if isinstance(phase := self.state.phase, Committing):
            assert self.said == [*asked, phase.commit]

    def commits(self) -> list[Commit]:
        """Each once, however often it was asked for."""
        return list(dict.fromkeys(c for c in self.said if isinstance(c, Commit)))

    @invariant()
    def every_ref_has_exactly_one_fate_or_is_held(self) -> None:
        fates = [ref for c in self.commits() for _, ref in c.refs]
        fates += [ref for c in self.said if isinstance(c, Abandon) for _, ref in c.refs]
        fates += [c.ref for c in self.said if isinstance(c, Discard)]
        refs = held(self.state)
        if isinstance(self.state.phase, Committing):
            refs -= {ref for _, ref in self.state.phase.commit.refs}  # which is counted
        fates += refs
        assert sorted(fates) == sorted(f"ref{i + 1}" for i in range(self.refs))

    @invariant()
    def every_no_has_a_reason(self) -> None:
        assert all(c.reason for c in self.said if isinstance(c, Discard | Abandon))
        missing = [why for c in self.said if isinstance(c, Commit) for _, why in c.missing]
        assert all(missing)

    @invariant()
    def rounds_are_committed_in_order_once_and_never_below_quorum(self) -> None:
        commits = self.commits()
        failed = Counter(e.round for e in self.log if isinstance(e, CommitFailed))
        expected = [n for n in range(1, 4) for _ in range(1 + failed[n])]
        assert [c.round for c in commits] == expected[: len(commits)]
        for c in commits:
            clients = [client for client, _ in c.refs]
            assert clients == sorted(clients)
            assert len(clients) >= self.policy.quorum
            asked = [client for client in clients if client in c.cohort]
            assert asked == clients or self.policy.max_staleness
            assert sorted(asked + [client for client, _ in c.missing]) == sorted(c.cohort)

    @invariant()
    def no_update_counts_when_it_was_faulty(self) -> None:
        faulty = {e.ref for e in self.log if isinstance(e, UpdateArrived) and e.fault}
        used = {r for c in self.said if isinstance(c, Commit | Abandon) for _, r in c.refs}
        assert not faulty & (used | held(self.state))

    @invariant()
    def an_open_round_is_woken_in_the_future_and_waking_it_does_something_or_moves_on(self) -> None:
        at = wake_at(self.state, self.policy, self.now)
        assert (at is not None) == isinstance(self.state.phase, Training)
        assert at is None or at > self.now  # else the shell would spin

    @invariant()
    def an_open_round_waits_for_somebody(self) -> None:
        phase = self.state.phase
        if isinstance(phase, Training):
            assert waited_for(self.state, phase, self.policy, self.now)
            assert len(phase.refs) < self.policy.target

    @invariant()
    def the_evaluations_are_those_that_are_due(self) -> None:
        asked = [c.round for c in self.said if isinstance(c, Evaluate)]
        assert set(asked) <= {0, 2, 3}
        opened = [c.round for c in self.said if isinstance(c, Assign)]
        assert not opened or 0 in asked
        assert not any(number > 2 for number in opened) or 2 in asked

    def teardown(self) -> None:
        """The log rebuilds the state; and if everyone joins and answers, the run finishes."""
        assert play(*self.log, policy=self.policy) == (self.state, self.said)
        for node, clients in HOSTS.items():
            self.feed(NodeReady(self.now, node, clients))
        self.feed(EvaluatorReady(self.now))
        for _ in range(100):
            match self.state.phase:
                case Training(cohort=cohort):
                    number, attempt = self.state.round + 1, self.state.attempt
                    for client in cohort:
                        self._update(client, number, attempt, None)
                    for client, place in self.state.out.items():
                        self._update(client, *place, None)
                case Committing():
                    self.feed(Committed(self.now, self.state.round + 1))
                case Evaluating():
                    self.feed(Scored(self.now, self.state.round))
                case Gathering():
                    raise AssertionError("waiting, though everyone is there")
                case Finished(reason=reason):
                    assert reason is None
                    assert self.said.count(Finish()) == 1
                    break
        assert isinstance(self.state.phase, Finished)
        self.every_ref_has_exactly_one_fate_or_is_held()
        self.rounds_are_committed_in_order_once_and_never_below_quorum()


TestRounds = Rounds.TestCase


# --- late updates that count -----------------------------------------------------

FOLDING = replace(POLICY, clients=6, start_clients=6, cohort=3, target=2, rounds=9, max_staleness=2)
C = NodeReady(2.5, "c", (3, 4, 5))
OPEN_6: tuple[Event, ...] = (A, B, C, EvaluatorReady(3.0), Scored(4.0, 0))


def folded(*events: Event) -> tuple[State, list[Command]]:
    return play(*OPEN_6, *events, policy=FOLDING)


def drawn(state: State) -> tuple[int, ...]:
    assert isinstance(state.phase, Training)
    return state.phase.cohort


def closed(round: int, at: float, *clients: int) -> tuple[Event, ...]:
    updates = (update(at, c, round) for c in clients)
    return (*updates, Committed(at + 1, round), Scored(at + 2, round))


def test_who_is_late_is_not_drawn_again_and_counts_where_it_arrives() -> None:
    first = drawn(folded()[0])
    one, two, slow = first
    state, _ = folded(*closed(1, 10, one, two))
    assert state.out == {slow: (1, 0)}
    second = drawn(state)
    assert len(second) == 2  # as many as places are free
    assert slow not in second
    late, fresh = update(20, slow, 1), update(21, second[0], 2)
    _, said = folded(*closed(1, 10, one, two), late, fresh)
    commit = said[-1]
    assert isinstance(commit, Commit)
    assert dict(commit.refs) == {slow: late.ref, second[0]: fresh.ref}
    assert commit.stale == ((slow, 1),)
    assert dict(commit.missing) == {second[1]: "still training"}


def test_what_arrives_between_rounds_counts_in_the_next() -> None:
    one, two, slow = drawn(folded()[0])
    late = update(11, slow, 1)
    state, said = folded(update(10, one), update(10, two), late, Committed(12, 1), Scored(13, 1))
    assert not [c for c in said if isinstance(c, Discard)]
    assert isinstance(state.phase, Training)
    assert (state.phase.refs, state.phase.stale) == ({slow: late.ref}, {slow: 1})
    assert slow not in drawn(state)
    assert len(drawn(state)) == 3


def test_a_late_update_counts_once() -> None:
    one, two, slow = drawn(folded()[0])
    late, again = update(20, slow, 1), replace(update(20, slow, 1), ref="again")
    _, said = folded(*closed(1, 10, one, two), late, again)
    assert said[-1] == discard(again, "stale: round 1, now 2")


def test_what_is_too_stale_is_given_up_and_its_client_drawn_again() -> None:
    one, two, slow = drawn(folded()[0])
    events = closed(1, 10, one, two)
    for number in (2, 3, 4):
        state, _ = folded(*events)
        assert (state.out.get(slow) == (1, 0)) == (number - 1 <= 2)
        events += closed(number, 10.0 * number, *drawn(state)[:2])
    late = update(99, slow, 1)
    said = folded(*events, late)[1]
    assert discard(late, "stale: round 1, now 5") in said


def test_an_attempt_that_failed_keeps_what_has_come_and_who_is_on_the_way() -> None:
    one, two, three = drawn(folded()[0])
    first = update(10, one)
    state, said = folded(first, Tick(104.0))
    abandon = next(c for c in said if isinstance(c, Abandon))
    assert abandon.refs == ()
    assert isinstance(state.phase, Training)
    assert state.phase.refs == {one: first.ref}
    assert state.out == {two: (1, 0), three: (1, 0)}
    commit = folded(first, Tick(104.0), update(105, two))[1][-1]
    assert isinstance(commit, Commit)
    assert dict(commit.refs).keys() == {one, two}
    assert commit.stale == ()


def test_a_node_that_is_back_gets_its_late_tasks_again_in_any_phase() -> None:
    one, two, slow = drawn(folded()[0])
    node, hosts = next((n, cs) for n, cs in HOSTS_6.items() if slow in cs)
    late = Assign(1, 0, (), (slow,))
    closing = (update(10, one), update(10, two))
    for phase in (closing, closed(1, 10, one, two)[:-1], closed(1, 10, one, two)):
        back = (NodeLost(30, node, "killed"), NodeReady(31, node, hosts))
        assert late in folded(*phase, *back)[1]


HOSTS_6 = {"a": (0, 1), "b": (2,), "c": (3, 4, 5)}


def test_a_resumed_coordinator_gives_late_tasks_up_and_keeps_what_has_come() -> None:
    one, two, slow = drawn(folded()[0])
    state, _ = folded(*closed(1, 10, one, two), Resumed(50))
    assert state.out == {}
    state, _ = folded(update(10, one), update(10, two), update(11, slow), Resumed(50))
    assert list(state.early) == [slow]


FOLDING_SCALE = replace(
    SCALE, cohort=4, target=2, quorum=1, max_staleness=1, deadline_mads=3.0, least_seconds=2.0
)


class Folding(Rounds):
    """The same in any order, where late updates count."""

    policy = FOLDING_SCALE

    @precondition(lambda self: self.state.out)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.state.out)))
        self._update(client, *self.state.out[client], None)

    @invariant()
    def an_update_is_no_staler_than_allowed_and_a_client_counts_once(self) -> None:
        for c in self.said:
            if isinstance(c, Commit):
                assert len(dict(c.refs)) == len(c.refs)
                assert all(0 < s <= FOLDING_SCALE.max_staleness for _, s in c.stale)
                assert {client for client, _ in c.stale} <= dict(c.refs).keys()

    @invariant()
    def nobody_is_asked_twice_at_once(self) -> None:
        phase = self.state.phase
        busy = {*self.state.out, *self.state.early}
        assert len(busy) == len(self.state.out) + len(self.state.early)
        assert not isinstance(phase, Training) or not busy.intersection(phase.cohort)


TestFolding = Folding.TestCase
