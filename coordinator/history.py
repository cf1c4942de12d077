"""The steps a node may still need, and the cheaper of those and a snapshot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import msgspec

from protocol.messages import Step


@dataclass(frozen=True)
class Kept:
    """A step as it goes out.

    Attributes:
        message: without the payload's buffer.
        data: the payload's buffer.
        seconds: what it took the coordinator to apply it; a snapshot takes none.
        tier: of the nodes that it is for.
    """

    message: Step
    data: memoryview
    seconds: float = 0.0
    tier: int = 0

    @cached_property
    def nbytes(self) -> int:
        """What it costs to send: of a few scalars the body is the larger part."""
        return len(msgspec.msgpack.encode(self.message)) + len(self.data)


@dataclass(frozen=True)
class CatchUp:
    """How a node gets to the newest version, and what the two ways would cost.

    Attributes:
        kept: what it is sent.
        is_snapshot: the parameters themselves, not the missed steps.
        steps_nbytes: of the missed steps, None if they are not kept any more.
        steps_seconds: to apply them, by the coordinator's clock; None likewise.
        snapshot_nbytes: of a snapshot.
    """

    kept: tuple[Kept, ...]
    is_snapshot: bool
    steps_nbytes: int | None
    steps_seconds: float | None
    snapshot_nbytes: int


class History:
    """Keeps steps as long as a node that lacks them all is cheaper off than with a snapshot.

    Args:
        snapshot_bytes: what the whole parameters cost to send.
        absolute: each step replaces the parameters, so the newest one always suffices.
    """

    def __init__(self, snapshot_bytes: int, absolute: bool) -> None:
        self._snapshot_bytes = snapshot_bytes
        self._absolute = absolute
        self._steps: deque[Kept] = deque()  # of versions that follow each other
        self._nbytes = 0  # of them all

    def add(self, step: Kept) -> None:
        """Append the newest step, and forget those that nobody will be sent any more."""
        self._steps.append(step)
        self._nbytes += step.nbytes
        while len(self._steps) > 1 and (self._absolute or self._nbytes > self._snapshot_bytes):
            self._nbytes -= self._steps.popleft().nbytes

    @property
    def oldest(self) -> int:
        """The version of the oldest step kept, 0 before the first."""
        return self._steps[0].message.version if self._steps else 0

    def since(self, version: int, snapshot: Callable[[], Kept]) -> CatchUp:
        """What brings a node from ``version`` to the newest, in the fewest bytes.

        A negative version stands for parameters that are of no use.
        """
        missed = self._missed(version)
        if missed is None:
            return CatchUp((snapshot(),), True, None, None, self._snapshot_bytes)
        nbytes = sum(kept.nbytes for kept in missed)
        is_snapshot = nbytes > self._snapshot_bytes
        kept = (snapshot(),) if is_snapshot else tuple(missed)
        seconds = sum(kept.seconds for kept in missed)
        return CatchUp(kept, is_snapshot, nbytes, seconds, self._snapshot_bytes)

    def _missed(self, version: int) -> list[Kept] | None:
        """The steps that lead from ``version`` to the newest, if they are still kept."""
        newest = self._steps[-1].message.version if self._steps else 0
        if version >= newest:
            return []
        if self._absolute and self._steps:
            return [self._steps[-1]]
        if newest - version > len(self._steps):
            return None
        missed = list(islice(reversed(self._steps), newest - version))
        return missed[::-1]
