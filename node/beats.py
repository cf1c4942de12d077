"""What the beats of a node say: what is news, as beats are most of a scalar method's bytes."""

from __future__ import annotations

import math

from protocol.messages import Beat
from protocol.parts import Progress

PROGRESS_SECONDS = 10.0  # between two beats that say how far one task is


class Beats:
    """The beats since a login, or since ``ready``.

    Args:
        known: what the coordinator takes the node to be doing, without a word.
    """

    def __init__(self, known: str) -> None:
        self._told, self._told_at = known, -math.inf

    def next(self, busy: str, progress: Progress | None, now: float) -> Beat:
        """The beat of a node that does ``busy`` and is so far; ``now`` in seconds."""
        is_due = progress is not None and now >= self._told_at + PROGRESS_SECONDS
        if busy == self._told and not is_due:
            return Beat()
        self._told, self._told_at = busy, now
        return Beat(busy=busy, progress=progress)
