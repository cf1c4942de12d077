"""Steps too large to be sent unasked: announced to each node, and kept once for all to pull."""

from __future__ import annotations

import msgspec

from coordinator.history import Kept
from coordinator.roster import Member
from protocol.blobs import Outbox
from protocol.messages import Chunk, Pull, Step
from protocol.wire import RemoteProtocolError


class Offers:
    """The blobs that nodes may pull, and how much of each."""

    def __init__(self) -> None:
        self._outbox = Outbox()
        self._blobs: dict[tuple[int, bool, int], int] = {}  # by version, snapshot, tier
        self._steps: dict[int, Step] = {}  # by blob

    def step(self, blob: int) -> Step | None:
        """What is offered as this blob."""
        return self._steps.get(blob)

    def announce(self, member: Member, kept: Kept) -> Step:
        """The message that a node is to be sent; it may pull the whole once more."""
        key = (kept.message.version, kept.message.snapshot, kept.tier)
        if key not in self._blobs:
            self._blobs[key] = blob = self._outbox.put(kept.data)
            self._steps[blob] = kept.message
        blob, pulls = self._blobs[key], member.allowance.pulls
        pulls[blob] = pulls.get(blob, 0) + len(kept.data)
        return msgspec.structs.replace(kept.message, blob=blob)

    def answer(self, member: Member, pull: Pull) -> tuple[Chunk, memoryview | None]:
        """The chunk that a node asks for.

        Raises:
            RemoteProtocolError: there is no such range, or it has pulled what it was offered.
        """
        chunk, data = self._outbox.answer(pull)
        if data is not None:
            left = member.allowance.pulls.get(pull.blob, 0) - pull.nbytes
            if left < 0:
                raise RemoteProtocolError(f"more of blob {pull.blob} than was offered")
            member.allowance.pulls[pull.blob] = left
        return chunk, data

    def withdraw(self, oldest: int, current: int) -> None:
        """Stop offering steps before ``oldest``, and snapshots before ``current``.

        The initial parameters stay: they do not age where steps go onto them.  A node that
        is still pulling one is told that it is gone, and asks anew.
        """
        gone = [
            (version, snapshot, tier)
            for version, snapshot, tier in self._blobs
            if version < (current if snapshot else oldest) and (version, snapshot) != (0, True)
        ]
        for key in gone:
            blob = self._blobs.pop(key)
            self._outbox.drop(blob)
            del self._steps[blob]
