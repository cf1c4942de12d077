"""The steps a node may still need, and the cheaper of those and a snapshot."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import msgspec

from protocol.messages import Step


@dataclass(frozen=True)
class Kept:
    """A step as it goes out; ``data`` is its payload's buffer."""

    message: Step
    data: memoryview

    @cached_property
    def nbytes(self) -> int:
        """What it costs to send: of a few scalars the body is the larger part."""
        return len(msgspec.msgpack.encode(self.message)) + len(self.data)


class History:
    """Keeps steps as long as a node that lacks them all is cheaper off than with a snapshot.

    Args:
        snapshot_bytes: what the whole parameters cost to send.
        absolute: each step replaces the parameters, so the newest one always suffices.
    """

    def __init__(self, snapshot_bytes: int, absolute: bool) -> None:
        self._snapshot_bytes = snapshot_bytes
        self._absolute = absolute
        self._steps: deque[Kept] = deque()

    def add(self, step: Kept) -> None:
        """Append the newest step, and forget those that nobody will be sent any more."""
        self._steps.append(step)
        while len(self._steps) > 1 and (self._absolute or self._nbytes() > self._snapshot_bytes):
            self._steps.popleft()

    @property
    def oldest(self) -> int:
        """The version of the oldest step kept, 0 before the first."""
        return self._steps[0].message.version if self._steps else 0

    def since(self, version: int) -> list[Kept] | None:
        """What brings a node from ``version`` to the newest, or None: send a snapshot.

        A negative version stands for parameters that are of no use.
        """
        newest = self._steps[-1].message.version if self._steps else 0
        if version >= newest:
            return []
        if self._absolute and self._steps:
            return [self._steps[-1]]
        missed = [kept for kept in self._steps if kept.message.version > version]
        if not missed or missed[0].message.version != version + 1:
            return None
        cost = sum(kept.nbytes for kept in missed)
        return missed if cost <= self._snapshot_bytes else None

    def _nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._steps)
