"""The door of the desk: enrolling, logging in, and being turned away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from coordinator.arrivals import LoggedIn
from coordinator.guard import Guard
from coordinator.roster import Member, Roster
from coordinator.strangers import Strangers
from coordinator.tally import Tally
from protocol.channel import to_coordinator, to_node
from protocol.messages import Enroll, Enrolled, Hello, Refuse
from protocol.wire import Frame, Peer

log = logging.getLogger(__name__)


class Transport(Protocol):
    """What is done to a connection by who stands at the door."""

    def send(self, peer: Peer, frames: list[Frame]) -> bool: ...
    def watch(self, peer: Peer, owner: str) -> None: ...
    def cut(self, peer: Peer) -> None: ...


class Door:
    """Who comes in.

    Args:
        transport: the ROUTER.
        roster: who may log in and who has.
        guard: whose keys are admitted.
        tally: of all bytes.
        now: a monotonic clock.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        guard: Guard,
        tally: Tally,
        now: Callable[[], float],
    ) -> None:
        self._transport, self._roster, self._guard = transport, roster, guard
        self._tally, self._now = tally, now
        self._strangers = Strangers(now)

    def exceeded(self, peer: Peer, nbytes: int) -> str | None:
        """Which limit a message of somebody who is not logged in is beyond, or None."""
        return self._strangers.exceeded(peer, nbytes)

    def is_enrolled(self, peer: Peer) -> bool:
        """Whether this key may log in, or none is needed."""
        return self._guard.is_open or self._guard.name_of(peer.key) is not None

    def enroll(self, peer: Peer, frames: list[bytes]) -> None:
        """Hear somebody who is not enrolled: by a token, or revoked since they connected."""
        who = peer.key[:16]
        if not self._guard.is_token(peer.key):
            self._guard.refuse("revoked key", who)
            self._transport.cut(peer)
            return
        message, _ = to_coordinator.unpack(frames)
        if not isinstance(message, Enroll):
            self._guard.refuse("not an enrolment", who)
            self._transport.cut(peer)
            return
        why = self._guard.redeem(peer.key, message.node, message.key.hex())
        if why is None:
            self._transport.send(peer, to_node.pack(Enrolled()))
        else:
            self._guard.refuse("enrolment", f"{message.node} ({why})")
            self.refuse(peer, Refuse(code="key", reason=f"not enrolled: {why}"))

    def log_in(self, peer: Peer, hello: Hello) -> LoggedIn | None:
        """Let a node in, or not; an earlier login of it is told that it is over.

        Raises:
            RemoteProtocolError: it tries too often to be answered.
        """
        fault = self._guard.fault_of(peer.key, hello)
        if fault is None and self._roster.is_overtaken(hello):
            return None
        barred = self._strangers.refusal(peer.key or hello.node, hello.node)
        refusal = barred or fault or self._roster.refuse(hello)
        if refusal is not None:
            log.warning("refused: %s", refusal.reason)
            self.refuse(peer, refusal)
            return None
        member, old = self._roster.admit(hello, peer, self._now())
        if old is not None and old.peer != peer:
            reason = f"node {hello.node} logged in again from elsewhere"
            self.refuse(old.peer, Refuse(code="superseded", reason=reason), hello.node)
        self._transport.watch(peer, hello.node)
        self._tally.logged_in(peer, hello.node)
        return LoggedIn(member, old)

    def refuse(self, peer: Peer, refusal: Refuse, node: str = "") -> None:
        """Say no; ``node`` is empty where nobody is logged in."""
        frames = to_node.pack(refusal)
        if self._transport.send(peer, frames):
            self._tally.refused(peer, node, frames)

    def expel(self, member: Member, reason: str) -> None:
        """Turn a node away, for a while."""
        self._strangers.bar(member.peer.key or member.name, reason)
        self.refuse(member.peer, Refuse(code="breach", reason=reason), member.name)

    def revoked(self) -> list[Peer]:
        """Connections of nodes whose key is no longer admitted, cut."""
        self._guard.reread()
        if self._guard.is_open:
            return []
        found = [m.peer for m in self._roster if self._guard.name_of(m.peer.key) != m.name]
        for peer in found:
            self._transport.cut(peer)
        return found
