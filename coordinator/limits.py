"""What one peer may do to a coordinator: how often, how much, and how often wrong.

Plain arithmetic with the clock passed in.  The numbers are far above what any node that
keeps to the protocol needs: it speaks when it was asked to, and beats.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MESSAGES_PER_SECOND, MESSAGES_AT_ONCE = 1000.0, 10_000.0
BYTES_PER_SECOND, BYTES_AT_ONCE = float(1 << 26), float(1 << 29)  # chunks asked for are extra
BREACHES_PER_SECOND, BREACHES_AT_ONCE = 0.1, 20.0
RESYNCS_PER_SECOND, RESYNCS_AT_ONCE = 0.2, 20.0
STRANGER_PER_SECOND, STRANGER_AT_ONCE = 2.0, 10.0
LOGINS_PER_SECOND, LOGINS_AT_ONCE = 0.5, 20.0
BARRED_SECONDS = 60.0
VAIN_AT_A_TIME = 64  # messages that come to nothing, between two looks at the clock
MAX_HELLO_BYTES = 1 << 17  # 8192 clients and three texts are less
MAX_STRANGERS = 1024  # connections that are not logged in and are kept account of
MAX_GONE = 256  # nodes that were here and are kept account of one by one
MAX_REASONS = 64  # for which things were rejected, likewise

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class Bucket:
    """A token bucket: ``most`` tokens at once, and ``rate`` more each second."""

    rate: float
    most: float
    left: float = field(init=False)
    _at: float | None = None

    def __post_init__(self) -> None:
        self.left = self.most

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Whether there were so many tokens; a clock that goes back gives none."""
        if self._at is not None and now > self._at:
            self.left = min(self.most, self.left + self.rate * (now - self._at))
        self._at = now if self._at is None else max(now, self._at)
        if self.left < amount:
            return False
        self.left -= amount
        return True


@dataclass
class Allowance:
    """What one login may still do."""

    messages: Bucket = field(default_factory=lambda: Bucket(MESSAGES_PER_SECOND, MESSAGES_AT_ONCE))
    nbytes: Bucket = field(default_factory=lambda: Bucket(BYTES_PER_SECOND, BYTES_AT_ONCE))
    breaches: Bucket = field(default_factory=lambda: Bucket(BREACHES_PER_SECOND, BREACHES_AT_ONCE))
    resyncs: Bucket = field(default_factory=lambda: Bucket(RESYNCS_PER_SECOND, RESYNCS_AT_ONCE))
    pulls: dict[int, int] = field(default_factory=dict)  # blob -> bytes that may be pulled
    asked: int = 0  # tasks it was given
    answers: int = 0  # updates and failures that it sent

    def exceeded(self, now: float, nbytes: int) -> str | None:
        """Account for a message that came in; says why it is one too many, or None."""
        if not self.messages.take(now):
            return "too many messages"
        return None if self.nbytes.take(now, nbytes) else "too many bytes"


def stranger() -> Bucket:
    """For the messages of one connection that is not logged in."""
    return Bucket(STRANGER_PER_SECOND, STRANGER_AT_ONCE)


def login() -> Bucket:
    """For the logins of one node."""
    return Bucket(LOGINS_PER_SECOND, LOGINS_AT_ONCE)


class Recent(Generic[K, V]):
    """A table of what was used last, of bounded size."""

    def __init__(self, make: Callable[[], V], most: int) -> None:
        self._make, self._most = make, most
        self._table: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: K) -> bool:
        return key in self._table

    def __getitem__(self, key: K) -> V:
        self._table[key] = value = self.pop(key)
        if len(self._table) > self._most:
            self._table.popitem(last=False)
        return value

    def pop(self, key: K) -> V:
        """Take one out; a new one if it is not there."""
        return self._table.pop(key) if key in self._table else self._make()


class Quiet(logging.Filter):
    """Lets a kind of line through often enough to be seen, and says how many it left out.

    A kind is a logger and a text before its arguments; so a peer that misbehaves a million
    times cannot fill a disk.
    """

    def __init__(self, now: Callable[[], float], rate: float = 1.0, at_once: float = 50.0) -> None:
        super().__init__()
        self._now = now
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._left_out: dict[tuple[str, str], int] = {}
        self._rate, self._at_once = rate, at_once

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, str(record.msg))
        bucket = self._buckets.setdefault(kind, Bucket(self._rate, self._at_once))
        if not bucket.take(self._now()):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if left_out := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} (and {left_out} like it, left out)"
        return True
