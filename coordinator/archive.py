"""Parameters, steps and the method's state in the journal: the newest version is soon rebuilt.

The digests of all versions are kept, and of the steps those that a node may still be sent
or that lead from the last checkpoint of the parameters to now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec
import numpy as np

from coordinator.journal import Buffer, Journal, Record
from fedalgos import state as states
from fedalgos.space import ParamSpace
from protocol import payload
from protocol.errors import JournalError
from protocol.parts import TensorInfo
from protocol.payload import Flat, Payload, Spec

S = TypeVar("S")
Onto = Literal["previous", "initial", "nothing"]

REPLAY_SECONDS = 2.0  # of steps to apply, after which the parameters themselves are kept


@dataclass(frozen=True)
class Version:
    """What is remembered of every version: its round, what it took, its digest by tier."""

    round: int
    seconds: float
    digests: tuple[bytes, ...]


class Archive:
    """What the journal holds of one run's parameters."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._checkpoint = max(map(int, journal.names("x")), default=0)
        self._replay_seconds = 0.0  # of the steps since then
        self.steps = sorted(map(int, journal.names("step")))  # the versions whose step is kept

    # --- writing -----------------------------------------------------------------

    def begin(self, space: ParamSpace, x: Flat, first: Version) -> None:
        """The space, and version 0."""
        self._journal.keep("space", "", msgspec.msgpack.encode(space.tensors))
        self._journal.keep("x", "0", b"", [states.raw(x)])
        self._log(first)

    def add(self, number: int, version: Version, spec: Spec, data: Buffer) -> None:
        """The newest version, and the step that leads to it."""
        self._log(version)
        self._journal.keep("step", str(number), msgspec.msgpack.encode(spec), [data])
        self.steps.append(number)
        self._replay_seconds += version.seconds

    def keep_state(self, state: object) -> None:
        """The method's state, at the newest version."""
        plain, arrays = states.dump(state)
        self._journal.keep("state", "", plain, [states.raw(array) for array in arrays])

    def tidy(self, x: Flat, onto: Onto, oldest: int) -> None:
        """Forget what nobody will ask for; keep ``x`` instead of many steps.

        Args:
            x: the newest parameters.
            onto: what the method's steps go onto.
            oldest: the oldest version whose step a node may still be sent.
        """
        newest = self.steps[-1]
        if onto == "nothing" and newest == 1:
            self._journal.drop("x", "0")
        if onto == "previous" and self._replay_seconds > REPLAY_SECONDS:
            self._journal.drop("x", str(self._checkpoint))
            self._journal.keep("x", str(newest), b"", [states.raw(x)])
            self._checkpoint, self._replay_seconds = newest, 0.0
        if onto == "previous":
            oldest = min(oldest, self._checkpoint + 1)
        while self.steps[0] < min(oldest, newest):
            self._journal.drop("step", str(self.steps.pop(0)))

    def _log(self, version: Version) -> None:
        self._journal.log("version", msgspec.json.encode(version).decode())

    # --- reading -----------------------------------------------------------------

    def space(self) -> ParamSpace | None:
        """The parameter space, or None before there is one."""
        record = self._journal.record("space", "")
        if record is None:
            return None
        return ParamSpace.of(msgspec.msgpack.decode(record.plain, type=tuple[TensorInfo, ...]))

    def versions(self) -> list[Version]:
        """Of every version, from 0."""
        return [msgspec.json.decode(s, type=Version) for s in self._journal.logged("version")]

    def checkpoint(self, size: int) -> tuple[int, Flat]:
        """The version that is kept whole, and its parameters; zeros if steps need none."""
        if not self._journal.names("x"):
            return 0, np.zeros(size, np.float32)
        record = self._read("x", str(self._checkpoint))
        return self._checkpoint, np.frombuffer(record.buffers[0], "<f4")

    def step(self, number: int) -> Payload:
        """The step that leads to a version."""
        record = self._read("step", str(number))
        return payload.decode(msgspec.msgpack.decode(record.plain, type=Spec), record.buffers[0])

    def state(self, kind: type[S]) -> S:
        """The method's state."""
        record = self._read("state", "")
        return states.load(record.plain, record.buffers, kind)

    def _read(self, kind: str, name: str) -> Record:
        record = self._journal.record(kind, name)
        if record is None:
            raise JournalError(f"the journal has no {kind} {name}: restore it from a copy")
        return record
