"""A node's end: one DEALER, whose one peer is the coordinator, frames in and out.

Nothing is decided here but what a failed handshake means.  The kernel's own byte counters
(``protocol.tcp``) are read here, because only here it is known which connection a message
came by.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import zmq

from protocol import tcp
from protocol.errors import KeyRefusedError, NetworkError, RefusedError
from protocol.keys import Identity
from protocol.meter import HANDSHAKE, Mechanism, zmtp_bytes
from protocol.sockets import LINGER_MS, Monitor, configure, ready
from protocol.wire import Frame

log = logging.getLogger(__name__)

SUSPICIOUS_FAILURES = 3  # of handshakes in a row; one may be a coordinator that is just ending
_COORDINATOR = b""  # the one peer


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
        configure(self._socket, ipv6=True)
        if self._identity is not None:
            own = self._identity.own
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, bytes.fromhex(own.public))
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, bytes.fromhex(self._identity.coordinator))
        self._monitor, self._has_lost_one = Monitor(self._socket), False
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
        found = ready(within_seconds, self._socket, self._inner, self._monitor.socket)
        if self._inner in found:
            os.read(self._inner, 4096)
        self._take_events()
        if self._socket not in found:
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
