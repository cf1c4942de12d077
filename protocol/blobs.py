"""Chunked transfer: a payload over ``INLINE_BYTES`` stays with its owner until it is pulled.

The receiver asks for chunks, a few at a time, and each answer is its credit for the
next; so neither side queues more than the window, and nobody holds two copies.  Chunks are
small because a slow link must get one through within the other side's patience, and larger
where that takes no time, because each costs both sides some work.  No I/O: both classes
turn messages into messages.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protocol.messages import Chunk, Pull
from protocol.wire import Frame, RemoteProtocolError

CHUNK_BYTES = 1 << 16  # half a second at 1 Mbit/s
INLINE_BYTES = 2 * CHUNK_BYTES
WINDOW = 16  # of them may be asked for and not yet here, or as many bytes
FAST_CHUNK_BYTES = 1 << 19
FAST_BYTES_PER_SECOND = 5 * FAST_CHUNK_BYTES  # 21 Mbit/s

T = TypeVar("T")
Peer = Hashable


class Outbox:
    """Blobs that this side offers."""

    def __init__(self) -> None:
        self._blobs: dict[int, memoryview] = {}
        self._once: set[int] = set()
        self._next = 0

    def put(self, data: memoryview, once: bool = False) -> int:
        """Offer a buffer; it is kept, not copied, until dropped.

        With ``once`` it has a single reader, and goes when its last byte was pulled.
        """
        self._next += 1
        self._blobs[self._next] = data
        if once:
            self._once.add(self._next)
        return self._next

    def holds(self, blob: int) -> bool:
        """Whether there is still something of it to be pulled."""
        return blob in self._blobs

    def drop(self, blob: int) -> None:
        """Withdraw; a pull that is still under way is told ``gone``."""
        self._blobs.pop(blob, None)
        self._once.discard(blob)

    def answer(self, pull: Pull) -> tuple[Chunk, memoryview | None]:
        """The chunk that a pull asks for.

        Raises:
            RemoteProtocolError: the range is outside the blob.
        """
        data = self._blobs.get(pull.blob)
        if data is None:
            return Chunk(blob=pull.blob, offset=pull.offset, gone=True), None
        if pull.offset + pull.nbytes > len(data):
            raise RemoteProtocolError(f"pull past the end of blob {pull.blob}")
        chunk = Chunk(blob=pull.blob, offset=pull.offset)
        if pull.blob in self._once and pull.offset + pull.nbytes == len(data):
            self.drop(pull.blob)
        return chunk, data[pull.offset : pull.offset + pull.nbytes]


@dataclass
class _Arriving(Generic[T]):
    item: T
    data: memoryview
    since: float
    asked: int = 0
    due: dict[int, int] = field(default_factory=dict)  # offset -> size of the open pulls


@dataclass(frozen=True)
class Arrived(Generic[T]):
    """A whole blob, or ``data`` None where the other side no longer has it."""

    item: T
    data: memoryview | None


class Inbox(Generic[T]):
    """Blobs on their way here, each for an item (the message that announced it).

    Args:
        now: a monotonic clock, by which a peer is fast or not.
        allocate: makes room for so many bytes.
    """

    def __init__(
        self,
        now: Callable[[], float],
        allocate: Callable[[int], memoryview] | None = None,
    ) -> None:
        self._now = now
        self._fast: set[Peer] = set()
        self._allocate = allocate or (lambda nbytes: memoryview(bytearray(nbytes)))
        self._arriving: dict[tuple[Peer, int], _Arriving[T]] = {}

    def open(self, peer: Peer, blob: int, nbytes: int, item: T) -> list[Pull]:
        """Start a transfer; the caller has checked that ``nbytes`` is what it expects.

        Raises:
            RemoteProtocolError: an empty blob, which no pull could complete, or one that
                is on its way already.
        """
        if nbytes == 0:
            raise RemoteProtocolError(f"blob {blob} is empty")
        if (peer, blob) in self._arriving:
            raise RemoteProtocolError(f"blob {blob} is on its way already")
        arriving = _Arriving(item, self._allocate(nbytes), self._now())
        self._arriving[peer, blob] = arriving
        return self._ask(peer, blob, arriving)

    def count(self, peer: Peer) -> int:
        """How many transfers from a peer are under way."""
        return sum(key[0] == peer for key in self._arriving)

    def is_due(self, peer: Peer, nbytes: int) -> bool:
        """Whether a chunk of this size was asked for and is not here yet."""
        return any(
            key[0] == peer and nbytes in arriving.due.values()
            for key, arriving in self._arriving.items()
        )

    def expects(self, peer: Peer, blob: int) -> T | None:
        """The item a chunk of this blob would be for."""
        arriving = self._arriving.get((peer, blob))
        return arriving.item if arriving else None

    def forget(self, peer: Peer) -> list[T]:
        """Give up all transfers from a peer; returns their items."""
        self._fast.discard(peer)
        gone = [key for key in self._arriving if key[0] == peer]
        return [self._arriving.pop(key).item for key in gone]

    def take(
        self, peer: Peer, chunk: Chunk, buffer: Frame | None
    ) -> tuple[list[Pull], Arrived[T] | None]:
        """Store a chunk; returns further pulls, and the blob once it is whole.

        Raises:
            RemoteProtocolError: a chunk that was not asked for, or of another size.
        """
        arriving = self._arriving.get((peer, chunk.blob))
        if arriving is None:
            return [], None  # of a transfer given up
        if buffer is None:
            del self._arriving[peer, chunk.blob]
            return [], Arrived(arriving.item, None)
        if arriving.due.get(chunk.offset) != len(buffer):
            raise RemoteProtocolError(f"chunk at {chunk.offset} of blob {chunk.blob} not asked for")
        del arriving.due[chunk.offset]
        arriving.data[chunk.offset : chunk.offset + len(buffer)] = buffer
        self._time(peer, arriving)
        pulls = self._ask(peer, chunk.blob, arriving)
        if arriving.due:
            return pulls, None
        del self._arriving[peer, chunk.blob]
        return [], Arrived(arriving.item, arriving.data)

    def _time(self, peer: Peer, arriving: _Arriving[T]) -> None:
        """Note how fast a peer is, by what has arrived of this blob so far."""
        nbytes = arriving.asked - sum(arriving.due.values())
        if nbytes >= FAST_BYTES_PER_SECOND * (self._now() - arriving.since):
            self._fast.add(peer)
        else:
            self._fast.discard(peer)

    def _ask(self, peer: Peer, blob: int, arriving: _Arriving[T]) -> list[Pull]:
        pulls: list[Pull] = []
        usual = FAST_CHUNK_BYTES if peer in self._fast else CHUNK_BYTES
        room = WINDOW * CHUNK_BYTES - sum(arriving.due.values())
        while size := min(usual, len(arriving.data) - arriving.asked):
            if size > room:
                break
            pulls.append(Pull(blob=blob, offset=arriving.asked, nbytes=size))
            arriving.due[arriving.asked] = size
            arriving.asked += size
            room -= size
        return pulls
