"""Sockets: one ROUTER at the coordinator, one DEALER at each node, frames in and out.

With keys every connection is encrypted and both ends are known to each other by their
public keys (CurveZMQ, RFC 26).  Nothing is decided here but what a failed handshake means.
The kernel's own byte counters (``protocol.tcp``) are read here, because only here it is
known which connection a message came by.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket as sockets
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import zmq

from protocol import tcp, zap
from protocol.errors import KeyRefusedError, NetworkError, RefusedError
from protocol.keys import Identity
from protocol.meter import HANDSHAKE, Mechanism, zmtp_bytes
from protocol.wire import MAX_BODY_BYTES, MAX_INLINE_BYTES, Frame, Peer

log = logging.getLogger(__name__)

LINGER_MS = 1000  # how long a close waits for a last goodbye to leave
HANDSHAKE_MS = 10_000
MAX_STRANGERS = 256  # connections that have not logged in; of more the oldest are closed
MAX_SKIPPED = 1000  # messages of connections that we have closed, before we look elsewhere
MAX_WAITING = 4  # messages of a connection that are here and not yet read; more stay in the kernel
SUSPICIOUS_FAILURES = 3  # of handshakes in a row; one may be a coordinator that is just ending
_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_COORDINATOR = b""  # a DEALER's one peer
_numbers = itertools.count()


class Doorkeeper(Protocol):
    """Who may connect to a coordinator, and what is told of those who may not."""

    @property
    def secret(self) -> bytes | None:
        """The coordinator's secret key, 32 bytes; None does without keys."""

    def admits(self, key: str, address: str) -> bool:
        """Whether the owner of this public key (hex) may connect; asked in another thread."""

    def turned_away(self, reason: str) -> None:
        """A handshake failed before there was a key to ask about."""


def _configure(socket: zmq.Socket[bytes], ipv6: bool) -> None:
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_BODY_BYTES, MAX_INLINE_BYTES))  # of a frame
    socket.setsockopt(zmq.IPV6, ipv6)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by credit instead: nothing is dropped in a burst


def _ready(within_seconds: float, *sources: zmq.Socket[bytes] | int) -> set[Any]:
    """Which of the sources have something to read, after waiting for any."""
    poller = zmq.Poller()
    for source in sources:
        poller.register(source, zmq.POLLIN)
    return {source for source, _ in poller.poll(max(0, round(within_seconds * 1000)))}


