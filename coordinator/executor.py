"""What the round machine asks for, done: plans made, tasks sent, rounds committed and saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from coordinator import totals
from coordinator.archive import Archive
from coordinator.central import Central
from coordinator.checks import most_examples
from coordinator.collectives import Collectives
from coordinator.desk import Desk
from coordinator.events import (
    Abandon,
    Assign,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Discard,
    Event,
    Finish,
)
from coordinator.events import Evaluate as EvaluateCommand
from coordinator.intake import Intake
from coordinator.journal import Journal
from coordinator.record import RunRecorder
from coordinator.roster import Member
from coordinator.state import Policy, State, Training, held
from fedalgos import registry
from fedalgos.method import Contribution
from fedalgos.space import ParamSpace
from protocol import wire
from protocol.experiment import Experiment
from protocol.messages import Evaluate, Reject, Task
from protocol.payload import Flat

log = logging.getLogger(__name__)

T = TypeVar("T")

QUICK_SECONDS = 0.05  # for which the nodes need not hear of us
SAVE_SECONDS = 1.0  # what a crash between two commits may lose: it is asked for again


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


class Executor:
    """Runs the machine's commands.

    Attributes:
        central: None until the evaluator has brought the parameters.
        intake: the updates of the open rounds.
        collectives: of rounds that the nodes aggregate among themselves.
    """

    def __init__(
        self,
        settings: Settings,
        desk: Desk,
        recorder: RunRecorder,
        now: Callable[[], float],
        journal: Journal,
    ) -> None:
        self.central: Central | None = None
        self._settings, self._desk, self._recorder, self._now = settings, desk, recorder, now
        self._method = registry.settings(settings.experiment.method)
        norm_limit = settings.experiment.rounds.norm_limit
        most = most_examples(self._method, settings.experiment.data)
        self.intake = Intake(journal, most, norm_limit, settings.policy.max_staleness)
        desk.wants = self.intake.wants
        deadline = settings.experiment.rounds.deadline_seconds
        self.collectives = Collectives(desk, recorder, self.intake, now, deadline)
        self._journal, self._saved_at = journal, now()
        self._aside = ThreadPoolExecutor(1)  # its thread ends with this object
        self._quick: set[str] = set()  # what was so the last time

    # --- what it has ----------------------------------------------------------------

    def centre(self, space: ParamSpace, x: Flat) -> None:
        """Have the parameters: the run can begin, or go on."""
        seed, secret = self._settings.experiment.run.seed, self._settings.secret
        method = registry.build(self._method, space, seed, secret)
        self.central = Central(method, space, x, Archive(self._journal))
        self._desk.max_payload_bytes = 8 * space.size + wire.MAX_INLINE_BYTES

    def resume(self, state: State, num_events: int) -> None:
        """Have what the journal has, where the machine is in ``state`` after so many events."""
        archive = Archive(self._journal)
        if (space := archive.space()) is not None:
            self.centre(space, archive.checkpoint(space.size)[1])
        self.intake.resume(num_events, held(state))
        phase, current = state.phase, (state.round + 1, state.attempt)
        if isinstance(phase, Training) and self._recorder.account.has_opened(*current):
            # else nobody was asked, and it opens with a task
            plan = self.need().plan(current[0], phase.cohort, phase.limits)
            self.intake.reopen(current, plan)

    def save_if_due(self) -> None:
        if self._journal.is_dirty and self._now() >= self._saved_at + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Have all that happened so far in the journal for good."""
        self._saved_at = self._now()
        self._recorder.save(self._saved_at)
        self.intake.save()
        self._beating(self._journal.commit)  # a disk may stall at any time

    def need(self) -> Central:
        """The parameters, which are there."""
        if self.central is None:
            raise RuntimeError("a round before the evaluator brought the parameters")
        return self.central

    # --- what the machine asks for ---------------------------------------------------

    def run(self, command: Command) -> Iterator[Event]:
        """Carry a command out; what comes of it are events."""
        match command:
            case Assign():
                self._assign(command)
            case Discard():
                self._discard(command)
            case Commit() if self.need().method.collective is not None:
                self.collectives.begin(command, self.need())
            case Commit():
                yield self._aggregate(command)
            case Abandon(round=number, reason=reason):
                log.warning("round %d abandoned: %s", number, reason)
                self._recorder.abandoned(command, self._now())
                for _, ref in command.refs:
                    del self.intake.updates[ref]
            case EvaluateCommand():
                self._evaluate(command)
            case Finish():
                pass  # the caller of ``turn`` sees ``finished``

    def _assign(self, command: Assign) -> None:
        central, number, attempt = self.need(), command.round, command.attempt
        if (plans := self.intake.plan((number, attempt))) is None:
            plans = self._quickly(
                "plan", lambda: central.plan(number, command.cohort, command.limits)
            )
            self.intake.open((number, attempt), plans)
            self._recorder.opened(command, self._now())
        for client in sorted(command.clients):
            member = self._desk.roster.host_of(client)
            if member is None:
                continue  # lost in this very turn: its NodeLost is on the way
            self._bring_up(member)
            plan = plans[client]
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
            self._desk.send(member, task)

    def settle(self) -> Iterator[Event]:
        """Commit the round whose nodes have ended aggregating it, if there is one."""
        made, central = self.collectives.ended(), self.central
        if made is not None and central is not None:
            yield self._commit(made.commit, lambda: self.collectives.adopt(made, central))

    def _aggregate(self, command: Commit) -> Event:
        central, stale = self.need(), dict(command.stale)
        # sorted by client, one at a time, and forgotten as they are folded in
        contributions = (self._damped(ref, stale.get(c, 0)) for c, ref in command.refs)
        return self._commit(command, lambda: central.commit(command.round, contributions))

    def _commit(self, command: Commit, commit: Callable[[], None]) -> Event:
        """Commit a round, in the one way or the other; its updates are done with."""
        central = self.need()
        self._recorder.looked(*self._desk.idle())
        self.save_if_due()  # what comes may take long
        self.intake.norms.close(client for client, _ in command.refs)
        try:
            self._quickly("commit", commit)
        except ArithmeticError as error:
            log.warning("round %d is not committed: %s", command.round, error)
            for _, ref in command.refs:
                self.intake.updates.pop(ref, None)
            self._recorder.rejected(f"{error}")
            return CommitFailed(self._now(), command.round, str(error))
        self._desk.withdraw(central.oldest, central.version)
        self._desk.measure()
        self._recorder.committed(command, self._now(), central.metrics)
        spent = totals.spent(self._recorder.account, self._recorder.meter)
        return Committed(self._now(), command.round, spent)

    def _damped(self, ref: str, staleness: int) -> Contribution:
        """An update that counts now, the less the later it is."""
        power = self._settings.experiment.rounds.staleness_power
        return replace(self.intake.updates.pop(ref), damping=(1.0 + staleness) ** -power)

    def _beating(self, work: Callable[[], T]) -> T:
        """Do what may take minutes while the nodes hear that we live."""
        job = self._aside.submit(work)
        try:
            while not wait([job], self._settings.experiment.nodes.heartbeat_seconds / 4).done:
                self._desk.beat()
        finally:
            wait([job])  # whatever happens here, nothing goes on behind our back
        return job.result()

    def _quickly(self, what: str, work: Callable[[], T]) -> T:
        """Do a replay or a plan: right here if it was quick the last time, else beating.

        To another thread and back takes longer than a commit of scalars.
        """
        start = self._now()
        try:
            return work() if what in self._quick else self._beating(work)
        finally:
            is_quick = self._now() < start + QUICK_SECONDS
            (self._quick.add if is_quick else self._quick.discard)(what)

    def _discard(self, command: Discard) -> None:
        self.intake.updates.pop(command.ref, None)
        log.warning("update of client %d discarded: %s", command.client, command.reason)
        self._recorder.rejected(command.reason)
        member = self._desk.roster.host_of(command.client)
        if member is not None:
            number, attempt, client = command.round, command.attempt, command.client
            self._desk.send(
                member, Reject(round=number, attempt=attempt, client=client, reason=command.reason)
            )

    def _evaluate(self, command: EvaluateCommand) -> None:
        member = self._desk.roster.evaluator()
        if member is not None:  # else a new evaluator's EvaluatorReady asks again
            self._bring_up(member)
            version = self.need().version
            self._desk.send(member, Evaluate(version=version, last=command.last))

    def _bring_up(self, member: Member) -> None:
        """Send a node what it lacks: the missed steps or a snapshot, whichever is fewer bytes."""
        central = self.need()
        tier = central.tier_of(member.hello.clients, member.limit) if member.trains else central.top
        known = -1 if member.version is None else member.version
        if known >= 0 and not central.has_been(known, member.digest, tier):
            reason = f"node {member.name} holds parameters of no version of this run"
            log.warning("%s; it gets a snapshot", reason)
            self._recorder.resynced()
            known = -1
        catch_up = central.catch_up(known, tier)
        for kept in catch_up.kept:
            if member.result == kept.message.digest:  # it has made it itself
                self._desk.send(member, msgspec.structs.replace(kept.message, payload=None))
            else:
                self._desk.offer(member, kept)
        member.result = b""
        is_behind = catch_up.is_snapshot or central.version > known + 1  # else it follows online
        if is_behind and member.trains:
            self._recorder.caught_up(member, known, central.version, catch_up)
        member.version, member.digest = central.version, central.digest_for(tier)
