"""What can go wrong, and the script of a test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL: nothing is closed in order, nothing is written any more."""


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGSTOP, and SIGCONT after a while: a machine that swaps, or sleeps."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is closed, both ways at once; a new one is let through."""


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """What is sent gets lost without a word; both ends think that they are connected."""


@dataclass(frozen=True, slots=True)
class Partition:
    """As ``HalfOpen``, and no new connection comes about until the time is over."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """The process stands still until another has been at a phase so often in the same round."""

    who: str
    phase: str
    times: int


@dataclass(frozen=True, slots=True)
class Slow:
    """The link carries so much and no more from now on."""

    bytes_per_second: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """The connection ends in the middle of what is sent next."""


@dataclass(frozen=True, slots=True)
class BitFlip:
    """One bit of what is sent next arrives as the other."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The message of this phase is sent twice."""


@dataclass(frozen=True, slots=True)
class Reorder:
    """The message of this phase is sent after the one that follows it."""


@dataclass(frozen=True, slots=True)
class Poison:
    """The update of this phase carries NaN."""


@dataclass(frozen=True, slots=True)
class Jump:
    """The wall clock of the process is so many seconds off from now on."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hoard:
    """The process takes so much memory, and keeps it."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Miscount:
    """The coordinator counts each frame so many bytes too long from now on."""

    nbytes: int


Act = (
    Kill
    | Stop
    | Cut
    | HalfOpen
    | Partition
    | Hold
    | Slow
    | Truncate
    | BitFlip
    | Duplicate
    | Reorder
    | Poison
    | Jump
    | Hoard
    | Miscount
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script; each strikes once.

    Attributes:
        who: the process: "coordinator", "evaluator", "node-0", ...
        phase: where in its work, e.g. "send update", "sent update", "got task", "train",
            "commit"; the message names are those of the wire.
        act: what happens then.
        round: the one in work there, or None for any.
        nth: how many times the phase must have come up, in that round if there is one.
    """

    who: str
    phase: str
    act: Act
    round: int | None = None
    nth: int = 1


@dataclass(frozen=True, slots=True)
class Moment:
    """A process at a phase of its work."""

    who: str
    pid: int
    round: int
    phase: str
    at: float  # ``time.monotonic`` of this machine

    def meets(self, fault: Fault) -> bool:
        """Whether this is where a fault strikes."""
        is_there = (self.who, self.phase) == (fault.who, fault.phase)
        return is_there and fault.round in (None, self.round)


# In each of three rounds node-2, half of whose update has left, waits until the coordinator has all
# others: if they had to wait for it, the run would not end, however busy the machine is.
HELD = [
    Fault("node-2", "send chunk", Hold("coordinator", "has update", 4), number, nth=2)
    for number in (1, 2, 3)
]
