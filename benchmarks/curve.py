"""What keys cost on the wire: the same round with CURVE and without, in turn.

    python -m benchmarks.curve

A router here, a dealer in a process of its own, over loopback.  A scalar round is a step and
a task down and an update up, four scalars each way; a dense one 1.2 M fp32 each way, in chunks
under credit.  Bytes are the kernel's (TCP_INFO), seconds of CPU those of both processes, which
other work on the machine changes less than the time of a round.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import psutil

from benchmarks.doorkeeper import Keys
from benchmarks.harness import Metric, alternate, no_arguments, progress, report
from protocol.blobs import CHUNK_BYTES, WINDOW
from protocol.channel import to_coordinator, to_node
from protocol.dealer import Dealer
from protocol.keys import Identity, KeyPair
from protocol.messages import Chunk, Pull, Step, Task, Update
from protocol.payload import Run, Scalars, encode, spec_of
from protocol.router import Router
from protocol.wire import Frame, Peer

DENSE_BYTES, SCALAR_ROUNDS, DENSE_ROUNDS = 4_800_000, 400, 15
SERVER, NODE = KeyPair.new(), KeyPair.new()
WITHIN_SECONDS = 60.0
KEYS = Keys(SERVER.secret, frozenset({NODE.public}))


def be_node(endpoint: str, identity: Identity | None) -> None:
    """Answer each task with an update, each pull with a chunk, each chunk with a pull."""
    dealer, data = Dealer(endpoint, identity), memoryview(bytes(DENSE_BYTES))
    update, values = update_of(4)
    dealer.send(to_coordinator.pack(Pull(blob=0, offset=0, nbytes=1)))  # hello
    while True:
        frames = dealer.recv(WITHIN_SECONDS)
        if frames is None:
            continue
        message, _ = to_node.unpack(frames)
        if isinstance(message, Task):
            dealer.send(to_coordinator.pack(update, values))
        elif isinstance(message, Pull):
            part = data[message.offset : message.offset + message.nbytes]
            dealer.send(to_coordinator.pack(Chunk(blob=message.blob, offset=message.offset), part))
        elif isinstance(message, Chunk):
            dealer.send(to_coordinator.pack(Pull(blob=message.blob, offset=0, nbytes=1)))


def update_of(count: int) -> tuple[Update, memoryview]:
    value = Scalars((Run(1, count),), np.linspace(0.1, 1, count, dtype=np.float32))
    spec = spec_of(value)
    update = Update(round=7, attempt=0, client=1, examples=8, loss=0.5, payload=spec)
    return update, encode(value)


class Line:
    """One connection and its rounds."""

    def __init__(self, is_secure: bool) -> None:
        self._router = Router("tcp://127.0.0.1:*", KEYS if is_secure else None)
        identity = Identity(NODE, SERVER.public) if is_secure else None
        self._node = multiprocessing.get_context("fork").Process(
            target=be_node, args=(self._router.endpoint, identity), daemon=True
        )
        self._node.start()
        self._peer, _ = self._receive()
        self._router.watch(self._peer, "node")
        self._router.grown()
        self.cpu_seconds = 0.0
        update, self._values = update_of(4)
        self._step = Step(version=6, round=6, digest=bytes(16), payload=update.payload)
        self._task = Task(round=7, attempt=0, client=1, version=6)
        self._data = memoryview(bytes(DENSE_BYTES))

    def _receive(self) -> tuple[Peer, Sequence[Frame]]:
        while (got := self._router.recv(WITHIN_SECONDS)) is None:
            pass
        return got

    def scalar(self) -> None:
        self._router.send(self._peer, to_node.pack(self._step, self._values))
        self._router.send(self._peer, to_node.pack(self._task))
        to_coordinator.unpack(self._receive()[1])

    def dense(self) -> None:
        """Down, then up; each answer is the credit for the next chunk."""
        self._transfer(self._push)
        self._transfer(self._pull)

    def _transfer(self, ask: Callable[[int], None]) -> None:
        offsets = list(range(0, DENSE_BYTES, CHUNK_BYTES))
        for offset in offsets[:WINDOW]:
            ask(offset)
        for i in range(len(offsets)):
            to_coordinator.unpack(self._receive()[1])
            if i + WINDOW < len(offsets):
                ask(offsets[i + WINDOW])

    def _push(self, offset: int) -> None:
        part = self._data[offset : offset + CHUNK_BYTES]
        self._router.send(self._peer, to_node.pack(Chunk(blob=1, offset=offset), part))

    def _pull(self, offset: int) -> None:
        nbytes = min(CHUNK_BYTES, DENSE_BYTES - offset)
        self._router.send(self._peer, to_node.pack(Pull(blob=1, offset=offset, nbytes=nbytes)))

    def tcp_bytes(self) -> int:
        """Since the last call, both ways."""
        return sum(growth.sent + growth.received for growth in self._router.grown())

    def timed(self, kind: str) -> None:
        """A round, and the CPU it takes."""
        before = self._cpu()
        self.scalar() if kind == "scalar" else self.dense()
        self.cpu_seconds += self._cpu() - before

    def _cpu(self) -> float:
        theirs = psutil.Process(self._node.pid).cpu_times()
        return time.process_time() + theirs.user + theirs.system

    def close(self) -> None:
        self._node.terminate()
        self._node.join()
        self._router.close()


def main() -> None:
    """Measure and report."""
    no_arguments(__doc__)
    lines = [Line(is_secure=False), Line(is_secure=True)]
    metrics: dict[str, Metric] = {}
    for kind, repeats in (("scalar", SCALAR_ROUNDS), ("dense", DENSE_ROUNDS)):
        for line in lines:
            line.tcp_bytes()
            line.cpu_seconds = 0.0
        work = [partial(line.timed, kind) for line in lines]
        null, curve = (1e3 * s for s in alternate(*work, repeats=repeats))
        cpus = [1e3 * line.cpu_seconds / (repeats + 1) for line in lines]
        sizes = [line.tcp_bytes() / (repeats + 1) for line in lines]
        progress(
            f"{kind}: {null:.2f} and {curve:.2f} ms, {sizes[0]:.0f} and {sizes[1]:.0f} bytes, "
            f"{cpus[0]:.1f} and {cpus[1]:.1f} ms of CPU"
        )
        metrics |= {
            f"{kind}_null_ms": Metric(null, "ms", "lower"),
            f"{kind}_curve_ms": Metric(curve, "ms", "lower"),
            f"{kind}_added_cpu_ms": Metric(cpus[1] - cpus[0], "ms", "lower"),
            f"{kind}_added_bytes": Metric(sizes[1] - sizes[0], "B", "lower"),
        }
    for line in lines:
        line.close()
    report("curve", metrics)


if __name__ == "__main__":
    main()
