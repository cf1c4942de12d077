"""The thread around the worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from node.engine import Engine, Outcome, Setup
from protocol import experiment as experiments
from protocol.errors import ModelError
from protocol.experiment import Experiment
from protocol.messages import Beat, Evaluate, Message, Ready, Step, Task
from protocol.parts import Cost, Progress
from protocol.wire import Frame
from tests.fakes import Blocker, ScriptedWorker, refusing

DIGEST = bytes(16)
EXPERIMENT = experiments.convert(
    {
        "run": {"name": "test"},
        "model": {"id": "random:x"},
        "data": {"id": "x.csv"},
        "rounds": {"count": 1},
        "method": {"name": "fedavg"},
    },
    "test",
)
READY = Ready(version=0, digest=DIGEST, space=DIGEST)
FIRST = Outcome(
    Ready(version=0, digest=DIGEST, space=DIGEST, costs=(Cost("load", 1.0),)), memoryview(b"x")
)
Answer = Callable[[Message, Frame | None], Outcome | None]


def task(client: int = 0, round: int = 1, attempt: int = 0) -> Task:
    return Task(round=round, attempt=attempt, client=client, version=0)


def step(version: int) -> Step:
    return Step(version=version, round=version, digest=DIGEST)


def echo(message: Message, data: Frame | None) -> Outcome:
    return Outcome(message, memoryview(data) if data is not None else None)


def after(block: Blocker) -> Answer:
    """An echo, once the block lets it go."""

    def answer(message: Message, data: Frame | None) -> Outcome:
        block()
        return echo(message, data)

    return answer


class Harness:
    """An engine, its worker, and a count of its wake-ups to wait for."""

    def __init__(
        self, answer: Answer = echo, make: Any = None, experiment: Experiment = EXPERIMENT
    ) -> None:
        self.worker = ScriptedWorker(answer, FIRST, READY)
        self.wakes = threading.Semaphore(0)
        made: Any = make or (lambda *_: self.worker)
        self.engine = Engine(experiment, Setup((0,)), self.wakes.release, made)

    def wait(self, times: int = 1) -> Harness:
        for _ in range(times):
            assert self.wakes.acquire(timeout=30), "the engine did not wake us"
        return self

    def taken(self) -> list[Message]:
        return [outcome.message for outcome in self.engine.take()]


@pytest.fixture
def engines() -> Iterator[list[Harness]]:
    made: list[Harness] = []
    yield made
    for harness in made:
        assert harness.engine.stop(30)


def test_jobs_run_and_outcomes_come_out_in_order(engines: list[Harness]) -> None:
    engines.append(h := Harness().wait())
    jobs = [step(1), task(1), task(0), step(2), Evaluate(version=2)]
    for job in jobs:
        h.engine.submit(job, b"data")
    h.wait(5)
    assert h.taken() == [FIRST.message, *jobs]
    assert h.worker.jobs == [(job, b"data") for job in jobs]
    assert h.taken() == []


def test_an_outcome_comes_with_its_buffer_and_nothing_is_none_and_wakes_nobody(
    engines: list[Harness],
) -> None:
    engines.append(h := Harness(lambda m, d: None if d is None else echo(m, d)).wait())
    h.engine.submit(step(1), None)
    h.engine.submit(step(2), b"data")
    h.wait()
    first, second = h.engine.take()
    assert not h.wakes.acquire(blocking=False)
    assert first == FIRST
    assert second == Outcome(step(2), memoryview(b"data"))


def held_up(engines: list[Harness], experiment: Experiment = EXPERIMENT) -> tuple[Harness, Blocker]:
    """An engine that is busy until told to go on, so that jobs queue behind it."""
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> Outcome:
        if isinstance(message, Evaluate):
            block()
        return echo(message, data)

    engines.append(h := Harness(answer, experiment=experiment).wait())
    h.engine.submit(Evaluate(version=0), None)
    assert block.entered.wait(30)
    return h, block


def test_where_late_updates_count_late_tasks_are_started_unless_they_are_too_stale(
    engines: list[Harness],
) -> None:
    rounds = msgspec.structs.replace(EXPERIMENT.rounds, late="fold", max_staleness=2)
    folding = msgspec.structs.replace(EXPERIMENT, rounds=rounds)
    h, block = held_up(engines, folding)
    for late in (task(0, round=1), task(1, round=2), task(2, round=4)):
        h.engine.submit(late, None)
    block.go_on.set()
    h.wait(3)
    assert h.taken()[2:] == [task(1, round=2), task(2, round=4)]


def test_tasks_of_a_round_that_was_followed_by_another_are_not_started(
    engines: list[Harness],
) -> None:
    h, block = held_up(engines)
    for late in (task(0), task(1), step(1), task(0, attempt=1), task(0, round=2), task(1, round=2)):
        h.engine.submit(late, None)
    block.go_on.set()
    h.wait(4)
    assert h.taken()[2:] == [step(1), task(0, round=2), task(1, round=2)]


def test_a_task_queued_twice_runs_once_but_again_once_it_is_done(engines: list[Harness]) -> None:
    h, block = held_up(engines)
    for again in (task(0), task(0), task(1), task(0)):
        h.engine.submit(again, None)
    block.go_on.set()
    h.wait(3)
    assert h.taken()[2:] == [task(0), task(1)]
    h.engine.submit(task(0), None)
    h.wait()
    assert h.taken() == [task(0)]


def test_a_task_that_is_running_is_not_queued_again(engines: list[Harness]) -> None:
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> Outcome:
        if message == task(0):
            block()
        return echo(message, data)

    engines.append(h := Harness(answer).wait())
    h.engine.submit(task(0), None)
    assert block.entered.wait(30)
    h.engine.submit(task(0), None)
    h.engine.submit(task(1), None)
    block.go_on.set()
    h.wait(2)
    assert h.taken()[1:] == [task(0), task(1)]


def test_steps_and_evaluations_may_come_twice(engines: list[Harness]) -> None:
    engines.append(h := Harness().wait())
    for _ in range(2):
        h.engine.submit(step(1), None)
        h.engine.submit(Evaluate(version=1), None)
    h.wait(4)
    assert len(h.taken()) == 5


def test_what_a_new_login_says_is_the_whole_first_message_until_a_job_was_done(
    engines: list[Harness],
) -> None:
    """A job shows that it has arrived; before, it may have been lost with the connection."""
    engines.append(h := Harness().wait())
    assert h.engine.ready == FIRST
    h.engine.submit(step(1), None)
    h.wait()
    assert h.engine.ready == Outcome(READY)


def test_a_person_can_see_what_it_does(engines: list[Harness]) -> None:
    loading, blocks = Blocker(), Blocker()
    worker = ScriptedWorker(after(blocks), FIRST, READY)

    def make(*args: Any) -> ScriptedWorker:
        loading()
        return worker

    engines.append(h := Harness(make=make))
    assert loading.entered.wait(30)
    assert (h.engine.busy, h.engine.ready) == ("loading", None)
    loading.go_on.set()
    h.wait()
    assert h.engine.busy == ""
    h.engine.submit(task(3, round=7), None)
    assert blocks.entered.wait(30)
    assert h.engine.busy == "round 7, client 3"
    blocks.go_on.set()
    h.wait()
    assert h.engine.busy == ""


def test_progress_is_that_of_the_task_that_runs_and_of_nothing_else(
    engines: list[Harness],
) -> None:
    h, block = held_up(engines)

    def progress() -> Progress | None:
        return h.engine.progress

    h.worker.tell(1, 2)
    assert progress() is None  # of an evaluation
    h.engine.submit(task(3, round=7), None)
    block.go_on.set()
    h.wait(2)
    assert progress() is None
    block.entered.clear()
    block.go_on.clear()
    h.worker.answer = after(block)
    h.engine.submit(task(4, round=7), None)
    assert block.entered.wait(30)
    h.worker.tell(2, 9)
    assert progress() == Progress(round=7, client=4, done=2, total=9)
    block.go_on.set()
    h.wait()
    assert progress() is None


def test_an_error_in_loading_comes_out_of_take() -> None:
    h = Harness(make=refusing(ModelError("no such model"))).wait()
    with pytest.raises(ModelError, match="no such model"):
        h.engine.take()
    assert h.engine.stop(30)


def test_a_bug_in_a_job_comes_out_of_take() -> None:
    def answer(message: Message, data: Frame | None) -> Outcome:
        raise ZeroDivisionError

    h = Harness(answer).wait()
    h.engine.submit(task(), None)
    h.wait()
    with pytest.raises(ZeroDivisionError):
        h.engine.take()
    assert h.engine.stop(30)


def test_stop_ends_after_the_current_job_and_says_when_that_takes_longer() -> None:
    block = Blocker()

    def answer(message: Message, data: Frame | None) -> Outcome:
        block()
        return Outcome(Beat())

    h = Harness(answer).wait()
    h.engine.submit(task(), None)
    assert block.entered.wait(30)
    assert not h.engine.stop(0.0)
    block.go_on.set()
    assert h.engine.stop(30)
