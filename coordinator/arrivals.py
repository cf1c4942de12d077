"""What the desk says of what came in."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.roster import Member
from protocol.messages import ToCoordinator
from protocol.wire import Frame


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A node came in; ``superseded`` is its earlier login, which is over."""

    member: Member
    superseded: Member | None


@dataclass(frozen=True, slots=True)
class Delivered:
    """A whole message; ``data`` is its payload's buffer, pulled if need be."""

    member: Member
    message: ToCoordinator
    data: Frame | None


@dataclass(frozen=True, slots=True)
class Breach:
    """Somebody broke the protocol; the message was dropped."""

    member: Member | None
    why: str


@dataclass(frozen=True, slots=True)
class TooMuch:
    """A node went past a limit that none needs to; ``why`` says which, up to a colon."""

    member: Member
    why: str


Arrival = LoggedIn | Delivered | Breach | TooMuch