class _Monitor:
    """What happens to a socket's connections: failed handshakes, and their end.

    TCP says that a connection is closed long before a silence does.
    """

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        self._watched = watched
        address = f"inproc://events-{next(_numbers)}"
        watched.monitor(address, _FAILURES | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # a queue that is full would stop libzmq
        self.socket.connect(address)

    def take(self) -> Iterator[tuple[int, int]]:
        """Events and their values, as far as they are here."""
        with contextlib.suppress(zmq.Again):
            while True:
                event, _ = self.socket.recv_multipart(zmq.NOBLOCK)
                yield struct.unpack("=Hi", event)

    def close(self) -> None:
        """To be called before the socket itself is closed."""
        self._watched.disable_monitor()
        self.socket.close()


class Router:
    """The coordinator's end.

    Args:
        endpoint: where to listen.
        doorkeeper: who may connect; without one anybody may, and nothing is encrypted.
    """

    def __init__(self, endpoint: str, doorkeeper: Doorkeeper | None = None) -> None:
        self._doorkeeper = doorkeeper
        self._connections = tcp.Connections()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket, ipv6="[" in endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._is_secure = False
        if doorkeeper is not None and doorkeeper.secret is not None:
            self._is_secure = True
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, doorkeeper.secret)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, zap.DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask is a no
            zap.start(self._context, doorkeeper.admits)
        self._monitor, self._has_lost_one = _Monitor(self._socket), False
        self._open: dict[int, Peer] = {}  # by file descriptor
        self._strangers: dict[int, None] = {}  # file descriptors, the oldest first
        self._shut: set[int] = set()  # file descriptors that libzmq has not closed yet
        self._unproven: dict[Peer, str] = {}  # to be watched, and whose they are
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            hint = " (port in use)" if error.errno == zmq.EADDRINUSE else ""
            raise NetworkError(f"cannot listen on {endpoint}: {error}{hint}") from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def mechanism(self) -> Mechanism:
        """Of ZMTP: what a frame costs on the wire depends on it."""
        return "curve" if self._is_secure else "null"

    def recv(self, within_seconds: float) -> tuple[Peer, list[bytes]] | None:
        """The next message and its peer, or None after a silence or a lost connection."""
        until = time.monotonic() + within_seconds
        for _ in range(MAX_SKIPPED):
            got = self._next(until)
            if got is None:
                return None
            peer, _ = got
            if not self._is_shut(peer.fd):  # else said before we closed the connection
                self._open[peer.fd] = peer
                return got
        return None

    def _is_shut(self, fd: int) -> bool:
        if fd in self._shut:
            self._take_events()  # it may be another's number by now
        return fd in self._shut

    def _next(self, until: float) -> tuple[Peer, list[bytes]] | None:
        while not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            ready = _ready(until - time.monotonic(), self._socket, self._monitor.socket)
            is_lost = self._monitor.socket in ready and self._take_events()
            if self._socket in ready:
                break
            if is_lost or time.monotonic() >= until:
                return None
        first = self._socket.recv(copy=False)  # only as a frame does it say whose it is
        key = str(first.get("User-Id")) if self._is_secure else ""
        peer = Peer(first.bytes, key, int(first.get(zmq.SRCFD)))
        return peer, self._socket.recv_multipart() if first.more else []

    def is_drained(self) -> bool:
        """Whether no message waits to be received."""
        return not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN

    def watch(self, peer: Peer, owner: str) -> None:
        """A peer has logged in: its connection is kept, and the kernel's counts are ``owner``'s.

        It takes effect with the next message to it, which shows that there still is one.
        """
        self._unproven[peer] = owner

    def grown(self) -> list[tcp.Growth]:
        """What the kernel has counted since the last call, of connections being watched."""
        return self._connections.grown()

    def lost_one(self) -> bool:
        """Whether a peer's connection was closed since the last call.

        Which one it was the next ``send`` to it says, if a moment has passed.
        """
        self._take_events()
        said, self._has_lost_one = self._has_lost_one, False
        return said

    def _take_events(self) -> bool:
        """Whether one of them is the end of a connection that something was heard on."""
        is_lost = False
        for event, value in self._monitor.take():
            if event == zmq.EVENT_ACCEPTED:
                self._accepted(value)
            elif event == zmq.EVENT_DISCONNECTED:
                self._strangers.pop(value, None)
                self._shut.discard(value)
                is_lost |= self._open.pop(value, None) is not None
            elif self._doorkeeper is not None and event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._doorkeeper.turned_away(_why(event, value, self._is_secure))
        self._has_lost_one |= is_lost
        return is_lost

    def _accepted(self, fd: int) -> None:
        """Make room for a new connection: descriptors and queues are not to be used up."""
        self._shut.discard(fd)  # that was another of this number
        self._strangers.pop(fd, None)
        self._strangers[fd] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            if (connection := tcp.duplicate(oldest)) is not None:
                with connection:
                    self._end(oldest, connection)

    def send(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        """Queue a message; False when the peer is gone or takes nothing any more."""
        owner = self._unproven.pop(peer, None)
        if owner is not None:
            # its number may be another's by now: if so, the send that comes after this fails
            self._connections.watch(peer, peer.fd, owner)
            self._hear()
        try:
            self._socket.send_multipart([peer.id, *frames], zmq.NOBLOCK, copy=True)
        except (zmq.Again, zmq.ZMQError) as error:
            log.debug("not sent to %s: %s", peer.id.hex(), error)
            if owner is not None:
                self._connections.forget(peer)
            return False
        if owner is not None:
            self._take_events()  # that it was accepted may not have been heard yet
            self._strangers.pop(peer.fd, None)
        return True

    def _hear(self) -> None:
        """Have libzmq take note of connections that have ended.

        What was said on one is read even after its end, when its number may be another's;
        only libzmq knows, and a send says so.
        """
        self._socket.getsockopt(zmq.EVENTS)

    def cut(self, peer: Peer) -> None:
        """Close a connection at once, with whatever is under way on it."""
        self._take_events()
        if self._open.pop(peer.fd, None) != peer:
            return  # closed already, and its number may be another's by now
        connection = tcp.duplicate(peer.fd)  # first: if it is another's, the send fails
        if connection is None:
            return
        with connection:
            self._hear()
            if self.send(peer, [b""]):
                self._end(peer.fd, connection)

    def _end(self, fd: int, connection: sockets.socket) -> None:
        """Close a connection; libzmq does so when what it has of it is read."""
        self._strangers.pop(fd, None)
        self._shut.add(fd)
        with contextlib.suppress(OSError):
            connection.shutdown(sockets.SHUT_RDWR)

    def close(self) -> None:
        self._connections.close()
        self._monitor.close()
        self._socket.close()
        self._context.term()


def _why(event: int, value: int, is_secure: bool) -> str:
    """What a handshake failed of, at the coordinator."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "no key" if is_secure else "a key, with --insecure here"
        if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "another coordinator's key"
    return "broken handshake"


class Dealer:
    """A node's end, with a pipe through which its own threads wake it.

    Args:
        endpoint: the coordinator's.
        identity: this node's key pair and the coordinator's public key; without one
            nothing is encrypted.

    Attributes:
        sent_bytes: of all messages handed on on this connection, with what is put around them.
    """

    def __init__(self, endpoint: str, identity: Identity | None = None) -> None:
        self._context = zmq.Context()
        self._endpoint, self._identity = endpoint, identity
        self._connections, self._traffic = tcp.Connections(), tcp.Traffic()
        self._num_failures = 0  # of handshakes, in a row
        self._mechanism: Mechanism = "null" if identity is None else "curve"
        try:
            self._connect()
        except NetworkError:
            self._context.term()
            raise
        self._inner, self._wake = os.pipe()  # not a socket: those belong to one thread
        os.set_blocking(self._wake, False)

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket, ipv6=True)
        if self._identity is not None:
            own = self._identity.own
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, bytes.fromhex(own.public))
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, bytes.fromhex(self._identity.coordinator))
        self._monitor, self._has_lost_one = _Monitor(self._socket), False
        self.sent_bytes = HANDSHAKE[self._mechanism]["up"]
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            self._disconnect(linger=0)
            raise NetworkError(f"bad address {self._endpoint}: {error}") from error

    def _disconnect(self, linger: int = LINGER_MS) -> None:
        self._monitor.close()
        self._socket.close(linger=linger)

    def reconnect(self) -> None:
        """Drop the connection, with whatever is queued on it, and make a new one."""
        self._disconnect(linger=0)
        self._count()
        self._connections.close()
        self._connect()

    def wake(self) -> None:
        """Make ``recv`` return; from any thread."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake, b"\0")

    def recv(self, within_seconds: float) -> list[bytes] | None:
        """The next message, or None after a silence, a wake-up, or a lost connection.

        Raises:
            KeyRefusedError: the coordinator does not admit this node's key.
            RefusedError: only one of the two has keys.
        """
        ready = _ready(within_seconds, self._socket, self._inner, self._monitor.socket)
        if self._inner in ready:
            os.read(self._inner, 4096)
        self._take_events()
        if self._socket not in ready:
            return None
        self._num_failures = 0
        if self._connections.watches(_COORDINATOR):
            return self._socket.recv_multipart()
        frames = self._socket.recv_multipart(copy=False)  # the first message of a connection
        self._connections.watch(_COORDINATOR, int(frames[0].get(zmq.SRCFD)), "")
        return [frame.bytes for frame in frames]

    def traffic(self) -> tcp.Traffic | None:
        """What the kernel has counted since the start, all connections together."""
        self._count()
        return self._traffic if self._traffic.connections else None

    def _count(self) -> None:
        for growth in self._connections.grown():
            self._traffic = self._traffic.plus(growth)

    def lost_one(self) -> bool:
        """Whether the connection was closed since the last call."""
        self._take_events()
        said, self._has_lost_one = self._has_lost_one, False
        return said

    def _take_events(self) -> None:
        for event, value in self._monitor.take():
            if event == zmq.EVENT_DISCONNECTED:
                self._has_lost_one = True
            else:
                self._judge(event, value)

    def _judge(self, event: int, value: int) -> None:
        """What a handshake that failed means for this node."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == 400:
            raise KeyRefusedError(f"the coordinator at {self._endpoint} does not admit {self._who}")
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            if self._identity is None:
                why = "wants a key, and this node was started with --insecure: leave that out"
            else:
                why = "was started with --insecure, and this node was not: both or neither"
            raise RefusedError(f"the coordinator at {self._endpoint} {why}")
        self._num_failures += 1
        if self._num_failures == SUSPICIOUS_FAILURES:
            log.warning("%s ends each handshake: %s", self._endpoint, self._suspicion)

    @property
    def _who(self) -> str:
        return f"key {self._identity.own.public[:16]}" if self._identity else "nodes without a key"

    @property
    def _suspicion(self) -> str:
        """What may be wrong where the other side hangs up without a word."""
        if self._identity is None:
            return "it is no coordinator, or not for nodes without keys"
        pinned = self._identity.coordinator[:16]
        return f"it is no coordinator, or not the one whose key {pinned} this node trusts"

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue a message; False when the queue is full."""
        try:
            self._socket.send_multipart(list(frames), zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        self.sent_bytes += sum(zmtp_bytes(len(frame), self._mechanism) for frame in frames)
        return True

    def acked_bytes(self) -> int | None:
        """Of ``sent_bytes`` those that the coordinator's kernel has; None where ours cannot say."""
        return self._connections.acked(_COORDINATOR)

    def close(self) -> None:
        """Close, after what was sent has left or ``LINGER_MS`` have passed."""
        self._connections.close()
        self._disconnect()
        self._context.term()
