"""The coordinator's end: one ROUTER for all nodes, frames in and out.

Nothing is decided here but which connections may stay.  The kernel's own byte counters
(``protocol.tcp``) are read here, because only here it is known which connection a message
came by.
"""

from __future__ import annotations

import contextlib
import logging
import socket as sockets
import time
from collections.abc import Sequence
from typing import Protocol

import zmq

from protocol import tcp, zap
from protocol.errors import NetworkError
from protocol.meter import Mechanism
from protocol.sockets import Monitor, configure, ready
from protocol.wire import Frame, Peer

log = logging.getLogger(__name__)

MAX_STRANGERS = 256  # connections that have not logged in; of more the oldest are closed
MAX_SKIPPED = 1000  # messages of connections that we have closed, before we look elsewhere


class Doorkeeper(Protocol):
    """Who may connect to a coordinator, and what is told of those who may not."""

    @property
    def secret(self) -> bytes | None:
        """The coordinator's secret key, 32 bytes; None does without keys."""

    def admits(self, key: str, address: str) -> bool:
        """Whether the owner of this public key (hex) may connect; asked in another thread."""

    def turned_away(self, reason: str) -> None:
        """A handshake failed before there was a key to ask about."""


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
        configure(self._socket, ipv6="[" in endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._is_secure = False
        if doorkeeper is not None and doorkeeper.secret is not None:
            self._is_secure = True
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, doorkeeper.secret)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, zap.DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask is a no
            zap.start(self._context, doorkeeper.admits)
        self._monitor, self._has_lost_one = Monitor(self._socket), False
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
            found = ready(until - time.monotonic(), self._socket, self._monitor.socket)
            is_lost = self._monitor.socket in found and self._take_events()
            if self._socket in found:
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
        except BaseException:  # a signal between two frames: what is sent next would be its end
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send(b"", zmq.NOBLOCK)
            raise
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
