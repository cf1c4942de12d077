"""Budgets: the round that uses one up is the last, and the run is complete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest

from coordinator import eventlog, log, rounds
from coordinator.budget import Spent, unseen, used_up
from coordinator.events import Assign, Committed, Evaluate, EvaluatorReady, Event, Finish, Scored
from coordinator.state import Finished, State
from coordinator.status import sentence, status
from protocol.experiment import Budget
from protocol.messages import Task
from protocol.parts import Cost
from tests.faults.cluster import Plan
from tests.faults.cluster import run as play_out
from tests.test_rounds import OPEN, POLICY, news, play, update
from tests.test_server import Make, Peer, Said, make, two_nodes

__all__ = ["make"]  # the fixture

BYTES = dataclasses.replace(POLICY, rounds=9, evaluate_every=9, budget=Budget(bytes=1000))


@pytest.mark.parametrize(
    ("budget", "spent", "said"),
    [
        (Budget(), Spent(1 << 40, 1e9, 1e12), None),
        (Budget(bytes=1000), Spent(999, 1e9, 1e12), None),
        (Budget(bytes=1000), Spent(1000), "budget: 1000 of 1000 bytes"),
        (Budget(bytes=1_200_000), Spent(1_203_456), "budget: 1203456 of 1200000 bytes"),
        (Budget(seconds=60.0), Spent(1 << 40, 59.9), None),
        (Budget(seconds=60.0), Spent(0, 60.25), "budget: 60.25 of 60 s"),
        (Budget(joules=50.0), Spent(1 << 40, 1e9, 49.0), None),
        (Budget(joules=50.0), Spent(0, 0.0, 50.0), "budget: 50 of 50 J"),
        (Budget(bytes=9, seconds=1.0), Spent(9, 2.0), "budget: 9 of 9 bytes"),
    ],
)
def test_a_budget_is_used_up_when_it_is_reached(
    budget: Budget, spent: Spent, said: str | None
) -> None:
    assert used_up(budget, spent) == said


def test_energy_that_nobody_meters_cannot_be_budgeted() -> None:
    assert unseen(Budget(bytes=1, seconds=1.0), Spent()) is None
    assert unseen(Budget(joules=1.0), Spent(joules=0.0)) is None
    why = unseen(Budget(joules=1.0), Spent())
    assert why is not None
    assert why.startswith("budget.joules: no node")


# --- the machine -----------------------------------------------------------------


def a_round(number: int, nbytes: int) -> tuple[Event, ...]:
    at = 10.0 * number
    answers = (update(at + c, c, number) for c in range(3))
    return (*answers, Committed(at + 5, number, Spent(nbytes)))


def test_the_round_that_uses_the_budget_up_is_evaluated_and_the_last() -> None:
    done = (*OPEN, *a_round(1, 999), *a_round(2, 1001))
    state, said = play(*done, policy=BYTES)
    assert [c.round for c in said if isinstance(c, Assign)] == [1, 2]
    assert said[-1] == Evaluate(2, True)
    state, said = play(*done, Scored(40.0, 2), policy=BYTES)
    assert said[-1] == Finish()
    assert state.phase == Finished()
    assert state.ended == "budget: 1001 of 1000 bytes"


def test_an_evaluator_that_comes_back_is_told_that_it_is_the_last_evaluation() -> None:
    again = EvaluatorReady(30.0)
    assert news(again, after=(*OPEN, *a_round(1, 1000)), policy=BYTES) == [Evaluate(1, True)]


def test_a_budget_that_the_last_round_uses_up_ends_nothing_early() -> None:
    policy = dataclasses.replace(BYTES, rounds=1)
    state, _ = play(*OPEN, *a_round(1, 1000), Scored(40.0, 1), policy=policy)
    assert (state.phase, state.ended) == (Finished(), None)


def test_a_run_whose_energy_nobody_meters_fails_after_its_first_round() -> None:
    policy = dataclasses.replace(BYTES, budget=Budget(joules=5.0))
    (finish,) = news(*a_round(1, 0)[3:], after=(*OPEN, *a_round(1, 0)[:3]), policy=policy)
    assert isinstance(finish, Finish)
    assert finish.reason is not None
    assert "no node" in finish.reason


def test_what_was_spent_is_in_the_journal_so_that_a_resumed_run_decides_alike() -> None:
    event = Committed(3.5, 2, Spent(7, 1.25, 0.5))
    line = {"event": "Committed", **msgspec.to_builtins(event)}
    assert eventlog.decode(json.dumps(line)) == event


# --- the shell -------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3000, 5000, 6000])
def test_a_run_ends_at_its_byte_budget_and_says_so(make: Make, limit: int) -> None:
    run = make(rounds={"count": 9, "evaluate_every": 9}, budget={"bytes": limit})
    _, _, evaluator = two_nodes(run)
    summary = run.finish()
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    committed = [m["bytes"] for m in map(json.loads, lines) if "train_loss" in m]
    *before, last = [b["message_up"] + b["message_down"] for b in committed]
    assert all(used < limit for used in before)
    assert last >= limit
    assert 1 <= summary["rounds"] < 9
    assert summary["status"] == "completed"
    assert summary["ended"] == f"budget: {last} of {limit} bytes"
    assert evaluator.version == summary["rounds"]  # which is scored
    assert [r for r, _ in run.recorder.account.scores] == [0, summary["rounds"]]
    assert json.loads((run.directory / "summary.json").read_text()) == summary
    state = State()
    for event in run.journal():  # as a resumed coordinator does
        state, _ = rounds.step(state, event, run.policy)
    assert state == run.server.state


def test_a_run_ends_at_its_time_budget(make: Make) -> None:
    run = make(rounds={"count": 6}, budget={"seconds": 0.15})
    two_nodes(run)  # each answers after 0.1 s
    summary = run.finish()
    assert summary["rounds"] == 2
    assert 0.15 <= summary["seconds"]["total"] < 0.25


def metered(peer: Peer, joules: float) -> None:
    """Has a node say what each task took."""

    def answer(task: Task) -> list[Said]:
        message, data = peer.update(task)
        return [
            (msgspec.structs.replace(message, costs=(Cost("train", 0.5, joules=joules),)), data)
        ]

    peer.answer = answer


def test_a_run_ends_at_its_energy_budget_over_those_who_meter_it(make: Make) -> None:
    run = make(rounds={"count": 6}, budget={"joules": 20.0})
    a, _, _ = two_nodes(run)
    metered(a, 3.0)  # two clients: 6 J a round
    summary = run.finish()
    assert summary["rounds"] == 4
    assert summary["ended"] == "budget: 24 of 20 J"


def test_a_run_within_its_budget_has_all_its_rounds_and_no_such_key(make: Make) -> None:
    run = make(budget={"bytes": 1 << 40})
    two_nodes(run)
    summary = run.finish()
    assert summary["rounds"] == 2
    assert "ended" not in summary


@pytest.mark.net
@pytest.mark.slow
def test_real_processes_end_in_order_at_the_budget(tmp_path: Path) -> None:
    plan = Plan(rounds=50, more="[budget]\nbytes = 8000\n")
    ended = play_out(plan, tmp_path / "it")
    summary = ended.summary
    assert summary["status"] == "completed"
    assert summary["ended"].endswith(" of 8000 bytes")
    assert 1 <= summary["rounds"] < 50
    scored = [m["round"] for m in ended.lines("metrics.jsonl") if "metric" in m]
    assert scored[-1] == summary["rounds"]
    *_, (_, last) = log.tell(ended.directory)
    assert last == f"the run is complete: {summary['ended']}"
    closing = status(ended.directory) | {"state": "running"}  # just before the summary is there
    assert sentence(closing | {"reason": None}) == last
