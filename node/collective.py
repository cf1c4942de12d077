"""A node among others: what its clients have changed, until the nodes have averaged it.

The sum is torch.distributed's all-reduce over gloo.  Every collective has a group of its own,
made for it and closed after it, so that one that failed leaves nothing behind.  Its sockets
are counted by the kernel as those to the coordinator are (``protocol.tcp``).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
from contextlib import closing
from datetime import timedelta
from typing import Any

from fedalgos.method import Collective, Contribution
from fedalgos.space import digest
from protocol import payload, tcp
from protocol.errors import ModelError
from protocol.messages import Reduce, Reduced
from protocol.parts import Exchanged
from protocol.payload import Flat, Payload

SEGMENT_BYTES = 1 << 20  # of gloo's ring, at the most
PREAMBLE_BYTES = 48  # gloo puts one before a segment, and one in each of two notices of it
ANYWHERE = "localhost"  # the store is asked by its own node here, and listens everywhere
_SIOCOUTQNSD = 0x894B  # linux/sockios.h

Place = tuple[int, int]  # round and attempt


class CollectiveError(Exception):
    """The nodes did not come together, or lost each other."""


class Averaging:
    """Updates that stay here until their round is reduced, and the result until it counts.

    It opens a port, at which this node can be met.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective, self._circle = collective, Circle()
        self._place: Place = (0, 0)
        self._updates: dict[int, Contribution] = {}
        self._result: tuple[bytes, Flat] | None = None

    @property
    def port(self) -> int:
        return self._circle.port

    def keep(self, place: Place, update: Contribution) -> Payload:
        """Keep a client's update, and say what is sent in its place."""
        if place != self._place:  # what is of another attempt counts no more
            self._place, self._updates, self._result = place, {}, None
        self._updates[update.assignment.client] = update
        return self._collective.announce(update.payload)

    def result(self, step_digest: bytes) -> Flat | None:
        """The parameters that the last collective made, if they are these; they are let go."""
        made, self._result = self._result, None
        return made[1] if made is not None and made[0] == step_digest else None

    def reduce(self, x: Flat, order: Reduce) -> tuple[Reduced, memoryview | None]:
        """Average with the others; returns the answer, and its payload if it is for us to bring.

        Raises:
            CollectiveError: it came to nothing.
        """
        if missing := [c for c in order.clients if not self._has(order, c)]:
            raise CollectiveError(f"the update of client {missing[0]} is not here any more")
        total = self._collective.share([self._updates[c] for c in order.clients], order.examples)
        self._updates = {}
        self._circle.sum_(total, order)
        step = self._collective.step(x, total)
        self._result = digest(step.values), step.values
        answer = Reduced(
            round=order.round,
            attempt=order.attempt,
            digest=self._result[0],
            exchanged=self.exchanged,
            payload=payload.spec_of(step) if order.rank == 0 else None,
        )
        return answer, payload.encode(step) if order.rank == 0 else None

    @property
    def exchanged(self) -> Exchanged:
        """What the last collective has taken, also if it came to nothing."""
        return self._circle.exchanged

    def close(self) -> None:
        """Nobody can be met here any more."""
        self._circle.close()

    def _has(self, order: Reduce, client: int) -> bool:
        return self._place == (order.round, order.attempt) and client in self._updates


