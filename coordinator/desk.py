"""The desk where nodes log in: frames in, whole messages out, every byte accounted.

It knows connections and logins, chunked transfer and heartbeats; it knows nothing of
rounds or methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from coordinator import limits
from coordinator.guard import Guard
from coordinator.history import Kept
from coordinator.limits import Bucket, Recent
from coordinator.roster import Member, Roster
from protocol import meter, tcp
from protocol.blobs import INLINE_BYTES, Inbox, Outbox
from protocol.experiment import Nodes
from protocol.messages import (
    Beat,
    Bye,
    Carrier,
    Chunk,
    Enroll,
    Enrolled,
    Hello,
    Pull,
    Refuse,
    ToCoordinator,
    ToNode,
    to_coordinator,
    to_node,
)
from protocol.wire import Frame, Peer, RemoteProtocolError, VersionError

log = logging.getLogger(__name__)

MAX_PARAMETER_BYTES = 1 << 36  # what an evaluator may bring
SETTLE_SECONDS = 0.1  # from a closed connection to when sending on it is sure to fail


class Transport(Protocol):
    """What the desk needs of a ROUTER; tests put a scripted network here."""

    @property
    def mechanism(self) -> meter.Mechanism: ...
    def recv(self, within_seconds: float) -> tuple[Peer, list[bytes]] | None: ...
    def send(self, peer: Peer, frames: list[Frame]) -> bool: ...
    def watch(self, peer: Peer, owner: str) -> None: ...
    def grown(self) -> list[tcp.Growth]: ...
    def lost_one(self) -> bool: ...
    def is_drained(self) -> bool: ...
    def cut(self, peer: Peer) -> None: ...


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
        self.roster, self._guard = roster, guard or Guard(None)
        self.meter = meter.Meter(transport.mechanism)
        self.max_payload_bytes = 0
        self.wants: Callable[[Member, Carrier], bool] = lambda member, message: True
        self._transport, self._nodes, self._now = transport, nodes, now
        self._outbox, self._inbox = Outbox(), Inbox[Carrier](now)
        self._offered: dict[tuple[int, bool, int], int] = {}  # version, snapshot, tier -> blob
        self._kinds: dict[int, meter.Kind] = {}  # what our own blobs are accounted as
        # connections whose handshake is counted
        self._greeted = Recent[Peer, bool](bool, limits.MAX_STRANGERS)
        # what was said on a connection while nobody was logged in on it: whose it is its next
        # login says, and the kernel counts a connection from its beginning
        self._unowned = Recent[Peer, meter.Meter](
            lambda: meter.Meter(transport.mechanism), limits.MAX_STRANGERS
        )
        self._unreachable: dict[Peer, Member] = {}
        self._strangers = Recent[Peer, Bucket](limits.stranger, limits.MAX_STRANGERS)
        self._logins = Recent[str, Bucket](limits.login, limits.MAX_STRANGERS)
        self._barred: dict[str, tuple[float, str]] = {}  # key or name -> until when, and why
        self._last_turn = now()
        self._beat_at = self._last_turn + nodes.heartbeat_seconds

    def receive(self, within_seconds: float) -> Iterator[Arrival]:
        """Wait for a message and say what arrived with it, if anything is complete.

        Messages that come to nothing, or to a breach, are gone through many at a time: who
        sends such must not be able to make a queue of them.
        """
        for _ in range(limits.VAIN_AT_A_TIME):
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
            self._count_up(peer, None, frames, None)
            if member is None:
                self._transport.cut(peer)
            yield Breach(None, why) if member is None else TooMuch(member, why)
            return
        try:
            if not self._guard.is_open and self._guard.name_of(peer.key) is None:
                self._enroll(peer, frames)
                return
            message, buffer = self._unpack(peer, frames)
            if isinstance(message, Hello):
                yield from self._login(peer, message)
                return
            if member is None:
                self._refuse(peer, Refuse(code="login", reason="log in first"))
                return
            member.seen = self._now()
            yield from self._sort(member, message, buffer)
        except VersionError as error:
            reason = f"{error}: install the same seedwire on both"
            self._refuse(peer, Refuse(code="version", reason=reason))
        except (RemoteProtocolError, MemoryError) as error:
            yield Breach(self.roster.at(peer), str(error))

    def _unpack(self, peer: Peer, frames: list[bytes]) -> tuple[ToCoordinator, Frame | None]:
        """A message; counted, and so is what is none."""
        try:
            message, buffer = to_coordinator.unpack(frames)
        except (RemoteProtocolError, MemoryError):
            self._count_up(peer, None, frames, None)
            raise
        self._count_up(peer, message, frames, buffer)
        return message, buffer

    def _beyond(self, peer: Peer, member: Member | None, frames: list[bytes]) -> str | None:
        """Which limit a message is beyond, or None; a stranger's have to be few and small."""
        now, nbytes = self._now(), sum(map(len, frames))
        if member is not None:
            is_due = self._inbox.is_due(peer, len(frames[-1]) if frames else 0)
            return member.allowance.exceeded(now, 0 if is_due else nbytes)
        if not self._strangers[peer].take(now):
            return "a connection that is not logged in says too much"
        return "too large for a login" if nbytes > limits.MAX_HELLO_BYTES else None

    def _enroll(self, peer: Peer, frames: list[bytes]) -> None:
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
            self._refuse(peer, Refuse(code="key", reason=f"not enrolled: {why}"))

    def _login(self, peer: Peer, hello: Hello) -> Iterator[Arrival]:
        now, who = self._now(), peer.key or hello.node
        refusal = self._guard.fault_of(peer.key, hello)
        if refusal is None and self.roster.is_overtaken(hello):
            return
        until, why = self._barred.get(who, (now, ""))
        refusal = refusal or self.roster.refuse(hello)
        if until > now:
            refusal = Refuse(code="breach", reason=f"barred for another {until - now:.0f} s: {why}")
        elif not self._logins[who].take(now):
            raise RemoteProtocolError(f"node {hello.node} logs in too often")
        if refusal is not None:
            log.warning("refused: %s", refusal.reason)
            self._refuse(peer, refusal)
            return
        member, old = self.roster.admit(hello, peer, self._now())
        if old is not None:
            self._inbox.forget(old.peer)
        if old is not None and old.peer != peer:
            reason = f"node {hello.node} logged in again from elsewhere"
            self._refuse(old.peer, Refuse(code="superseded", reason=reason), hello.node)
        self._transport.watch(peer, hello.node)
        if peer not in self._greeted:
            self.meter.connected(hello.node)
        self._greeted[peer]  # once more, so that it stays there
        self.meter.add(hello.node, self._unowned.pop(peer))
        yield LoggedIn(member, old)

    def _sort(
        self, member: Member, message: ToCoordinator, buffer: Frame | None
    ) -> Iterator[Arrival]:
        """Keep transfers to ourselves; pass on what is whole."""
        match message:
            case Pull():
                chunk, data = self._outbox.answer(message)
                if data is not None:
                    self._spend(member, message)
                self.send(member, chunk, data)
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
        kind = meter.kind_of(message)
        if isinstance(message, Chunk):
            kind = self._kinds.get(message.blob, kind)
        elif isinstance(message, Pull):
            kind = self._arriving_kind(member, message.blob)
        if self._transport.send(member.peer, frames):
            key = meter.Key(member.name, "down", kind)
            self.meter.count(key, frames, meter.payload_bytes(message, buffer))
        else:
            self._unreachable[member.peer] = member

    def offer(self, member: Member, kept: Kept) -> None:
        """Send a step, or announce it to be pulled when it is large."""
        if len(kept.data) <= INLINE_BYTES:
            self.send(member, kept.message, kept.data)
            return
        key = (kept.message.version, kept.message.snapshot, kept.tier)
        if key not in self._offered:
            self._offered[key] = blob = self._outbox.put(kept.data)
            self._kinds[blob] = meter.kind_of(kept.message)
        blob, pulls = self._offered[key], member.allowance.pulls
        pulls[blob] = pulls.get(blob, 0) + len(kept.data)
        self.send(member, msgspec.structs.replace(kept.message, blob=blob))

    def _spend(self, member: Member, pull: Pull) -> None:
        """A node may pull as much of a blob as it was offered, and no more."""
        left = member.allowance.pulls.get(pull.blob, 0) - pull.nbytes
        if left < 0:
            raise RemoteProtocolError(f"more of blob {pull.blob} than was offered")
        member.allowance.pulls[pull.blob] = left

    def withdraw(self, oldest: int, current: int) -> None:
        """Stop offering steps before ``oldest``, and snapshots before ``current``.

        The initial parameters stay: they do not age where steps go onto them.  A node that
        is still pulling one is told that it is gone, and asks anew.
        """
        gone = [
            (version, snapshot, tier)
            for version, snapshot, tier in self._offered
            if version < (current if snapshot else oldest) and (version, snapshot) != (0, True)
        ]
        for key in gone:
            blob = self._offered.pop(key)
            self._outbox.drop(blob)
            del self._kinds[blob]

    def strike(self, member: Member) -> str | None:
        """Hold a breach against a node; says so when it was one too many."""
        is_spared = member.allowance.breaches.take(self._now())
        return None if is_spared else "too many bad messages"

    def expel(self, member: Member, reason: str) -> None:
        """Turn a node away, for a while; the caller drops it."""
        now = self._now()
        barred = [(name, kept) for name, kept in self._barred.items() if kept[0] > now]
        self._barred = dict(barred[-limits.MAX_STRANGERS :])
        self._barred[member.peer.key or member.name] = (now + limits.BARRED_SECONDS, reason)
        self._refuse(member.peer, Refuse(code="breach", reason=reason), member.name)

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
        gone |= dict.fromkeys(self._revoked(), "its key was revoked")
        self._unreachable = {}
        return [(member, gone[member.peer]) for member in self.roster if member.peer in gone]

    def _revoked(self) -> list[Peer]:
        """Connections whose key is no longer admitted, cut."""
        self._guard.reread()
        if self._guard.is_open:
            return []
        found = [m.peer for m in self.roster if self._guard.name_of(m.peer.key) != m.name]
        for peer in found:
            self._transport.cut(peer)
        return found

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

    def _refuse(self, peer: Peer, refusal: Refuse, node: str = "") -> None:
        frames = to_node.pack(refusal)
        if self._transport.send(peer, frames):
            account = self.meter if node else self._unowned[peer]
            account.count(meter.Key(node, "down", "control"), frames, 0)

    def _count_up(
        self, peer: Peer, message: ToCoordinator | None, frames: list[bytes], buffer: Frame | None
    ) -> None:
        """Count what came in; without a message it was none."""
        member = self.roster.at(peer)
        account, name = (self._unowned[peer], "") if member is None else (self.meter, member.name)
        kind: meter.Kind = "control" if message is None else meter.kind_of(message)
        if member is not None and isinstance(message, Chunk):
            kind = self._arriving_kind(member, message.blob)
        elif isinstance(message, Pull):
            kind = self._kinds.get(message.blob, kind)
        payload = 0 if message is None else meter.payload_bytes(message, buffer)
        account.count(meter.Key(name, "up", kind), frames, payload)

    def _arriving_kind(self, member: Member, blob: int) -> meter.Kind:
        item = self._inbox.expects(member.peer, blob)
        return "control" if item is None else meter.kind_of(item)
