"""The thread that computes: one job after another, on one model that stays loaded.

Jobs come in as the coordinator's messages and outcomes go out as messages, so that the
thread which talks to the network is never stuck behind a forward pass.  What computes on
a model is the trainee's; here is which parameters are held, and what each job makes of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from fedalgos import registry
from fedalgos.method import Assignment, Contribution, Memory, Oracle, Work
from fedalgos.space import ParamSpace, digest
from node import batches, energy, trainee
from node.collective import Averaging, CollectiveError
from node.engine import Outcome, Setup
from node.measure import LimitError, Phases
from node.ranks import GroupError, RankError
from node.state import History, Parameters, Store, newest_before, with_newest
from node.trainee import Trainee
from protocol import kernels, payload
from protocol.experiment import Experiment
from protocol.messages import (
    Evaluate,
    Failed,
    Message,
    Ready,
    Reduce,
    Reduced,
    Score,
    Step,
    Sync,
    Task,
    Update,
)
from protocol.parts import Limits, Meeting
from protocol.payload import Flat
from protocol.wire import Frame, RemoteProtocolError

log = logging.getLogger(__name__)

MAX_LOSS = 1e30  # what a message can carry; stands for a model that has diverged

Tell = Callable[[int, int], None]  # how many of how many mini-batches are done


class Worker:
    """Model, data, and the parameters at some version.  Used by one thread only.

    Args:
        experiment: what to load.
        setup: how this node was started.
        load: gets model and data; tests put a small one here.

    Raises:
        SeedwireError: the model or the data is not there or does not fit.
    """

    def __init__(
        self,
        experiment: Experiment,
        setup: Setup,
        load: Callable[[Experiment, Setup], Trainee] = trainee.load,
    ) -> None:
        if setup.threads:
            kernels.use_threads(setup.threads)
        if not kernels.has_compiled():
            log.info("noise is drawn by the reference; `pip install numba` is ten times faster")
        self._experiment, self._setup, self._load = experiment, setup, load
        self._phases = Phases(setup.device, energy.find(setup.energy, device=setup.device))
        self.settings = registry.settings(experiment.method)
        with self._phases("bare"):  # the process before there is a model in it
            pass
        self.load()
        self.space = ParamSpace.of(self.trainee.infos)
        self.method = registry.build(self.settings, self.space, experiment.run.seed)
        self.micro_batch = experiment.compute.micro_batch
        self._memories: dict[int, History] = dict.fromkeys(setup.clients, ())
        self.x: Flat = self.trainee.initial()
        self._initial = self.x if self.method.onto == "initial" else None
        self.version, self._digest, self._is_syncing = 0, digest(self.x), False
        self._averaging: Averaging | None = None
        if self.method.collective is not None and not setup.evaluates:
            log.warning("what this node exchanges with others is not encrypted")
            self._averaging = Averaging(self.method.collective)
        self._store: Store | None = None
        if setup.state is not None and not setup.evaluates:
            self._store = Store(setup.state, setup.run, self.space.digest)
            self._take_up(self._store)

    def load(self) -> None:
        """Load model and data, the long part; again where what was loaded is of no more use."""
        with self._phases("load"):
            self.trainee = self._load(self._experiment, self._setup)
        self.oracle: Oracle = self.trainee.oracle  # a group puts one of its own here

    def _take_up(self, store: Store) -> None:
        """Go on from what an earlier process of this node kept."""
        self._memories = {client: store.memory(client) for client in self._memories}
        held = store.parameters()
        if held is None or (held.initial is None) != (self._initial is None):
            return
        self.x, self.version, self._digest = held.x, held.version, held.digest
        self._initial = held.initial

    def close(self) -> None:
        """Keep what is held; nothing follows."""
        if self._averaging is not None:
            self._averaging.close()
        self._keep(last=True)

    def _keep(self, *, last: bool = False) -> None:
        if self._store is not None:
            held = Parameters(self.version, self._digest, self.x, self._initial)
            self._store.keep(held, last=last)

    def snapshots(self) -> Iterator[tuple[Step, memoryview]]:
        """What brings another worker of the same tensors to the parameters held here."""
        if self._initial is not None and self.version:
            yield _snapshot(0, self._initial, digest(self._initial))
        yield _snapshot(self.version, self.x, self._digest)

    def memory(self, order: Task) -> Flat | None:
        """What a task's client brings along from its local runs before."""
        past = self._memories.get(order.client, ())
        return newest_before(past, (order.round, order.attempt))

    def remind(self, order: Task, value: Flat | None) -> None:
        """Have a task's client bring that along, and nothing else."""
        self._memories[order.client] = () if value is None else (((-1, 0), value),)

    def ready(self) -> Outcome:
        """Say what was loaded; an evaluator brings the parameters along."""
        with self._phases("inference"):  # the yardstick for "over inference"
            self.trainee.probe(self.settings.batch_size)
        ready = msgspec.structs.replace(self.statement(), costs=self._phases.take())
        if not self._setup.evaluates:
            return Outcome(ready)
        whole = payload.Dense(self.x)
        spec = payload.spec_of(whole)
        ready = msgspec.structs.replace(ready, tensors=self.space.tensors, payload=spec)
        return Outcome(ready, payload.encode(whole))

    def statement(self) -> Ready:
        """Which version is held; what a login after a lost connection repeats."""
        averaging = self._averaging
        return Ready(
            version=self.version,
            digest=self._digest,
            space=self.space.digest,
            meeting=Meeting(address="", port=averaging.port) if averaging else None,
        )

    def run(
        self, message: Message, buffer: Frame | None, tell: Tell = lambda done, total: None
    ) -> Outcome | None:
        """Do one job; returns what to tell the coordinator, if anything.

        ``tell`` is called before each mini-batch, and must be quick.
        """
        match message:
            case Step():
                return self._apply(message, buffer)
            case Task():
                return self._local(message, tell)
            case Reduce() if self._averaging is not None:
                return self._reduce(message, self._averaging)
            case Evaluate():
                return self._score(message)
            case _:
                raise TypeError(f"not a job: {message}")

    def _apply(self, step: Step, buffer: Frame | None) -> Outcome | None:
        replaces = step.snapshot or self.method.absolute
        if replaces:
            self._is_syncing = False  # the answer to the last sync: if it fails, ask again
        elif step.version <= self.version:
            return None  # sent twice
        if not replaces and step.version != self.version + 1:
            return self._sync(f"version {step.version} does not follow {self.version}")
        if step.payload is None and self._averaging is not None:
            made = self._averaging.result(step.digest)
            if made is not None:
                self._hold(made, step)
                return None
        if step.payload is None or buffer is None:
            return self._sync(f"step {step.version} came without its payload")
        with self._phases("catch-up"):
            try:
                value = payload.decode(step.payload, buffer)
                if step.snapshot:
                    x = value.values.copy()
                else:
                    base = self.x if self._initial is None else self._initial
                    x = self.method.apply(base, step.round, value)
            except (RemoteProtocolError, AssertionError, ValueError, IndexError) as error:
                return self._sync(f"step {step.version} does not apply: {error}"[:1000])
            if digest(x) != step.digest:
                return self._sync(f"the digest of version {step.version} differs")
        self._hold(x, step)
        return None

    def _hold(self, x: Flat, step: Step) -> None:
        """Go on with the parameters that a step has made."""
        self.x, self.version, self._digest, self._is_syncing = x, step.version, step.digest, False
        if self._initial is not None and step.version == 0:
            self._initial = x  # ours was another: the coordinator's is what steps go onto
        self._keep()

    def _sync(self, reason: str) -> Outcome | None:
        """Ask for a snapshot, once until something has been applied again."""
        if self._is_syncing:
            return None
        self._is_syncing = True
        return Outcome(Sync(version=self.version, reason=reason))

    def _local(self, order: Task, tell: Tell) -> Outcome | None:
        if order.version != self.version:  # after a resync the task comes again
            return self._sync(f"a task for version {order.version}")
        try:
            return self._update(order, tell)
        except Exception as error:  # out of memory, a model without a forward rule, ...
            is_foreseen = isinstance(error, LimitError | GroupError | RankError)
            place = (order.client, order.round)
            log.error("client %d, round %d: %s", *place, error, exc_info=not is_foreseen)
            self._phases.take()  # no part of the next update's costs
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            return Outcome(
                Failed(round=order.round, attempt=order.attempt, client=order.client, reason=reason)
            )

    def _update(self, order: Task, tell: Tell) -> Outcome:
        seen: list[int] = []
        limits = self._setup.limits or Limits()
        size = (
            self.trainee.num_examples(order.client),
            self.settings.batch_size,
            self.settings.steps,
        )

        def drawn() -> Iterator[Any]:
            seed, total = self._experiment.run.seed, batches.count(*size)
            for rows in batches.indices(*size, seed=seed, client=order.client, round=order.round):
                self._phases.check(limits)
                tell(len(seen), total)
                seen.append(len(rows))
                yield self.trainee.batch(order.client, rows)

        assignment = Assignment(order.client, order.units, order.lr, order.picks, tier=order.tier)
        place, past = (order.round, order.attempt), self._memories[order.client]
        memory = Memory(self.memory(order))
        work = Work(order.round, assignment, memory)
        with self._phases("train"):
            value, loss = self.method.local(self.x, self.oracle, drawn(), work)
            self._phases.check(limits)
        if not (math.isfinite(loss) and np.isfinite(value.values).all()):
            raise ArithmeticError(f"the training loss is {loss}, or the update is not finite")
        with self._phases("encode"):
            if self._averaging is not None:
                kept = Contribution(assignment, sum(seen), value, loss)
                value = self._averaging.keep(place, kept)
            spec, buffer = payload.spec_of(value), payload.encode(value)
        if memory.value is not None:
            self._memories[order.client] = past = with_newest(past, place, memory.value)
            if self._store is not None:
                self._store.remember(order.client, past)
        update = Update(
            round=order.round,
            attempt=order.attempt,
            client=order.client,
            examples=sum(seen),
            loss=loss,
            payload=spec,
            costs=self._phases.take(),
        )
        return Outcome(update, buffer)

    def _reduce(self, order: Reduce, averaging: Averaging) -> Outcome:
        answer = Reduced(round=order.round, attempt=order.attempt)
        buffer: memoryview | None = None
        try:
            with self._phases("reduce"):
                answer, buffer = averaging.reduce(self.x, order)
        except Exception as error:
            is_foreseen = isinstance(error, CollectiveError)
            log.error(
                "round %d: the all-reduce failed: %s", order.round, error, exc_info=not is_foreseen
            )
            fault = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
            fault = fault.splitlines()[0][:500]
            answer = msgspec.structs.replace(answer, fault=fault, exchanged=averaging.exchanged)
        return Outcome(msgspec.structs.replace(answer, costs=self._phases.take()), buffer)

    def _score(self, message: Evaluate) -> Outcome | None:
        if message.version != self.version:  # after a resync the request comes again
            return self._sync(f"an evaluation of version {message.version}")
        with self._phases("evaluate"):
            scored = self.trainee.score(self.x, message.last)
        if message.last and self._setup.export is not None:
            self.trainee.export(self._setup.export)
        return Outcome(
            Score(
                version=self.version,
                loss=min(scored.loss, MAX_LOSS) if math.isfinite(scored.loss) else MAX_LOSS,
                metric=scored.metric,
                examples=scored.examples,
                rouge_l=scored.rouge_l,
                costs=self._phases.take(),
            )
        )


def _snapshot(version: int, x: Flat, known: bytes) -> tuple[Step, memoryview]:
    whole = payload.Dense(x)
    spec = payload.spec_of(whole)
    step = Step(version=version, round=0, digest=known, snapshot=True, payload=spec)
    return step, payload.encode(whole)
