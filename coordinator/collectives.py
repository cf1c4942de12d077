"""Rounds that the nodes aggregate among themselves: asked for, heard, and adopted."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.central import Central
from coordinator.collective import Collective, orders
from coordinator.desk import Desk
from coordinator.events import Commit, Place
from coordinator.intake import Intake
from coordinator.record import RunRecorder
from coordinator.roster import Member
from fedalgos import robust
from fedalgos.method import Assignment
from protocol import payload
from protocol.messages import Reduced
from protocol.wire import Frame, RemoteProtocolError

log = logging.getLogger(__name__)


class Collectives:
    """At most one at a time: that of the round which is being committed.

    Args:
        desk: where its nodes are.
        recorder: what it costs goes there.
        intake: has the updates that count, of each its number of examples.
        now: the run's clock.
        deadline_seconds: after which one is given up.
    """

    def __init__(
        self,
        desk: Desk,
        recorder: RunRecorder,
        intake: Intake,
        now: Callable[[], float],
        deadline_seconds: float,
    ) -> None:
        self._desk, self._recorder, self._intake = desk, recorder, intake
        self._now, self._deadline_seconds = now, deadline_seconds
        self._open: Collective | None = None
        self._asked: dict[str, Place] = {}  # by node, the last order that it has not answered
        self._processes: dict[int, int] = {}  # by client, who has trained it last

    def trained(self, member: Member, client: int) -> None:
        """A client's update is there: in a process, and gone with it."""
        self._processes[client] = member.hello.pid

    def begin(self, command: Commit, central: Central) -> None:
        """Ask the nodes that hold the round's updates for their mean."""
        assert central.method.collective is not None  # noqa: S101 - the caller has looked
        made = self._open = Collective(command, self._now() + self._deadline_seconds)
        hosts: dict[int, Member] = {}
        for client, _ in command.refs:
            host = self._desk.roster.host_of(client)
            if host is None:
                made.lost[f"of client {client}"] = "it is not back"
            elif self._processes.get(client, host.hello.pid) != host.hello.pid:
                made.lost[host.name] = "it was started again, without what it had trained"
            else:
                hosts[client] = host
        if made.lost:
            return  # it is over before anybody was asked
        examples = {client: self._intake.updates[ref].examples for client, ref in command.refs}
        seconds = central.method.collective.seconds
        asked = orders(command, examples, hosts, central.version, seconds)
        made.waiting.update(asked)
        self._asked |= dict.fromkeys(asked, (command.round, command.attempt))
        for member in self._desk.roster:
            if (order := asked.get(member.name)) is not None:
                self._desk.send(member, order)

    def hear(self, member: Member, answer: Reduced, data: Frame | None) -> None:
        """Take a node's answer; one that comes too late still says what it has cost.

        Raises:
            RemoteProtocolError: there was no question.
        """
        if self._asked.get(member.name) != (answer.round, answer.attempt):
            raise RemoteProtocolError("an answer to no reduce")
        del self._asked[member.name]
        if self._open is not None and member.name in self._open.waiting:
            self._open.hear(member.name, answer, data)
            member.result = answer.digest or b""
        else:
            log.info("node %s: the all-reduce of round %d is over", member.name, answer.round)
        member.add_costs(answer.costs)
        self._desk.meter.exchanged(member.name, answer.exchanged)
        self._recorder.reduced(member, answer)

    def lose(self, member: Member, reason: str) -> None:
        """A node is gone."""
        if self._open is not None:
            self._open.lose(member.name, reason)

    def ended(self) -> Collective | None:
        """The one that has come to its end, well or not; it is let go."""
        made = self._open
        if made is None or not made.is_over(self._now()):
            return None
        self._open = None
        return made

    def adopt(self, made: Collective, central: Central) -> None:
        """Commit what its nodes agree on.

        Raises:
            ArithmeticError: they do not, or it is of no use; nothing has changed.
        """
        if (why := made.fault) is not None:
            raise ArithmeticError(why)
        assert made.step is not None  # noqa: S101 - else there is a fault
        answer, data = made.step
        if answer.payload is None or answer.digest is None:
            raise ArithmeticError("no node brought the result")
        try:
            step = payload.decode(answer.payload, data)
        except RemoteProtocolError as error:
            raise ArithmeticError(f"the step that a node brings: {error}") from error
        why = central.method.accepts(Assignment(made.commit.refs[0][0]), step)
        why = why or self._intake.norms.fault(robust.norm(step.values, central.x))
        if why is not None:
            raise ArithmeticError(f"the step that a node brings: {why}")
        central.adopt(made.commit.round, step, answer.digest)
        for _, ref in made.commit.refs:
            del self._intake.updates[ref]
