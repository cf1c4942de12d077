"""The server's half of the method: its state, the parameters, and their version."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.history import CatchUp, History, Kept
from fedalgos.method import Assignment, Contribution, Method
from fedalgos.space import ParamSpace, digest
from protocol.messages import Step
from protocol.payload import Dense, Flat, Payload, encode, spec_of


class Central:
    """Parameters that change only by committed steps.

    Attributes:
        x: the shared parameters, (space.size,) float32.
        version: how many steps made them.
        metrics: what the method says of its state after the last committed round.
    """

    def __init__(self, method: Method[Any], space: ParamSpace, x: Flat) -> None:
        self.method = method
        self.space = space
        self.x = x
        self.version = 0
        self.metrics: Mapping[str, float] = {}
        self._digests = [digest(x)]  # of every version
        self.history = History(self.snapshot().nbytes, method.absolute)
        self._initial = x if method.onto == "initial" else None
        self._state, first = method.init(x)
        if first is not None:
            self._take(first, self._apply(0, first), round=0)

    def plan(self, round: int, cohort: tuple[int, ...]) -> Mapping[int, Assignment]:
        """Each client's assignment in a round."""
        return {a.client: a for a in self.method.plan(self._state, round, cohort)}

    def commit(self, round: int, contributions: Iterable[Contribution]) -> None:
        """Aggregate and apply a round: all of it or nothing.

        Raises:
            ArithmeticError: the result is not finite; nothing has changed.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            state, step = self.method.aggregate(self._state, self.x, round, contributions)
            start = time.perf_counter()
            x = self._apply(round, step)
            seconds = time.perf_counter() - start
        if not (np.isfinite(step.values).all() and np.isfinite(x).all()):
            raise ArithmeticError("the aggregate is not finite")
        self._state, self.metrics = state, self.method.metrics(state)
        self._take(step, x, round, seconds)

    @property
    def digest(self) -> bytes:
        """Of the parameters now."""
        return self._digests[-1]

    def has_been(self, version: int, digest: bytes) -> bool:
        """Whether these are parameters of this run: of a version up to now."""
        return 0 <= version <= self.version and self._digests[version] == digest

    def catch_up(self, known: int) -> CatchUp:
        """What brings a node from a version to the newest; below 0, it holds nothing of use."""
        found = self.history.since(known, self.snapshot)
        if known >= 0 or self._initial is None or self.version == 0:
            return found
        start = self._snapshot(self._initial, 0)  # which the newest step goes onto
        return replace(found, kept=(start, *found.kept), is_snapshot=True)

    def snapshot(self) -> Kept:
        """The parameters themselves, as a step that any version can take."""
        return self._snapshot(self.x, self.version)

    def _snapshot(self, x: Flat, version: int) -> Kept:
        payload = Dense(x)
        message = Step(
            version=version,
            round=0,
            digest=self._digests[version],
            snapshot=True,
            payload=spec_of(payload),
        )
        return Kept(message, encode(payload))

    def _apply(self, round: int, step: Payload) -> Flat:
        return self.method.apply(self.x if self._initial is None else self._initial, round, step)

    def _take(self, step: Payload, x: Flat, round: int, seconds: float = 0.0) -> None:
        self.x = x
        self.version += 1
        self._digests.append(digest(x))
        message = Step(version=self.version, round=round, digest=self.digest, payload=spec_of(step))
        self.history.add(Kept(message, encode(step), seconds))
