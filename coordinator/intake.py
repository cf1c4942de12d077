"""Updates on their way in: of a task that was given, judged, and kept until aggregated."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from coordinator import checks
from coordinator.central import Central
from coordinator.events import Place
from coordinator.journal import Journal
from coordinator.norms import Known, Norms
from coordinator.roster import Member
from coordinator.updates import Updates
from fedalgos import guard
from fedalgos.method import Assignment
from protocol.messages import Carrier, Update
from protocol.wire import Frame

Plan = Mapping[int, Assignment]  # by client


class Intake:
    """What was asked for, and what has come of it.

    Args:
        journal: where updates are kept.
        most_examples: that a task can have; 0 where nobody here knows.
        norm_limit: how many times the usual norm is too much, see ``Norms``.
        max_staleness: rounds that an update may be late.

    Attributes:
        updates: those that wait to be aggregated, by ref.
        norms: of past ones.
    """

    def __init__(
        self, journal: Journal, most_examples: int, norm_limit: float, max_staleness: int
    ) -> None:
        self.updates, self.norms = Updates(journal), Norms(norm_limit)
        self._journal, self._most_examples = journal, most_examples
        self._max_staleness = max_staleness
        self._plans: dict[Place, Plan] = {}  # what may be answered still
        self._num_refs = 0

    def plan(self, place: Place) -> Plan | None:
        """What clients were asked in an attempt at a round, if it may be answered still."""
        return self._plans.get(place)

    def open(self, place: Place, plan: Plan) -> None:
        """A round, or another attempt at one; plans too old to be answered are forgotten."""
        late = self._max_staleness
        kept = {p: old for p, old in self._plans.items() if late and p[0] >= place[0] - late}
        self._plans = {**kept, place: plan}
        self.norms.open()

    def reopen(self, place: Place, plan: Plan) -> None:
        """The round that was open before a restart."""
        self._plans = {place: plan}

    def wants(self, member: Member, message: Carrier) -> bool:
        """Whether a payload is of a task that may still count when it is here."""
        del member
        if not isinstance(message, Update):
            return True
        return message.client in self._plans.get((message.round, message.attempt), {})

    def take(
        self, update: Update, data: Frame | None, central: Central | None
    ) -> tuple[str, str | None]:
        """Keep an update: its ref, and what is wrong with it if it is not kept."""
        self._num_refs += 1
        ref = f"{update.round}/{update.attempt}/{update.client}/{self._num_refs}"
        return ref, self._fault(update, data, ref, central)

    def _fault(
        self, update: Update, data: Frame | None, ref: str, central: Central | None
    ) -> str | None:
        assignment = self._plans.get((update.round, update.attempt), {}).get(update.client)
        if assignment is None or central is None:
            return "stale"
        made = checks.contribution(update, data, assignment, central.method, self._most_examples)
        if isinstance(made, str):
            return made
        norm = guard.norm_of(central.method, central.x, made)
        if (why := self.norms.fault(norm)) is not None:
            return why
        self.norms.note(update.client, norm)
        self.updates[ref] = made
        return None

    def save(self) -> None:
        """Have the norms where the journal's next commit finds them; updates are there."""
        self._journal.keep("norms", "", msgspec.msgpack.encode(self.norms.known()))

    def resume(self, num_events: int, held: Collection[str]) -> None:
        """Go on after a restart: of the updates only those that are ``held`` stay."""
        self._num_refs = num_events  # more than there are
        if (norms := self._journal.record("norms", "")) is not None:
            self.norms.restore(msgspec.msgpack.decode(norms.plain, type=Known))
        for ref in set(self.updates).difference(held):
            del self.updates[ref]
