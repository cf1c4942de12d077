"""The coordinator's shell: what arrives becomes events, commands become messages.

Nothing is decided here: who takes part and when a round closes is ``rounds``, what an
update means is the method, what a node that is behind is sent is ``history``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import msgspec

from coordinator import eventlog, rounds
from coordinator.archive import Archive
from coordinator.budget import Spent
from coordinator.central import Central
from coordinator.cohort import wake_at
from coordinator.desk import Breach, Delivered, Desk, LoggedIn, TooMuch, Transport
from coordinator.events import (
    Abandon,
    Assign,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Discard,
    EvaluatorLost,
    EvaluatorReady,
    Event,
    Finish,
    NodeLost,
    NodeReady,
    Place,
    Resumed,
    Scored,
    TaskFailed,
    Tick,
    UpdateArrived,
)
from coordinator.events import Evaluate as EvaluateCommand
from coordinator.guard import Guard
from coordinator.history import CatchUp
from coordinator.journal import Journal
from coordinator.norms import Known, Norms
from coordinator.roster import Member, Roster
from coordinator.state import Evaluating, Finished, Policy, State, Training, held
from coordinator.updates import Updates
from fedalgos import guard, registry
from fedalgos.limits import shortage
from fedalgos.method import Assignment, Contribution, unchanged
from fedalgos.space import ParamSpace
from protocol import payload, wire
from protocol.experiment import Experiment
from protocol.messages import (
    Beat,
    Bye,
    Carrier,
    Evaluate,
    Failed,
    Hello,
    Ready,
    Refuse,
    Reject,
    Score,
    Sync,
    Task,
    Update,
    Welcome,
)
from protocol.payload import Flat
from protocol.wire import Frame, RemoteProtocolError

log = logging.getLogger(__name__)

T = TypeVar("T")

SAVE_SECONDS = 1.0  # what a crash between two commits may lose: it is asked for again


class Recorder(Protocol):
    """Where results go; see ``coordinator.record``."""

    def save(self, now: float) -> None: ...
    def joined(self, member: Member) -> None: ...
    def forget(self, here: Collection[str]) -> list[str]: ...
    def ready(self, member: Member) -> None: ...
    def has_opened(self, round: int, attempt: int) -> bool: ...
    def opened(self, assign: Assign, now: float) -> None: ...
    def updated(self, member: Member, update: Update) -> None: ...
    def committed(self, commit: Commit, now: float, metrics: Mapping[str, float]) -> None: ...
    def looked(self, idle: Collection[str]) -> None: ...
    def spent(self) -> Spent: ...
    def abandoned(self, abandon: Abandon, now: float) -> None: ...
    def scored(self, round: int, score: Score) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def resynced(self, member: Member, reason: str) -> None: ...
    def caught_up(self, member: Member, known: int, version: int, catch_up: CatchUp) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What the shell is told from outside.

    ``secret`` is what no node may know: the noise of a private method comes from it.
    """

    run_id: str
    software: str
    experiment: Experiment
    policy: Policy
    secret: bytes | None = None


