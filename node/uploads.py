"""How long updates are on their way: from their first frame until the coordinator has the last.

That it has it its kernel says, by acknowledging it; so only this machine's clock is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

LOOK_SECONDS = 0.005  # to the first look; a look costs a system call
WORTH_SECONDS = 0.05  # its bytes in a message
SHARE = 0.05  # of what an upload has taken so far, between two looks at it


class Line(Protocol):
    """What is needed of ``protocol.dealer.Dealer``."""

    sent_bytes: int

    def acked_bytes(self) -> int | None: ...


class Held(Protocol):
    """What is needed of ``protocol.blobs.Outbox``."""

    def holds(self, blob: int) -> bool: ...


@dataclass
class _Upload:
    since: float
    blob: int | None
    end: int | None = None  # of the connection's bytes, its own last; None until all is sent


class Uploads:
    """The updates that are on their way, and what those took that have arrived.

    Args:
        clock: a monotonic one.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pending: list[_Upload] = []
        self._seconds = 0.0

    def began(self, at: float, blob: int | None) -> None:
        """An update was sent, or, of a larger one, that it may be pulled."""
        self._pending.append(_Upload(at, blob))

    def look(self, line: Line, outbox: Held) -> None:
        """Note what has arrived."""
        if not self._pending:
            return
        for upload in self._pending:
            if upload.end is None and (upload.blob is None or not outbox.holds(upload.blob)):
                upload.end = line.sent_bytes
        acked = line.acked_bytes()
        if acked is None:  # nobody says it here
            self.forget()
            return
        now = self._clock()
        done = [u for u in self._pending if u.end is not None and u.end <= acked]
        if done:
            self._pending = [u for u in self._pending if u not in done]
            self._seconds += sum(now - u.since for u in done)

    def next_look(self) -> float:
        """When it is time for one."""
        sent = [u.since for u in self._pending if u.end is not None]
        if not sent:
            return math.inf  # what is still being pulled is looked at when the pulls come
        now = self._clock()
        return now + max(LOOK_SECONDS, SHARE * (now - max(sent)))

    def withdraw(self, blob: int) -> None:
        """Nobody has pulled it all, nor will."""
        self._pending = [u for u in self._pending if u.blob != blob or u.end is not None]

    def forget(self) -> None:
        """The connection is gone, and what was on it is asked for again."""
        self._pending = []

    def take(self) -> float | None:
        """The seconds of those that have arrived, which are then forgotten; None if too few yet."""
        if self._seconds < WORTH_SECONDS:
            return None
        seconds, self._seconds = self._seconds, 0.0
        return seconds
