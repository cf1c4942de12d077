"""What the kernel says of our own TCP connections: its ``TCP_INFO`` (tcp(7)).

A connection is known by the file descriptor that ZeroMQ received a message on, so neither
addresses nor ports are compared: NAT, IPv6, network namespaces and many nodes on one
host are all the same to it.  We hold a duplicate, and so read the last numbers of a
connection that ZeroMQ has closed already.  Linux only; elsewhere there is nothing to read
and the figures are absent, never zero.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

_INFO_BYTES = 280
_ESTABLISHED = 1
_GOT_FIN = {6, 8, 9, 11}  # states in which the kernel has counted the other's FIN as a byte
# offsets in struct tcp_info, include/uapi/linux/tcp.h; it only ever grows at its end
_RTT_AT, _ACKED_AT, _RECEIVED_AT, _SENT_AT, _RESENT_AT = 68, 120, 128, 200, 208


class Reading(NamedTuple):
    """One connection since it was made, as its end of it sees it; headers are not counted.

    Attributes:
        sent: bytes that left for the first time.  Linux before 4.19 does not say; then
            those that the other end has acknowledged.
        acked: bytes of them that the other end has acknowledged.
        received: bytes that arrived, each once.
        resent: bytes that had to be sent again; None where the kernel does not say.
        rtt_seconds: the smoothed round-trip time.
        is_open: neither end has closed it.
    """

    sent: int
    acked: int
    received: int
    resent: int | None
    rtt_seconds: float
    is_open: bool


class Growth(NamedTuple):
    """What was added to a connection since the last look; fields as of ``Reading``."""

    owner: str
    sent: int
    received: int
    resent: int | None
    rtt_seconds: float
    is_first: bool  # look at this connection
    is_last: bool = False


class Traffic(NamedTuple):
    """Sums over a peer's connections.

    Attributes:
        resent: None as soon as one connection did not say.
        rtt_seconds: of the last connection; 0 while there was none.
    """

    sent: int = 0
    received: int = 0
    resent: int | None = 0
    rtt_seconds: float = 0.0
    connections: int = 0

    def plus(self, growth: Growth) -> Traffic:
        known = self.resent is not None and growth.resent is not None
        return Traffic(
            self.sent + growth.sent,
            self.received + growth.received,
            (self.resent or 0) + (growth.resent or 0) if known else None,
            growth.rtt_seconds,
            self.connections + growth.is_first,
        )

    def merged(self, other: Traffic) -> Traffic:
        """Of two peers together."""
        growth = Growth("", other.sent, other.received, other.resent, other.rtt_seconds, False)
        return self.plus(growth)._replace(connections=self.connections + other.connections)


@dataclass(eq=False)
class _Watched:
    owner: str
    own: socket.socket  # our duplicate
    fd: int  # ZeroMQ's
    inode: int
    last: Reading | None = None


def parse(info: bytes) -> Reading | None:
    """A ``struct tcp_info``, or None if it is too old a one to count bytes (before Linux 4.2)."""
    if len(info) < _RECEIVED_AT + 8:
        return None
    (rtt,) = struct.unpack_from("=I", info, _RTT_AT)
    acked, received = struct.unpack_from("=QQ", info, _ACKED_AT)
    received -= info[0] in _GOT_FIN
    sent, resent = acked, None
    if len(info) >= _RESENT_AT + 8:
        sent, resent = struct.unpack_from("=QQ", info, _SENT_AT)
        sent -= resent
    return Reading(sent, acked, received, resent, rtt / 1e6, info[0] == _ESTABLISHED)


class Connections:
    """Running counts of connections, by peer.  Not for several threads at once."""

    def __init__(self) -> None:
        self._watched: dict[Hashable, _Watched] = {}

    def watch(self, peer: Hashable, fd: int, owner: str) -> None:
        """Count a connection from its beginning, if the kernel says how many bytes it has seen.

        Args:
            peer: names the connection; another one of this name is let go.
            fd: as ZeroMQ has it, of a message that has just been received.
            owner: whose bytes these are.
        """
        if sys.platform != "linux":
            return
        if peer in self._watched and _inode(fd) == self._watched[peer].inode:
            self._watched[peer].owner = owner  # has logged in once more
            return
        self.forget(peer)
        own = duplicate(fd)
        if own is None:
            return
        if _read(own) is None:
            own.close()
            return
        self._watched[peer] = _Watched(owner, own, fd, os.fstat(own.fileno()).st_ino)

    def watches(self, peer: Hashable) -> bool:
        return peer in self._watched

    def acked(self, peer: Hashable) -> int | None:
        """Bytes that the other end has acknowledged since the connection was made."""
        watched = self._watched.get(peer)
        reading = _read(watched.own) if watched is not None else None
        return None if reading is None else reading.acked

    def grown(self) -> list[Growth]:
        """What was added since the last call, of connections that have ended for the last time."""
        found = []
        for peer, watched in list(self._watched.items()):
            reading = _read(watched.own)
            is_over = reading is None or not reading.is_open
            is_over |= _inode(watched.fd) != watched.inode
            if reading is not None:
                found.append(_growth(watched.owner, watched.last, reading, is_over))
                watched.last = reading
            if is_over:
                self.forget(peer)
        return found

    def forget(self, peer: Hashable) -> None:
        """Let one go; ours would keep it open after ZeroMQ has closed it."""
        watched = self._watched.pop(peer, None)
        if watched is not None:
            watched.own.close()

    def close(self) -> None:
        for peer in list(self._watched):
            self.forget(peer)


def _growth(owner: str, old: Reading | None, new: Reading, is_last: bool) -> Growth:
    before = old or Reading(0, 0, 0, 0, 0.0, True)
    resent = None if new.resent is None else new.resent - (before.resent or 0)
    sent, received = new.sent - before.sent, new.received - before.received
    return Growth(owner, sent, received, resent, new.rtt_seconds, old is None, is_last)


def duplicate(fd: int) -> socket.socket | None:
    """Our own descriptor of a connection; None if it was closed in between, or it is no socket."""
    try:
        own = os.dup(fd)
    except OSError:
        return None
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        return None


def _read(own: socket.socket) -> Reading | None:
    if sys.platform != "linux":
        return None
    try:
        return parse(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))
    except OSError:  # not TCP
        return None


def _inode(fd: int) -> int | None:
    """Of the socket that a number of ZeroMQ's stands for now, if any."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None
