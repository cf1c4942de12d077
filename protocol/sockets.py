"""What both ends of a connection have in common: options, waiting, and ZeroMQ's own events.

With keys every connection is encrypted and both ends are known to each other by their
public keys (CurveZMQ, RFC 26).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import zmq

from protocol.wire import MAX_BODY_BYTES, MAX_INLINE_BYTES

LINGER_MS = 1000  # how long a close waits for a last goodbye to leave
HANDSHAKE_MS = 10_000
MAX_WAITING = 4  # messages of a connection that are here and not yet read; more stay in the kernel
FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_numbers = itertools.count()


def configure(socket: zmq.Socket[bytes], ipv6: bool) -> None:
    """Set what both ends have; limits, most of all."""
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_BODY_BYTES, MAX_INLINE_BYTES))  # of a frame
    socket.setsockopt(zmq.IPV6, ipv6)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by credit instead: nothing is dropped in a burst


def ready(within_seconds: float, *sources: zmq.Socket[bytes] | int) -> set[Any]:
    """Which of the sources have something to read, after waiting for any."""
    poller = zmq.Poller()
    for source in sources:
        poller.register(source, zmq.POLLIN)
    return {source for source, _ in poller.poll(max(0, round(within_seconds * 1000)))}


class Monitor:
    """What happens to a socket's connections: failed handshakes, and their end.

    TCP says that a connection is closed long before a silence does.
    """

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        self._watched = watched
        address = f"inproc://events-{next(_numbers)}"
        watched.monitor(address, FAILURES | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # a queue that is full would stop libzmq
        self.socket.connect(address)

    def take(self) -> Iterator[tuple[int, int]]:
        """Events and their values, as far as they are here."""
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event, _ = self.socket.recv_multipart(zmq.NOBLOCK)
            yield struct.unpack("=Hi", event)

    def close(self) -> None:
        """To be called before the socket itself is closed."""
        self._watched.disable_monitor()
        self.socket.close()
