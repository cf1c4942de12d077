"""The thread around the worker: a queue of jobs in, a queue of outcomes out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from protocol.experiment import Experiment
from protocol.messages import LOADING, Message, Ready, Reduce, Task
from protocol.parts import Limits, Progress
from protocol.wire import Frame


@dataclass(frozen=True)
class Ranks:
    """The group that a node is.

    Attributes:
        size: how many processes, this one included.
        rank: of this one.
        patience_seconds: how long one may keep the others waiting, at most a mini-batch.
        is_launched: torchrun started them all; else this process starts the others.
        fsdp: the model's frozen weights are dealt among them.
    """

    size: int
    patience_seconds: float = 120.0
    rank: int = 0
    is_launched: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Setup:
    """What this node was started with.

    Attributes:
        clients: the shards it hosts.
        evaluates: it scores the test set instead of training.
        export: where the evaluator saves the final model.
        device: "cpu", "cuda", "cuda:1".
        threads: for torch; 0 leaves torch's default.
        state: where what is held is kept for a restart.
        run: the id of the run, once it is known.
        limits: what a round may take here, in each process.
        energy: a command that prints the joules counted so far; "" looks for a meter.
        ranks: the group of processes that the node is; None: it is this one alone.
    """

    clients: tuple[int, ...]
    evaluates: bool = False
    export: Path | None = None
    device: str = "cpu"
    threads: int = 0
    state: Path | None = None
    run: str = ""
    energy: str = ""
    limits: Limits | None = None
    ranks: Ranks | None = None


@dataclass(frozen=True)
class Outcome:
    """A message to send, with its payload's buffer."""

    message: Message
    data: memoryview | None = None


class Does(Protocol):
    """What an engine has do its jobs: a ``Worker``, or a whole group's ``Lead``."""

    def ready(self) -> Outcome:
        """Say what was loaded."""

    def statement(self) -> Ready:
        """Which version is held."""

    def run(
        self, message: Message, buffer: Frame | None, tell: Callable[[int, int], None]
    ) -> Outcome | None:
        """Do one job."""

    def close(self) -> None:
        """Nothing follows."""


Make = Callable[[Experiment, Setup], Does]


def _worker(experiment: Experiment, setup: Setup) -> Does:
    if setup.ranks is not None:
        from node.lead import Lead

        return Lead(experiment, setup, setup.ranks)
    from node.worker import Worker  # which imports this module

    return Worker(experiment, setup)


class Engine:
    """Runs jobs in order, in a thread of its own.

    Args:
        experiment: what to load.
        setup: how this node was started.
        wake: called from the thread whenever there is something to ``take``.
        make: builds the worker; tests put a scripted one here.

    Attributes:
        busy: what it is doing, for people.
        progress: how far the task is that runs now, if one does.
        ready: what a new login says: the whole first message while it may not have
            arrived, later which version is held; None while loading.
    """

    def __init__(
        self,
        experiment: Experiment,
        setup: Setup,
        wake: Callable[[], None],
        make: Make = _worker,
    ) -> None:
        self.busy = LOADING
        self.progress: Progress | None = None
        self.ready: Outcome | None = None
        self._jobs: queue.SimpleQueue[tuple[Message, Frame | None] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
        self._tasks: set[tuple[int, int, int]] = set()
        late = experiment.rounds.late == "fold"
        self._max_staleness = experiment.rounds.max_staleness if late else 0
        self._newest = (0, 0)  # round and attempt; older tasks are not worth starting
        arguments = (experiment, setup, wake, make)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def submit(self, message: Message, data: Frame | None) -> None:
        """Queue a job; a task that is queued or running already is not taken twice."""
        if isinstance(message, Task):
            place = (message.round, message.attempt, message.client)
            if place in self._tasks:
                return
            self._tasks.add(place)
            self._newest = max(self._newest, place[:2])
        if isinstance(message, Reduce):  # what of its round has not begun comes too late
            self._newest = max(self._newest, (message.round, message.attempt + 1))
        self._jobs.put((message, data))

    def take(self) -> list[Outcome]:
        """The outcomes since the last call.

        Raises:
            SeedwireError: loading failed, for a reason the user can mend.
            Exception: a bug in the worker.
        """
        outcomes = []
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    def stop(self, within_seconds: float) -> bool:
        """End after the current job; False when that takes longer."""
        self._jobs.put(None)
        self._thread.join(within_seconds)
        return not self._thread.is_alive()

    def _run(
        self,
        experiment: Experiment,
        setup: Setup,
        wake: Callable[[], None],
        make: Make,
    ) -> None:
        try:
            worker = make(experiment, setup)
            first = worker.ready()
            self._put(first, first, wake)
            while (job := self._jobs.get()) is not None:
                message, data = job
                if self._is_over(message):
                    continue
                self.busy = _describe(message)
                outcome = worker.run(message, data, partial(self._tell, message))
                self.progress = None
                if isinstance(message, Task):
                    self._tasks.discard((message.round, message.attempt, message.client))
                self._put(Outcome(worker.statement()), outcome, wake)
            worker.close()
        except Exception as error:
            self._outcomes.put(error)
            wake()

    def _tell(self, message: Message, done: int, total: int) -> None:
        """Only noted, for the next beat: telling must not wait for a network."""
        if isinstance(message, Task):
            where = {"round": message.round, "client": message.client}
            self.progress = Progress(**where, done=done, total=total)

    def _is_over(self, message: Message) -> bool:
        """Whether a task's round or attempt has been followed by another since."""
        if not isinstance(message, Task) or (message.round, message.attempt) >= self._newest:
            return False
        if self._max_staleness and message.round >= self._newest[0] - self._max_staleness:
            return False  # late, and counts all the same
        self._tasks.discard((message.round, message.attempt, message.client))
        return True

    def _put(self, ready: Outcome, outcome: Outcome | None, wake: Callable[[], None]) -> None:
        self.ready, self.busy = ready, ""
        if outcome is not None:
            self._outcomes.put(outcome)
            wake()


def _describe(message: Message) -> str:
    if isinstance(message, Task):
        return f"round {message.round}, client {message.client}"
    return type(message).__name__.lower()
