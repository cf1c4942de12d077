"""The coordinator's shell: what arrives becomes events, commands become messages.

Nothing is decided here: who takes part and when a round closes is ``rounds``, what an
update means is the method, what a node that is behind is sent is ``history``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from coordinator import checks, eventlog, oom, rounds
from coordinator.arrivals import Breach, Delivered, LoggedIn, TooMuch
from coordinator.central import Central
from coordinator.cohort import wake_at
from coordinator.desk import Desk, Transport
from coordinator.events import (
    Committed,
    EvaluatorLost,
    EvaluatorReady,
    Event,
    NodeLost,
    NodeReady,
    Resumed,
    Scored,
    TaskFailed,
    Tick,
    UpdateArrived,
)
from coordinator.executor import Executor, Settings
from coordinator.guard import Guard
from coordinator.journal import Journal
from coordinator.record import RunRecorder
from coordinator.roster import NOWHERE, Member, Roster
from coordinator.state import Evaluating, Finished, State
from fedalgos.method import unchanged
from protocol.messages import (
    WAITING,
    Beat,
    Bye,
    Failed,
    Hello,
    Ready,
    Reduced,
    Score,
    Sync,
    Update,
    Welcome,
)
from protocol.wire import Frame, RemoteProtocolError

log = logging.getLogger(__name__)


class Server:
    """One run, from the first login to the last goodbye."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        recorder: RunRecorder,
        now: Callable[[], float],
        journal: Journal,
        guard: Guard | None = None,
    ) -> None:
        self.settings = settings
        self.state = State()
        roster = Roster(settings.policy.clients, settings.software)
        self.desk = Desk(transport, roster, settings.experiment.nodes, now, guard)
        self.executor = Executor(settings, self.desk, recorder, now, journal)
        self._recorder, self.now, self._journal = recorder, now, journal
        self._missed_until = 0.0
        self._hellos: dict[str, Hello] = {}  # the last of each node
        self._last_event_at = now()

    # --- the loop ----------------------------------------------------------------

    @property
    def central(self) -> Central | None:
        """The parameters, once the evaluator has brought them."""
        return self.executor.central

    @property
    def finished(self) -> Finished | None:
        """Set when the run is over."""
        return self.state.phase if isinstance(self.state.phase, Finished) else None

    @property
    def is_missed(self) -> bool:
        """Whether nodes that were there before a restart may still come to hear of the end."""
        return bool(self.state.lost) and self.now() < self._missed_until

    def turn(self, within_seconds: float) -> None:
        """Wait for a message or until something is due, and do all that follows from it."""
        wake = wake_at(self.state, self.settings.policy, self._last_event_at)
        if wake is not None:
            within_seconds = min(within_seconds, max(0.0, wake - self.now()))
        for arrival in self.desk.receive(within_seconds):
            match arrival:
                case LoggedIn(member, superseded):
                    self._welcome(member, superseded)
                case Delivered(member, message, data):
                    self._deliver(member, message, data)
                case Breach(member, why):
                    self._breach(member, why)
                case TooMuch(member, why):
                    self._expel(member, why)
        for member, reason in self.desk.keep_alive():
            self._part(member, reason)
        for event in self.executor.settle():
            self.feed(event)
        self.feed(Tick(self.now()))
        self.executor.save_if_due()

    def save(self) -> None:
        """Have all that happened so far in the journal for good."""
        self.executor.save()

    def resume(self) -> None:
        """Go on with the run of the journal, whose nodes are all to come back."""
        num_events = 0
        for num_events, event in enumerate(eventlog.read(self._journal), 1):  # noqa: B007
            self.state, _ = rounds.step(self.state, event, self.settings.policy)
        self.executor.resume(self.state, num_events)
        self.feed(Resumed(self.now()))
        self._missed_until = self.now() + self.settings.policy.return_seconds
        self.save()

    def feed(self, event: Event) -> None:
        """Step the machine and run its commands, whose outcomes are events again."""
        queue = [event]
        while queue:
            event = queue.pop(0)
            self._last_event_at = event.now
            before = self.state
            self.state, commands = rounds.step(before, event, self.settings.policy)
            if commands or self.state != before or not isinstance(event, Tick):
                eventlog.log(self._journal, event)  # a tick that changed nothing says nothing
            if isinstance(event, Committed):
                self.save()  # before anybody is sent the step
            for command in commands:
                queue.extend(self.executor.run(command))

    # --- what arrives ------------------------------------------------------------

    def _welcome(self, member: Member, superseded: Member | None) -> None:
        if superseded is not None:
            self.feed(self._lost(superseded, "superseded by a new login"))
        self._mourn(member.hello)
        self._recorder.joined(member)
        for name in self._recorder.forget({other.name for other in self.desk.roster}):
            self._hellos.pop(name, None)
            self.desk.roster.forget(name)
        table = msgspec.to_builtins(self.settings.experiment)
        self.desk.send(member, Welcome(run=self.settings.run_id, experiment=table))

    def _mourn(self, hello: Hello) -> None:
        """Fail the task that a node was killed at by the kernel, or it would get it again."""
        last, self._hellos[hello.node] = self._hellos.get(hello.node), hello
        if last is None or (reason := oom.kill(last, hello)) is None:
            return
        log.warning("%s", reason)
        client = oom.task(self.state.phase, last.clients)
        if client is not None:
            self._recorder.rejected(f"task failed: {reason}")
            place = (client, self.state.round + 1, self.state.attempt)
            self.feed(TaskFailed(self.now(), *place, reason))

    def _deliver(self, member: Member, message: Any, data: Frame | None) -> None:
        try:
            for event in self._handle(member, message, data):
                self.feed(event)
        except RemoteProtocolError as error:
            self._breach(member, str(error))

    def _handle(self, member: Member, message: Any, data: Frame | None) -> Iterator[Event]:
        match message:
            case Beat(busy=""):
                pass  # as before
            case Beat(busy=busy, progress=progress):
                member.busy, member.progress = busy, progress
            case Ready() if member.version is None:
                yield from self._ready(member, message, data)
            case Ready():  # twice in one login: when the first was on its way as it was asked
                member.busy, member.progress = WAITING, None
            case Update():
                self._answered(member, message.client)
                yield self._update(member, message, data)
            case Failed(client=client, reason=reason):
                self._answered(member, client)
                log.warning("client %d on %s failed: %s", client, member.name, reason)
                self._recorder.rejected(f"task failed: {reason}")
                yield TaskFailed(self.now(), client, message.round, message.attempt, reason)
            case Reduced():
                self.executor.collectives.hear(member, message, data)
            case Score():
                yield from self._scored(member, message)
            case Sync(version=version, reason=reason):
                if member.version is None:
                    raise RemoteProtocolError("a sync before it was ready")
                if member.version < 0:
                    return  # said twice
                if not member.allowance.resyncs.take(self.now()):
                    self._expel(member, "too many resyncs")
                    return
                log.warning("node %s at version %d resyncs: %s", member.name, version, reason)
                self._recorder.resynced()
                member.version = -1  # of no use: a snapshot follows with the next task
                yield self._present(member)
            case Bye(reason=reason):
                self._part(member, reason or "it said goodbye")
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__}")

    def _ready(self, member: Member, ready: Ready, data: Frame | None) -> Iterator[Event]:
        member.add_costs(ready.costs)
        self.desk.roster.probed(member, ready.costs)
        member.space, member.busy, member.progress = ready.space, WAITING, None
        if not member.trains and self.central is None:
            self._found(ready, data)
        member.version, member.digest = ready.version, ready.digest
        member.meeting = ready.meeting or NOWHERE
        self._recorder.ready(member)
        if self.central is not None:
            for other in self.desk.roster:
                refusal = checks.misfit(other, self.central.space, self.central.method)
                if refusal is not None:
                    log.warning("refused: %s", refusal.reason)
                    self.desk.send(other, refusal)
                    self._part(other, refusal.reason)
        if self.desk.roster.at(member.peer) is member:
            for other in [member] if member.trains else self.desk.roster:
                self._note_limit(other)
            yield self._present(member)

    def _note_limit(self, member: Member) -> None:
        """Say it where a limit of bytes is not planned within."""
        said = member.hello.limits
        if member.version is None or said is None or said.bytes is None or self.central is None:
            return
        method = self.central.method
        if method.takes is None and method.fit is unchanged:
            name = self.settings.experiment.method["name"]
            log.warning("node %s: --max-bytes has no effect with method %s", member.name, name)

    def _found(self, ready: Ready, data: Frame | None) -> None:
        """The evaluator brings the parameter space and its initial values: the run begins."""
        self.executor.centre(*checks.start(ready, data))
        self.save()  # from its first job on the evaluator no longer brings them

    def _update(self, member: Member, update: Update, data: Frame | None) -> Event:
        member.add_costs(update.costs)
        ref, fault = self.executor.intake.take(update, data, self.central)
        if fault is None:
            self._recorder.updated(member, update)
            self.executor.collectives.trained(member, update.client)
        if isinstance(data, memoryview):
            data.release()  # or it is there until we are back, and a commit comes before that
        place = (update.client, update.round, update.attempt)
        return UpdateArrived(self.now(), *place, ref, fault)

    def _answered(self, member: Member, client: int) -> None:
        """An update or a failure came in: of a hosted client, and not many more than tasks."""
        if client not in member.hello.clients:
            raise RemoteProtocolError(f"an answer of client {client}, not hosted there")
        if member.version is None:
            raise RemoteProtocolError("an answer before it was ready")
        allowance = member.allowance
        allowance.answers += 1
        # what it was given before this login, and what it says twice
        if allowance.answers > allowance.asked + 2 * len(member.hello.clients):
            raise RemoteProtocolError("more answers than tasks")

    def _scored(self, member: Member, score: Score) -> Iterator[Event]:
        if member.trains:
            raise RemoteProtocolError("a score of a node that trains")
        if self.central is None or score.version != self.central.version:
            return
        if not isinstance(self.state.phase, Evaluating):
            return  # asked twice, because the connection was lost in between
        member.add_costs(score.costs)
        self.desk.measure()
        self._recorder.scored(self.state.round, score)
        yield Scored(self.now(), self.state.round)

    def _breach(self, member: Member | None, why: str) -> None:
        log.warning("dropped a message of %s: %s", member.name if member else "a stranger", why)
        self._recorder.rejected("bad message")
        if member is not None and (reason := self.desk.strike(member)) is not None:
            self._expel(member, reason)

    def _expel(self, member: Member, reason: str) -> None:
        """Turn a node away that does what none may."""
        log.warning("node %s is turned away: %s", member.name, reason)
        self._recorder.rejected(reason)
        self.desk.expel(member, reason)
        self._part(member, reason)

    def _part(self, member: Member, reason: str) -> None:
        log.info("node %s is gone: %s", member.name, reason)
        self.desk.drop(member)
        self.feed(self._lost(member, reason))

    def _lost(self, member: Member, reason: str) -> Event:
        self.executor.collectives.lose(member, reason)
        if member.trains:
            return NodeLost(self.now(), member.name, reason)
        return EvaluatorLost(self.now())

    def _present(self, member: Member) -> Event:
        if member.trains:
            return NodeReady(self.now(), member.name, member.hello.clients, member.limit)
        return EvaluatorReady(self.now())
