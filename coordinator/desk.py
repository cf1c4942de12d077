"""The desk where nodes log in: frames in, whole messages out, every byte accounted.

It knows connections and logins, chunked transfer and heartbeats; it knows nothing of
rounds or methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from coordinator import door
from coordinator.arrivals import Arrival, Breach, Delivered, TooMuch
from coordinator.door import Door
from coordinator.guard import Guard
from coordinator.history import Kept
from coordinator.limits import VAIN_AT_A_TIME
from coordinator.offers import Offers
from coordinator.roster import Member, Roster
from coordinator.tally import Tally
from protocol import tcp
from protocol.blobs import INLINE_BYTES, Inbox
from protocol.channel import to_coordinator, to_node
from protocol.experiment import Nodes
from protocol.messages import Beat, Bye, Carrier, Chunk, Hello, Pull, Refuse, ToCoordinator, ToNode
from protocol.meter import Mechanism
from protocol.wire import Frame, Peer, RemoteProtocolError, VersionError

MAX_PARAMETER_BYTES = 1 << 36  # what an evaluator may bring
SETTLE_SECONDS = 0.1  # from a closed connection to when sending on it is sure to fail


class Transport(door.Transport, Protocol):
    """What the desk needs of a ROUTER; tests put a scripted network here."""

    @property
    def mechanism(self) -> Mechanism: ...
    def recv(self, within_seconds: float) -> tuple[Peer, list[bytes]] | None: ...
    def grown(self) -> list[tcp.Growth]: ...
    def lost_one(self) -> bool: ...
    def is_drained(self) -> bool: ...


class Desk:
    """All connections of a run.

    Args:
        transport: the ROUTER.
        roster: who may log in and who has.
        nodes: heartbeat and patience.
        now: a monotonic clock.
        guard: whose keys are admitted; without one nobody needs any.

    Attributes:
        max_payload_bytes: a larger one of a training node is a breach; 0 until the
            parameters are known.
        wants: whether a payload is worth pulling; the message is delivered without it if not.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        nodes: Nodes,
        now: Callable[[], float],
        guard: Guard | None = None,
    ) -> None:
        self.roster = roster
        self.max_payload_bytes = 0
        self.wants: Callable[[Member, Carrier], bool] = lambda member, message: True
        self._transport, self._nodes, self._now = transport, nodes, now
        self._offers, self._inbox = Offers(), Inbox[Carrier](now)
        self._tally = Tally(transport.mechanism, self._offers.step, self._inbox.expects)
        self.meter = self._tally.meter
        self._door = Door(transport, roster, guard or Guard(None), self._tally, now)
        self._unreachable: dict[Peer, Member] = {}
        self._last_turn = now()
        self._beat_at = self._last_turn + nodes.heartbeat_seconds

    def receive(self, within_seconds: float) -> Iterator[Arrival]:
        """Wait for a message and say what arrived with it, if anything is complete.

        Messages that come to nothing, or to a breach, are gone through many at a time: who
        sends such must not be able to make a queue of them.
        """
        for _ in range(VAIN_AT_A_TIME):
            got = self._transport.recv(within_seconds)
            if got is None:
                return
            is_vain = True
            for arrival in self._take(*got):
                is_vain &= isinstance(arrival, Breach)
                yield arrival
            if not is_vain:
                return
            within_seconds = 0.0

    def _take(self, peer: Peer, frames: list[bytes]) -> Iterator[Arrival]:
        member = self.roster.at(peer)
        why = self._beyond(peer, member, frames)
        if why is not None:  # found before any of it is read
            self._tally.came(peer, member, frames)
            if member is None:
                self._transport.cut(peer)
            yield Breach(None, why) if member is None else TooMuch(member, why)
            return
        try:
            if not self._door.is_enrolled(peer):
                self._door.enroll(peer, frames)
                return
            message, buffer = self._unpack(peer, member, frames)
            if isinstance(message, Hello):
                yield from self._log_in(peer, message)
                return
            if member is None:
                self._door.refuse(peer, Refuse(code="login", reason="log in first"))
                return
            member.seen = self._now()
            yield from self._sort(member, message, buffer)
        except VersionError as error:
            reason = f"{error}: install the same seedwire on both"
            self._door.refuse(peer, Refuse(code="version", reason=reason))
        except (RemoteProtocolError, MemoryError) as error:
            yield Breach(self.roster.at(peer), str(error))

    def _unpack(
        self, peer: Peer, member: Member | None, frames: list[bytes]
    ) -> tuple[ToCoordinator, Frame | None]:
        """A message; counted, and so is what is none."""
        try:
            message, buffer = to_coordinator.unpack(frames)
        except (RemoteProtocolError, MemoryError):
            self._tally.came(peer, member, frames)
            raise
        self._tally.came(peer, member, frames, message, buffer)
        return message, buffer

    def _beyond(self, peer: Peer, member: Member | None, frames: list[bytes]) -> str | None:
        """Which limit a message is beyond, or None; a stranger's have to be few and small."""
        nbytes = sum(map(len, frames))
        if member is None:
            return self._door.exceeded(peer, nbytes)
        is_due = self._inbox.is_due(peer, len(frames[-1]) if frames else 0)
        return member.allowance.exceeded(self._now(), 0 if is_due else nbytes)

    def _log_in(self, peer: Peer, hello: Hello) -> Iterator[Arrival]:
        arrival = self._door.log_in(peer, hello)
        if arrival is not None:
            if arrival.superseded is not None:
                self._inbox.forget(arrival.superseded.peer)
            yield arrival

    def _sort(
        self, member: Member, message: ToCoordinator, buffer: Frame | None
    ) -> Iterator[Arrival]:
        """Keep transfers to ourselves; pass on what is whole."""
        match message:
            case Pull():
                self.send(member, *self._offers.answer(member, message))
            case Chunk():
                pulls, arrived = self._inbox.take(member.peer, message, buffer)
                for pull in pulls:
                    self.send(member, pull)
                if arrived is not None and arrived.data is None:
                    raise RemoteProtocolError(f"blob {message.blob} is gone")
                if arrived is not None:
                    yield Delivered(member, arrived.item, arrived.data)  # type: ignore[arg-type]
            case Carrier(payload=payload, blob=int(blob)) if payload is not None:
                limit = self.max_payload_bytes if member.trains else MAX_PARAMETER_BYTES
                is_flood = self._inbox.count(member.peer) > len(member.hello.clients)
                if payload.nbytes > limit or is_flood:
                    raise RemoteProtocolError(f"a payload of {payload.nbytes} bytes")
                if not self.wants(member, message):
                    yield Delivered(member, message, None)
                    return
                for pull in self._inbox.open(member.peer, blob, payload.nbytes, message):
                    self.send(member, pull)
            case _:
                yield Delivered(member, message, buffer)

    def send(self, member: Member, message: ToNode, buffer: Frame | None = None) -> None:
        """Send one message; a node that cannot be reached is reported by ``keep_alive``."""
        frames = to_node.pack(message, buffer)
        if self._transport.send(member.peer, frames):
            self._tally.sent(member, frames, message, buffer)
        else:
            self._unreachable[member.peer] = member

    def offer(self, member: Member, kept: Kept) -> None:
        """Send a step, or announce it to be pulled when it is large."""
        if len(kept.data) <= INLINE_BYTES:
            self.send(member, kept.message, kept.data)
            return
        self.send(member, self._offers.announce(member, kept))

    def withdraw(self, oldest: int, current: int) -> None:
        """Stop offering steps before ``oldest``, and snapshots before ``current``."""
        self._offers.withdraw(oldest, current)

    def strike(self, member: Member) -> str | None:
        """Hold a breach against a node; says so when it was one too many."""
        is_spared = member.allowance.breaches.take(self._now())
        return None if is_spared else "too many bad messages"

    def expel(self, member: Member, reason: str) -> None:
        """Turn a node away, for a while; the caller drops it."""
        self._door.expel(member, reason)

    def drop(self, member: Member) -> None:
        """Forget a node and what was on its way from it."""
        self._inbox.forget(member.peer)
        self.roster.drop(member)

    def keep_alive(self) -> list[tuple[Member, str]]:
        """Beat to everyone once an interval; returns who is gone, and why.

        When a connection is closed a beat goes out early: it fails for who was on it.
        """
        now, away = self._now(), self._now() - self._last_turn
        self._last_turn = now
        if away > self._nodes.heartbeat_seconds:
            for member in self.roster:
                member.seen = now  # it was we who were busy: their beats still wait in the queue
        if self._transport.lost_one():
            self._beat_at = min(self._beat_at, now + SETTLE_SECONDS)
        self.beat()
        silent = self.roster.silent(now, self._nodes.patience_seconds)
        gone = {member.peer: f"silent for {now - member.seen:.1f} s" for member in silent}
        gone |= dict.fromkeys(self._unreachable, "its connection was closed")
        gone |= dict.fromkeys(self._door.revoked(), "its key was revoked")
        self._unreachable = {}
        return [(member, gone[member.peer]) for member in self.roster if member.peer in gone]

    def beat(self) -> None:
        """Beat to everyone, if it is time."""
        if (now := self._now()) >= self._beat_at:
            self._beat_at = now + self._nodes.heartbeat_seconds
            self.measure()  # what has ended since is let go
            for member in self.roster:
                self.send(member, Beat())

    def measure(self) -> None:
        """Take what the kernel has counted of every node's connections."""
        for growth in self._transport.grown():
            self.meter.grown(growth)

    def idle(self) -> tuple[set[str], bool]:
        """Measure; nodes that everything sent has reached, and whether no message waits here."""
        self.measure()
        idle = {member.name for member in self.roster if member.is_idle}
        return idle, self._transport.is_drained()

    def dismiss(self, reason: str, finished: bool) -> None:
        """Say goodbye to everyone."""
        for member in self.roster:
            self.send(member, Bye(reason=reason, finished=finished))