class Server:
    """One run, from the first login to the last goodbye."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        recorder: Recorder,
        now: Callable[[], float],
        journal: Journal,
        guard: Guard | None = None,
    ) -> None:
        self.settings = settings
        self.state = State()
        self.central: Central | None = None
        self._method_settings = registry.settings(settings.experiment.method)
        roster = Roster(settings.policy.clients, settings.software)
        self.desk = Desk(transport, roster, settings.experiment.nodes, now, guard)
        self.desk.wants = self._wants
        self._recorder, self.now = recorder, now
        self._plans: dict[Place, Mapping[int, Assignment]] = {}  # what may be answered still
        self._journal, self._saved_at = journal, now()
        self._updates = Updates(journal)
        self._norms = Norms(settings.experiment.rounds.norm_limit)
        self._num_refs = 0
        self._missed_until = 0.0
        self._hellos: dict[str, Hello] = {}  # the last of each node
        self._last_event_at = now()
        self._aside = ThreadPoolExecutor(1)  # its thread ends with this object

    # --- the loop ----------------------------------------------------------------

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
        self.feed(Tick(self.now()))
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self._journal.is_dirty and self.now() >= self._saved_at + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Have all that happened so far in the journal for good."""
        self._saved_at = self.now()
        self._recorder.save(self._saved_at)
        self._journal.keep("norms", "", msgspec.msgpack.encode(self._norms.known()))
        self._beating(self._journal.commit)  # large arrays take their time

    def resume(self) -> None:
        """Go on with the run of the journal, whose nodes are all to come back."""
        for number, event in enumerate(eventlog.read(self._journal)):
            self.state, _ = rounds.step(self.state, event, self.settings.policy)
            self._num_refs = number + 1  # more than there are
        if (norms := self._journal.record("norms", "")) is not None:
            self._norms.restore(msgspec.msgpack.decode(norms.plain, type=Known))
        archive = Archive(self._journal)
        if (space := archive.space()) is not None:
            self._centre(space, archive.checkpoint(space.size)[1])
        for ref in set(self._updates).difference(held(self.state)):
            del self._updates[ref]
        phase, current = self.state.phase, (self.state.round + 1, self.state.attempt)
        if isinstance(phase, Training) and self._recorder.has_opened(*current):
            plan = self._central().plan(current[0], phase.cohort, phase.limits)
            self._plans = {current: plan}  # else nobody was asked, and it opens with a task
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
                queue.extend(self._run(command))

    # --- what arrives ------------------------------------------------------------

    def _welcome(self, member: Member, superseded: Member | None) -> None:
        if superseded is not None:
            self.feed(self._lost(superseded, "superseded by a new login"))
        self._mourn(member.hello)
        self._recorder.joined(member)
        for name in self._recorder.forget({other.name for other in self.desk.roster}):
            self._hellos.pop(name, None)
        table = msgspec.to_builtins(self.settings.experiment)
        self.desk.send(member, Welcome(run=self.settings.run_id, experiment=table))

    def _mourn(self, hello: Hello) -> None:
        """Fail the task that a node was killed at by the kernel, or it would get it again."""
        last, self._hellos[hello.node] = self._hellos.get(hello.node), hello
        if last is None or last.oom_kills is None or hello.oom_kills is None:
            return
        if hello.pid == last.pid or hello.oom_kills <= last.oom_kills:
            return
        limit = "" if hello.memory_limit is None else f" of {hello.memory_limit / 1e6:.0f} MB"
        reason = f"out of memory: the kernel killed node {hello.node} at its limit{limit}"
        log.warning("%s", reason)
        phase = self.state.phase
        if isinstance(phase, Training):
            done = {*phase.refs, *phase.failed}
            # a node takes them in this order
            running = [c for c in sorted(phase.cohort) if c in last.clients and c not in done]
            for client in running[:1]:
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
            case Beat(busy=busy, progress=progress):
                member.busy, member.progress = busy, progress
            case Ready() if member.version is None:
                yield from self._ready(member, message, data)
            case Ready():
                pass  # said twice in one login: when the first was on its way as it was asked
            case Update():
                self._answered(member, message.client)
                yield self._update(member, message, data)
            case Failed(client=client, reason=reason):
                self._answered(member, client)
                log.warning("client %d on %s failed: %s", client, member.name, reason)
                self._recorder.rejected(f"task failed: {reason}")
                yield TaskFailed(self.now(), client, message.round, message.attempt, reason)
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
                self._recorder.resynced(member, reason)
                member.version = -1  # of no use: a snapshot follows with the next task
                yield self._present(member)
            case Bye(reason=reason):
                self._part(member, reason or "it said goodbye")
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__}")

    def _ready(self, member: Member, ready: Ready, data: Frame | None) -> Iterator[Event]:
        member.add_costs(ready.costs)
        member.space, member.busy = ready.space, ""
        if not member.trains and self.central is None:
            self._found(ready, data)
        member.version, member.digest = ready.version, ready.digest
        self._recorder.ready(member)
        if self.central is not None:
            for other in self.desk.roster:
                if (refusal := self._misfit(other, self.central)) is not None:
                    log.warning("refused: %s", refusal.reason)
                    self.desk.send(other, refusal)
                    self._part(other, refusal.reason)
        if self.desk.roster.at(member.peer) is member:
            for other in [member] if member.trains else self.desk.roster:
                self._note_limit(other)
            yield self._present(member)

    def _note_limit(self, member: Member) -> None:
        """Say it where a limit of bytes is not planned within."""
        if member.version is None or member.limit is None or self.central is None:
            return
        method = self.central.method
        if method.takes is None and method.fit is unchanged:
            name = self.settings.experiment.method["name"]
            log.warning("node %s: --max-bytes has no effect with method %s", member.name, name)

    def _misfit(self, member: Member, central: Central) -> Refuse | None:
        """Why a node cannot take part in this run, once its parameters are known."""
        if member.space not in (b"", central.space.digest):
            reason = f"node {member.name} trains other tensors than the evaluator"
            return Refuse(code="version", reason=reason)
        why = member.limit and shortage(central.method.takes, member.limit)
        return Refuse(code="limits", reason=f"node {member.name}: {why}") if why else None

    def _found(self, ready: Ready, data: Frame | None) -> None:
        """The evaluator brings the parameter space and its initial values: the run begins."""
        if not ready.tensors or ready.payload is None or data is None:
            raise RemoteProtocolError("the evaluator sent no parameters")
        try:
            space = ParamSpace.of(ready.tensors)
        except ValueError as error:
            raise RemoteProtocolError(f"the evaluator's parameters: {error}") from error
        x = payload.decode(ready.payload, data).values.copy()
        if len(x) != space.size or space.digest != ready.space:
            raise RemoteProtocolError("the evaluator's parameters do not fit its space")
        self._centre(space, x)
        self.save()  # from its first job on the evaluator no longer brings them

    def _centre(self, space: ParamSpace, x: Flat) -> None:
        seed, secret = self.settings.experiment.run.seed, self.settings.secret
        method = registry.build(self._method_settings, space, seed, secret)
        self.central = Central(method, space, x, Archive(self._journal))
        self.desk.max_payload_bytes = 8 * space.size + wire.MAX_INLINE_BYTES

    def _update(self, member: Member, update: Update, data: Frame | None) -> Event:
        member.add_costs(update.costs)
        self._num_refs += 1
        ref = f"{update.round}/{update.attempt}/{update.client}/{self._num_refs}"
        fault = self._check(update, data, ref)
        if fault is None:
            self._recorder.updated(member, update)
        place = (update.client, update.round, update.attempt)
        return UpdateArrived(self.now(), *place, ref, fault)

    def _check(self, update: Update, data: Frame | None, ref: str) -> str | None:
        """Store a usable update under ``ref``; else say what is wrong with it."""
        assignment = self._plans.get((update.round, update.attempt), {}).get(update.client)
        if assignment is None:
            return "stale"
        if update.payload is None or data is None:
            return "no payload"
        if (why := self._miscount(update.examples)) is not None:
            return why
        try:
            value = payload.decode(update.payload, data)
        except RemoteProtocolError as error:
            return str(error)
        central = self._central()
        if (why := central.method.accepts(assignment, value)) is not None:
            return why
        contribution = Contribution(assignment, update.examples, value, update.loss)
        norm = guard.norm_of(central.method, central.x, contribution)
        if (why := self._norms.fault(norm)) is not None:
            return why
        self._norms.note(update.client, norm)
        self._updates[ref] = contribution
        return None

    def _miscount(self, examples: int) -> str | None:
        """Why the examples cannot have been so many, where the task says how many there are."""
        o = self._method_settings
        most = o.steps * o.batch_size
        if examples < 1:
            return "no examples"
        return f"examples: {examples} of at most {most}" if most and examples > most else None

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

    def _wants(self, member: Member, message: Carrier) -> bool:
        """Whether a payload is of a task that may still count when it is here."""
        if not isinstance(message, Update):
            return True
        return message.client in self._plans.get((message.round, message.attempt), {})

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
        if member.trains:
            return NodeLost(self.now(), member.name, reason)
        return EvaluatorLost(self.now())

    def _present(self, member: Member) -> Event:
        if member.trains:
            return NodeReady(self.now(), member.name, member.hello.clients, member.limit)
        return EvaluatorReady(self.now())

    # --- what the machine asks for -----------------------------------------------

    def _run(self, command: Command) -> Iterator[Event]:
        match command:
            case Assign():
                self._assign(command)
            case Discard():
                self._discard(command)
            case Commit():
                yield self._commit(command)
            case Abandon(round=number, reason=reason):
                log.warning("round %d abandoned: %s", number, reason)
                self._recorder.abandoned(command, self.now())
                for _, ref in command.refs:
                    del self._updates[ref]
            case EvaluateCommand():
                self._evaluate(command)
            case Finish():
                pass  # the caller of ``turn`` sees ``finished``

    def _assign(self, command: Assign) -> None:
        central, number, attempt = self._central(), command.round, command.attempt
        if (place := (number, attempt)) not in self._plans:
            late, cohort = self.settings.policy.max_staleness, command.cohort
            made = self._beating(lambda: central.plan(number, cohort, command.limits))
            kept = {p: old for p, old in self._plans.items() if late and p[0] >= number - late}
            self._plans = {**kept, place: made}
            self._norms.open()
            self._recorder.opened(command, self.now())
        for client in sorted(command.clients):
            member = self.desk.roster.host_of(client)
            if member is None:
                continue  # lost in this very turn: its NodeLost is on the way
            self._bring_up(member)
            plan = self._plans[place][client]
            task = Task(
                round=number,
                attempt=attempt,
                client=client,
                version=central.version,
                units=plan.units,
                lr=plan.lr,
                picks=plan.picks,
                tier=plan.tier,
            )
            member.allowance.asked += 1
            self.desk.send(member, task)

    def _commit(self, command: Commit) -> Event:
        central, stale = self._central(), dict(command.stale)
        self._recorder.looked(self.desk.idle())
        self._save_if_due()  # what comes may take long
        self._norms.close(client for client, _ in command.refs)
        # sorted by client, one at a time, and forgotten as they are folded in
        contributions = (self._damped(ref, stale.get(c, 0)) for c, ref in command.refs)
        try:
            self._beating(lambda: central.commit(command.round, contributions))
        except ArithmeticError as error:
            log.warning("round %d is not committed: %s", command.round, error)
            for _, ref in command.refs:
                self._updates.pop(ref, None)
            self._recorder.rejected(f"{error}")
            return CommitFailed(self.now(), command.round, str(error))
        self.desk.withdraw(central.oldest, central.version)
        self.desk.measure()
        self._recorder.committed(command, self.now(), central.metrics)
        return Committed(self.now(), command.round, self._recorder.spent())

    def _damped(self, ref: str, staleness: int) -> Contribution:
        """An update that counts now, the less the later it is."""
        power = self.settings.experiment.rounds.staleness_power
        return replace(self._updates.pop(ref), damping=(1.0 + staleness) ** -power)

    def _beating(self, work: Callable[[], T]) -> T:
        """Do what may take minutes, a replay or a plan, while the nodes hear that we live."""
        job = self._aside.submit(work)
        try:
            while not wait([job], self.settings.experiment.nodes.heartbeat_seconds / 4).done:
                self.desk.beat()
        finally:
            wait([job])  # whatever happens here, nothing goes on behind our back
        return job.result()

    def _discard(self, command: Discard) -> None:
        self._updates.pop(command.ref, None)
        log.warning("update of client %d discarded: %s", command.client, command.reason)
        self._recorder.rejected(command.reason)
        member = self.desk.roster.host_of(command.client)
        if member is not None:
            number, attempt, client = command.round, command.attempt, command.client
            self.desk.send(
                member, Reject(round=number, attempt=attempt, client=client, reason=command.reason)
            )

    def _evaluate(self, command: EvaluateCommand) -> None:
        member = self.desk.roster.evaluator()
        if member is not None:  # else a new evaluator's EvaluatorReady asks again
            self._bring_up(member)
            version = self._central().version
            self.desk.send(member, Evaluate(version=version, last=command.last))

    def _bring_up(self, member: Member) -> None:
        """Send a node what it lacks: the missed steps or a snapshot, whichever is fewer bytes."""
        central = self._central()
        tier = central.tier_of(member.hello.clients, member.limit) if member.trains else central.top
        known = -1 if member.version is None else member.version
        if known >= 0 and not central.has_been(known, member.digest, tier):
            reason = f"node {member.name} holds parameters of no version of this run"
            log.warning("%s; it gets a snapshot", reason)
            self._recorder.resynced(member, reason)
            known = -1
        catch_up = central.catch_up(known, tier)
        for kept in catch_up.kept:
            self.desk.offer(member, kept)
        is_behind = catch_up.is_snapshot or central.version > known + 1  # else it follows online
        if is_behind and member.trains:
            self._recorder.caught_up(member, known, central.version, catch_up)
        member.version, member.digest = central.version, central.digest_for(tier)

    def _central(self) -> Central:
        if self.central is None:
            raise RuntimeError("a round before the evaluator brought the parameters")
        return self.central
