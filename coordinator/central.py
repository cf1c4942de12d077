"""The server's half of the method: its state, the parameters, and their version."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from coordinator.archive import Archive, Version
from coordinator.history import CatchUp, History, Kept
from fedalgos.limits import Limit, lowered
from fedalgos.method import Assignment, Contribution, Method
from fedalgos.space import ParamSpace, digest
from fedalgos.split import unheld
from protocol.errors import JournalError
from protocol.messages import Step
from protocol.payload import Dense, Flat, Payload, encode, spec_of

log = logging.getLogger(__name__)


@dataclass
class Line:
    """What nodes of one tier are sent: their steps, and the digest of every version."""

    history: History
    digests: list[bytes] = field(default_factory=list)


class Central:
    """Parameters that change only by committed steps.

    Attributes:
        x: the shared parameters, (space.size,) float32: those of the highest tier, which
            are evaluated and exported.
        version: how many steps made them.
        metrics: what the method says of its state after the last committed round.

    Args:
        method: of the run.
        space: of its parameters.
        x: the initial ones.
        archive: where every version goes; if it has some, the newest is gone on from.
    """

    def __init__(self, method: Method[Any], space: ParamSpace, x: Flat, archive: Archive) -> None:
        self.method = method
        self.space = space
        self.x = x
        self.version = 0
        self.metrics: Mapping[str, float] = {}
        if method.tiers > 1 and not method.absolute:
            raise ValueError("tiers need steps that suffice by themselves")
        self._archive = archive
        nbytes = self._snapshot_of(x, 0, bytes(16)).nbytes
        self._lines = [Line(History(nbytes, method.absolute)) for _ in self._tiers]
        self._initial = x if method.onto == "initial" else None
        self._newest: tuple[int, Payload] | None = None  # round and step
        self._state, first = method.init(x)
        if archive.space() is None:
            self._begin(first)
        else:
            self._restore()

    def _begin(self, first: Payload | None) -> None:
        """Version 0, and what the method publishes before the first round."""
        zero = Version(0, 0.0, (digest(self.x),) * self.method.tiers)
        for line in self._lines:
            line.digests.append(zero.digests[0])
        self._archive.begin(self.space, self.x, zero)
        if first is not None:
            self._take(first, self._apply(0, first), round=0)
        self._archive.keep_state(self._state)

    def _restore(self) -> None:
        """The newest version of the archive, from its checkpoint and the steps since."""
        versions, (start, x) = self._archive.versions(), self._archive.checkpoint(self.space.size)
        first = min([*self._archive.steps, len(versions)])
        self.x, self.version = x, first - 1
        for tier, line in enumerate(self._lines):
            line.digests = [version.digests[tier] for version in versions[:first]]
        for number in self._archive.steps:
            version, step = versions[number], self._archive.step(number)
            if number > start:
                self.x = self._apply(version.round, step)
            self._publish(step, version)
        if self.version != len(versions) - 1 or digest(self.x) != self.digest:
            raise JournalError("the journal's steps do not lead to its newest parameters")
        self._state = self._archive.state(type(self._state))
        self.metrics = self.method.metrics(self._state)

    def plan(
        self, round: int, cohort: tuple[int, ...], limits: Mapping[int, Limit] | None = None
    ) -> Mapping[int, Assignment]:
        """Each client's assignment in a round, within the limits that some have."""
        if not cohort:  # all are busy with earlier tasks
            return {}
        plan = self.method.plan(self._state, round, cohort)
        if limits:
            plan = self.method.fit(self._state, plan, limits)
            idle = unheld(self.space, plan)
            if idle:
                log.warning("round %d: nobody has room for %s", round, ", ".join(idle))
        return {a.client: a for a in plan}

    def commit(self, round: int, contributions: Iterable[Contribution]) -> None:
        """Aggregate and apply a round: all of it or nothing.

        Raises:
            ArithmeticError: the result is not finite; nothing has changed.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            state, step = self.method.aggregate(self._state, self.x, round, contributions)
        self._commit(round, state, step)

    def adopt(self, round: int, step: Payload, made: bytes) -> None:
        """Commit a round whose step the nodes have made: all of it or nothing.

        Args:
            round: its number.
            step: what they bring.
            made: digest of the parameters that it gives them.

        Raises:
            ArithmeticError: it gives us others, or they are not finite; nothing has changed.
        """
        self._commit(round, self._state, step, made)

    def _commit(self, round: int, state: Any, step: Payload, made: bytes | None = None) -> None:
        start = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):
            x = self._apply(round, step)
        seconds = time.perf_counter() - start
        if made is not None and digest(x) != made:
            raise ArithmeticError("the step that a node brings does not give what it says")
        if not (np.isfinite(step.values).all() and np.isfinite(x).all()):
            raise ArithmeticError("the aggregate is not finite")
        self._state, self.metrics = state, self.method.metrics(state)
        self._take(step, x, round, seconds)
        self._archive.keep_state(state)

    @property
    def digest(self) -> bytes:
        """Of the parameters now."""
        return self.digest_for(self.top)

    @property
    def top(self) -> int:
        """The highest tier: the shared model's."""
        return self.method.tiers - 1

    @property
    def _tiers(self) -> range:
        return range(self.method.tiers)

    @property
    def oldest(self) -> int:
        """The oldest version whose step is still kept for anybody."""
        return min(line.history.oldest for line in self._lines)

    def tier_of(self, clients: Iterable[int], limit: Limit | None = None) -> int:
        """The tier of a node: the highest of its clients', or the top if it has none."""
        tier = max(map(self.method.tier_of, clients), default=self.top)
        return tier if self.method.takes is None else lowered(tier, self.method.takes, limit)

    def digest_for(self, tier: int) -> bytes:
        """Of the parameters now, as a tier has them."""
        return self._lines[tier].digests[-1]

    def has_been(self, version: int, digest: bytes, tier: int) -> bool:
        """Whether these are parameters of this run: of a version up to now, at a tier."""
        return 0 <= version <= self.version and self._lines[tier].digests[version] == digest

    def catch_up(self, known: int, tier: int) -> CatchUp:
        """What brings a node from a version to the newest; below 0, it holds nothing of use."""
        found = self._lines[tier].history.since(known, lambda: self._snapshot(tier))
        if known >= 0 or self._initial is None or self.version == 0:
            return found
        first = self._lines[tier].digests[0]
        start = self._snapshot_of(self._initial, 0, first)  # which the newest step goes onto
        return replace(found, kept=(start, *found.kept), is_snapshot=True)

    def _snapshot(self, tier: int) -> Kept:
        """The parameters themselves, as a step that any version can take."""
        x = self.x
        if tier < self.top and self._newest is not None:
            x = self._seen(*self._newest, tier)
        kept = self._snapshot_of(x, self.version, self.digest_for(tier))
        return replace(kept, tier=tier)

    def _snapshot_of(self, x: Flat, version: int, digest: bytes) -> Kept:
        payload = Dense(x)
        message = Step(
            version=version, round=0, digest=digest, snapshot=True, payload=spec_of(payload)
        )
        return Kept(message, encode(payload))

    def _apply(self, round: int, step: Payload) -> Flat:
        return self.method.apply(self.x if self._initial is None else self._initial, round, step)

    def _seen(self, round: int, step: Payload, tier: int) -> Flat:
        """The parameters that a tier's view of a step gives."""
        return self._apply(round, self._view(step, tier))

    def _view(self, step: Payload, tier: int) -> Payload:
        return step if tier == self.top else self.method.view(step, tier)

    def _take(self, step: Payload, x: Flat, round: int, seconds: float = 0.0) -> None:
        seen = (x if t == self.top else self._seen(round, step, t) for t in self._tiers)
        version = Version(round, seconds, tuple(map(digest, seen)))
        kept = self._publish(step, version)
        self.x = x
        self._archive.add(self.version, version, spec_of(step), kept.data)
        self._archive.tidy(x, self.method.onto, self.oldest)

    def _publish(self, step: Payload, version: Version) -> Kept:
        """Have a step ready for nodes of every tier; returns it as the top one gets it."""
        self.version, self._newest = self.version + 1, (version.round, step)
        kept = []
        for tier, line in enumerate(self._lines):
            view = self._view(step, tier)
            line.digests.append(version.digests[tier])
            message = Step(
                version=self.version,
                round=version.round,
                digest=line.digests[-1],
                payload=spec_of(view),
            )
            kept.append(Kept(message, encode(view), version.seconds, tier))
            line.history.add(kept[-1])
        return kept[-1]
