"""Rank 0 of a node's group: does each job with its own worker, and the followers along.

For the engine it is a worker.  A rank that dies, hangs or fails costs the task that was
running; the others are then started anew and told what to hold, while the node goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from fedalgos import registry
from node import orders
from node.engine import Outcome, Ranks, Setup
from node.ranks import (
    POLL_SECONDS,
    SETTLE_SECONDS,
    GroupError,
    Joined,
    Launch,
    RankError,
    Sheet,
    Started,
    device_of,
)
from node.worker import Worker
from protocol.errors import ExperimentError, ModelError, RunError
from protocol.experiment import Experiment
from protocol.messages import Beat, Bye, Failed, Message, Ready, Step, Task, Update
from protocol.wire import Frame

log = logging.getLogger(__name__)

Tell = Callable[[int, int], None]


class Lead:
    """Implements ``node.engine.Does``.

    Args:
        experiment: what to load.
        setup: how this node was started.
        ranks: its group.

    Raises:
        SeedwireError: the model or the data is not there or does not fit, or the method is not
            for a node of several processes.
    """

    def __init__(self, experiment: Experiment, setup: Setup, ranks: Ranks) -> None:
        if registry.is_collective(registry.settings(experiment.method)):
            raise ExperimentError(
                "[method] nodes that average among themselves are one process each: "
                "start this one without --ranks"
            )
        if not (setup.threads or ranks.is_launched):  # torchrun sees to that itself
            setup = replace(setup, threads=max(1, (os.cpu_count() or 1) // ranks.size))
        self._ranks = ranks
        self._group: Any = None
        self._is_lost, self._is_dealt = False, False
        self._lock = threading.Lock()  # one job at a time; a beat is one
        self._is_closed = threading.Event()
        self._sheet = Sheet(
            experiment=msgspec.to_builtins(experiment),
            clients=setup.clients,
            device=setup.device,
            threads=setup.threads,
            run=setup.run,
            patience_seconds=ranks.patience_seconds,
            limits=setup.limits,
            fsdp=ranks.fsdp,
        )
        self._launch = self._start()  # they load while we do
        try:
            self._device = device_of(setup.device, self._launch.local_rank)
            self._worker = Worker(experiment, replace(setup, device=self._device))
        except BaseException as error:
            self._launch.close()
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded here
                why = "a smaller model.dtype may do, or --fsdp, which deals the model among ranks"
                raise ModelError(f"{experiment.model.id} does not fit one device: {why}") from error
            raise

    def ready(self) -> Outcome:
        """Wait for all ranks.

        Raises:
            RunError: one of them could not load.
        """
        try:
            outcome = self._form()
        except GroupError as error:
            self._launch.close()
            raise RunError(f"the node's group of {self._ranks.size} processes: {error}") from error
        threading.Thread(target=self._beat, daemon=True).start()
        return outcome

    def statement(self) -> Ready:
        return self._worker.statement()

    def run(
        self, message: Message, buffer: Frame | None, tell: Tell = lambda done, total: None
    ) -> Outcome | None:
        """Do one job.

        Raises:
            RunError: a rank that torchrun started is gone, and only torchrun can mend it.
        """
        if not isinstance(message, Step | Task):  # an evaluation needs one process; beats go on
            return self._worker.run(message, buffer, tell)
        with self._lock:
            return (
                self._task(message, tell)
                if isinstance(message, Task)
                else self._step(message, buffer)
            )

    def close(self) -> None:
        """Keep what is held, and end the others."""
        self._is_closed.set()
        with self._lock:
            if self._group is not None and not self._launch.can_restart:
                try:
                    orders.send(self._group, Bye(finished=True))
                except GroupError as error:
                    log.warning("%s", error)
            self._launch.close()
        self._worker.close()

    # --- jobs --------------------------------------------------------------------

    def _task(self, task: Task, tell: Tell) -> Outcome | None:
        formed: Outcome | None = None
        try:
            if self._group is None:
                formed = self._form()
            orders.send(self._group, task, memory=self._worker.memory(task))
        except GroupError as error:
            where = {"round": task.round, "attempt": task.attempt, "client": task.client}
            return Outcome(Failed(**where, reason=self._part(error)))
        return _with_costs_of(formed, self._ended(self._worker.run(task, None, tell)))

    def _step(self, step: Step, data: Frame | None) -> Outcome | None:
        """Apply it here and there; without a group the others get it when they form one."""
        is_whole = data is not None  # else rank 0 knows the result already, or asks for it anew
        if is_whole:
            self._try(lambda: orders.send(self._group, step, data))
        outcome = self._worker.run(step, data)
        self._try(lambda: self._ended(None) if is_whole else self._bring(None))
        return outcome

    def _try(self, do: Callable[[], object]) -> None:
        """With the group, if there is one; it may be gone after that."""
        try:
            if self._group is not None:
                do()
        except GroupError as error:
            self._part(error)

    def _bring(self, ready: Outcome | None) -> list[list[float]]:
        """Give the others the parameters as they are; their memory peaks."""
        rows: list[list[float]] = []
        for step, data in self._worker.snapshots():
            orders.send(self._group, step, data)
            rows = orders.end(self._group, self._worker, ready)
        return rows

    def _ended(self, outcome: Outcome | None) -> Outcome | None:
        """Leave a job with the others; what rank 0 made of it stands, if it made something."""
        rows: list[list[float]] = []
        if not self._group.is_broken:
            try:
                rows = orders.end(self._group, self._worker, outcome)
            except RankError as error:
                log.warning("after the last mini-batch: %s", error)
            except GroupError as error:
                log.warning("%s", error)
        if not self._group.is_broken:
            return outcome and orders.with_others(outcome, rows[1:])
        failed = outcome.message if outcome is not None else None
        if not isinstance(failed, Failed):
            self._part("at the end of a job")
            return outcome
        return Outcome(msgspec.structs.replace(failed, reason=self._part(failed.reason)))

    # --- the group ---------------------------------------------------------------

    def _start(self) -> Launch:
        if self._ranks.is_launched:
            return Joined(self._sheet)
        return Started(self._sheet, self._ranks.size)

    def _form(self) -> Outcome:
        """Wait until all have loaded, and give them the parameters; what all of them loaded.

        Raises:
            GroupError: one has ended, or trains other tensors.
            RunError: a rank is gone, and only torchrun can mend that.
        """
        from node.meeting import Meeting, share  # loads torch

        if self._is_lost:
            raise RunError("a rank of the node's group is gone: torchrun has to start it again")
        if self._is_dealt:
            self._worker.load()  # what it has is a part, and the others' are gone
        self._is_dealt = self._ranks.fsdp
        meeting = Meeting(self._launch.store(), 0, self._ranks.size)
        meeting.come(self._worker, self._device)
        while not meeting.is_complete():
            if ended := self._launch.ended():
                raise GroupError(f"{ended} while it was loading")
            time.sleep(POLL_SECONDS)
        meeting.open()
        patience, interface = self._ranks.patience_seconds, self._launch.interface
        self._group = meeting.group(patience, interface, deals=self._ranks.fsdp)
        ready = share(self._worker, self._group)
        return orders.with_others(ready, self._bring(ready)[1:])

    def _part(self, error: object) -> str:
        """Give a broken group up, start the ranks anew; why it broke.

        Raises:
            RunError: only torchrun could.
        """
        ended = self._launch.ended(SETTLE_SECONDS)
        why = f"{ended}: {error}" if ended else str(error)
        log.error("the group is broken: %s", why[:500])
        self._group = None
        self._launch.close()
        self._is_lost = not self._launch.can_restart
        if not self._is_lost:
            self._launch = self._start()
        return why[:500]

    def _beat(self) -> None:
        """Between jobs, see that all are there; they see that we are."""
        while not self._is_closed.wait(self._ranks.patience_seconds / 4):
            if not self._lock.acquire(blocking=False):
                continue  # a job is running
            try:
                if not self._is_closed.is_set():
                    self._try(self._one_beat)
            finally:
                self._lock.release()

    def _one_beat(self) -> None:
        orders.send(self._group, Beat())
        self._ended(None)


def _with_costs_of(formed: Outcome | None, outcome: Outcome | None) -> Outcome | None:
    """An update with what it cost to form the group anew, and steps applied before that."""
    ready, update = formed and formed.message, outcome and outcome.message
    if outcome is None or not (isinstance(ready, Ready) and isinstance(update, Update)):
        return outcome
    costs = ready.costs + update.costs
    return replace(outcome, message=msgspec.structs.replace(update, costs=costs))