class Circle:
    """This node's place in collectives.

    Attributes:
        port: where others can meet it; of a store that only hands out addresses.
        exchanged: by the last collective.

    Raises:
        ModelError: this torch cannot do it.
    """

    def __init__(self) -> None:
        self._torch = _distributed()
        self._store = self._torch.TCPStore(ANYWHERE, 0, is_master=True, wait_for_workers=False)
        self.port: int = self._store.port
        self.exchanged = Exchanged()
        self._seen = set(_sockets())  # inodes: the store talks to itself as well
        self._watched: dict[int, int] = {}  # inodes and descriptors of the last collective

    def sum_(self, x: Flat, order: Reduce) -> None:
        """``x`` becomes the sum of all nodes' ``x``, the same bits at each.

        Raises:
            CollectiveError: another node is gone, or silent for too long.
        """
        import torch

        self.exchanged, self._watched = Exchanged(), {}
        if order.ranks == 1:
            return
        # whoever was here before us has met us already
        self._seen |= {i for i, fd in _sockets().items() if _port_of(fd) != self.port}
        with closing(tcp.Connections()) as connections:
            is_whole, group = False, None
            try:
                group = self._join(order)
                self._watch(connections)
                group.allreduce([torch.from_numpy(x)]).wait()
                is_whole = True
            except RuntimeError as error:
                raise CollectiveError(_line(error)) from error
            finally:
                group = None  # its connections close, also where an error keeps this frame
                self.exchanged = _exchanged(
                    connections, self._unsent_bytes(), x.nbytes, order.ranks, is_whole
                )

    def close(self) -> None:
        """End the store's threads: at the end of the process they would abort it."""
        self._store = None

    def _join(self, order: Reduce) -> Any:
        """Meet the others; returns a connected process group."""
        patience, where = timedelta(seconds=order.seconds), order.meeting
        store = self._store
        if order.rank > 0:
            store = self._torch.TCPStore(
                where.address, where.port, is_master=False, wait_for_workers=False, timeout=patience
            )
        named = self._torch.PrefixStore(f"{order.round}/{order.attempt}", store)
        named.set_timeout(patience)
        kind = self._torch.ProcessGroupGloo
        options = kind._Options()
        options._timeout = patience
        options._devices = [kind.create_device(hostname=order.address, lazy_init=False)]
        return kind(named, order.rank, order.ranks, options)

    def _watch(self, connections: tcp.Connections) -> None:
        """Count on what has been opened since."""
        self._watched = {i: fd for i, fd in _sockets().items() if i not in self._seen}
        self._seen.update(self._watched)
        for inode, fd in self._watched.items():
            connections.watch(inode, fd, "")

    def _unsent_bytes(self) -> int:
        """What this process has written to them, and its kernel has not sent yet."""
        here = _sockets()
        return sum(_unsent_bytes(here[i]) for i in self._watched if i in here)


def ring_bytes(nbytes: int, ranks: int) -> tuple[int, int]:
    """What one node sends, and what it receives, in a ring all-reduce.

    Args:
        nbytes: of the vector.
        ranks: nodes in the ring.

    Returns:
        Bytes of the vector's numbers, 2 (ranks - 1) / ranks of it; and with gloo's framing.
    """
    numbers = round(2 * (ranks - 1) * nbytes / ranks)
    segments = max(-(-nbytes // SEGMENT_BYTES), 2 * ranks)
    sent = 2 * (ranks - 1) * -(-segments // ranks)
    return numbers, numbers + 3 * PREAMBLE_BYTES * sent


def _distributed() -> Any:
    """torch.distributed, which is not loaded before there is work to do: it is large."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise ModelError("this torch has no gloo, by which the nodes of this method average")
    return distributed


def _exchanged(
    connections: tcp.Connections, unsent_bytes: int, nbytes: int, ranks: int, is_whole: bool
) -> Exchanged:
    """What has gone over the connections; of a sum that came to nothing only the kernel knows.

    The last segments may be with our kernel still, which will send them: they count.
    """
    traffic = tcp.Traffic(sent=unsent_bytes)
    for growth in connections.grown():
        traffic = traffic.plus(growth)
    numbers, framed = ring_bytes(nbytes, ranks) if is_whole else (0, traffic.sent)
    if not traffic.connections:
        return Exchanged(payload=numbers, message=framed)
    return Exchanged(
        payload=numbers,
        message=framed,
        sent=traffic.sent,
        received=traffic.received,
        resent=traffic.resent,
    )


def _sockets() -> dict[int, int]:
    """Inode and a descriptor of each socket of this process; none where that is not said."""
    found: dict[int, int] = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for name in names:
        try:
            status = os.fstat(int(name))
        except OSError:  # closed since, such as that of the listing
            continue
        if stat.S_ISSOCK(status.st_mode):
            found[status.st_ino] = int(name)
    return found


def _unsent_bytes(fd: int) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, _SIOCOUTQNSD, bytes(4)))[0])
    except OSError:  # closed, or no stream
        return 0


def _port_of(fd: int) -> int | None:
    """This end's port of a TCP connection."""
    own = tcp.duplicate(fd)
    if own is None:
        return None
    with own:
        try:
            name = own.getsockname()
        except OSError:
            return None
    return name[1] if isinstance(name, tuple) else None


def _line(error: RuntimeError) -> str:
    """What torch says, without the place in its source and the advice."""
    said = re.sub(r"^(\[[^]]*\.\w+:\d+\] )+", "", str(error)).splitlines()[0]
    return said.partition(". ")[0][:300]
