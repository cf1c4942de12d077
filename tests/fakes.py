"""A network in virtual time, and a worker that follows a script: no sockets, no sleeping."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from coordinator.archive import Archive
from coordinator.journal import Journal
from node.engine import Outcome, Setup
from protocol.errors import SeedwireError
from protocol.experiment import Experiment
from protocol.messages import Message, Ready
from protocol.meter import Mechanism
from protocol.tcp import Growth
from protocol.wire import Frame, Peer

Frames = list[Frame]


@dataclass
class FakeNet:
    """Implements ``coordinator.desk.Transport``.

    Attributes:
        deliveries: (time, peer, frames) on their way to the coordinator, in the order
            in which they arrive.
        now: what the coordinator's clock says; only a silence moves it.
        sent: (peer, frames) in the order sent.
        gone: peers to which nothing can be sent any more.
        has_lost_one: a connection was closed; says so once.
        keys: the key that a peer's handshake proved.
        on_send: called with what is sent: the place for peers that answer.
    """

    deliveries: list[tuple[float, bytes, Frames]] = field(default_factory=list)
    now: float = 0.0
    sent: list[tuple[bytes, Frames]] = field(default_factory=list)
    gone: set[bytes] = field(default_factory=set)
    on_send: Callable[[bytes, Frames], None] = lambda peer, frames: None
    has_lost_one: bool = False
    keys: dict[bytes, str] = field(default_factory=dict)
    silences: int = 0
    max_silences: int = 2000

    def clock(self) -> float:
        return self.now

    def deliver(self, at: float, peer: bytes, frames: Sequence[Frame]) -> None:
        """Put a message on its way; those of one moment keep their order."""
        place = sum(when <= at for when, _, _ in self.deliveries)
        self.deliveries.insert(place, (at, peer, list(frames)))

    def recv(self, within_seconds: float) -> tuple[Peer, list[bytes]] | None:
        if self.deliveries and self.deliveries[0][0] <= self.now + within_seconds:
            at, peer, frames = self.deliveries.pop(0)
            self.now = max(self.now, at)
            return Peer(peer, self.keys.get(peer, "")), [bytes(frame) for frame in frames]
        self.now += within_seconds
        self.silences += 1
        assert self.silences < self.max_silences, f"the script ran dry at {self.now} s"
        return None

    @property
    def mechanism(self) -> Mechanism:
        return "null"

    def watch(self, peer: Peer, owner: str) -> None:
        """No kernel counts here."""

    def grown(self) -> list[Growth]:
        return []

    def cut(self, peer: Peer | bytes) -> None:
        """Close a peer's connection."""
        self.gone.add(peer.id if isinstance(peer, Peer) else peer)
        self.has_lost_one = True

    def is_drained(self) -> bool:
        return not any(at <= self.now for at, _, _ in self.deliveries)

    def lost_one(self) -> bool:
        said, self.has_lost_one = self.has_lost_one, False
        return said

    def send(self, peer: Peer, frames: list[Frame]) -> bool:
        if peer.id in self.gone:
            return False
        self.sent.append((peer.id, [bytes(frame) for frame in frames]))
        self.on_send(peer.id, frames)
        return True


@dataclass
class Blocker:
    """Holds a job until told: two events and no sleeping."""

    entered: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.entered.set()
        assert self.go_on.wait(30), "nobody let the job go on"


class ScriptedWorker:
    """Stands for ``node.worker.Worker``: answers each job by a function, and keeps a list.

    Args:
        answer: from a job to its outcome.
        first: what it says once it is loaded.
        statement: what it repeats at a later login.
    """

    def __init__(
        self,
        answer: Callable[[Message, Frame | None], Outcome | None],
        first: Outcome,
        statement: Ready,
    ) -> None:
        self.answer, self._first, self._statement = answer, first, statement
        self.is_closed = False
        self.jobs: list[tuple[Message, Frame | None]] = []
        self.tell: Callable[[int, int], None] = lambda done, total: None  # of the job that runs

    def close(self) -> None:
        self.is_closed = True

    def ready(self) -> Outcome:
        return self._first

    def statement(self) -> Ready:
        return self._statement

    def run(
        self, message: Message, data: Frame | None, tell: Callable[[int, int], None]
    ) -> Outcome | None:
        self.tell = tell
        self.jobs.append((message, data))
        return self.answer(message, data)


def refusing(error: SeedwireError) -> Callable[[Experiment, Setup], ScriptedWorker]:
    """A worker that cannot be made."""

    def make(experiment: Experiment, setup: Setup) -> ScriptedWorker:
        raise error

    return make


@contextmanager
def mounted(directory: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own in memory, of so many bytes; skips where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    directory.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", directory)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a file system of its own cannot be mounted: {error.stderr.strip()}")
    try:
        yield directory
    finally:
        run("umount", "--lazy", directory)


def in_memory() -> TemporaryDirectory[str]:
    """A directory in memory, where there is one: nothing waits for a disk there."""
    place = Path("/dev/shm")  # noqa: S108 - of Linux, and a random name in it
    return TemporaryDirectory(dir=place if place.is_dir() else None)


def events_of(directory: Path) -> list[dict[str, Any]]:
    """What the journal of a run that goes on has so far; none if it has none yet."""
    path = directory / "journal.sqlite"
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT text FROM log WHERE kind = 'event' ORDER BY id").fetchall()
    return [json.loads(text) for (text,) in rows]


def archive() -> Archive:
    """Of a journal of its own, which goes when it does."""
    directory = in_memory()
    journal = Journal(Path(directory.name), is_new=True)
    made = Archive(journal)
    weakref.finalize(made, directory.cleanup)  # the last first
    weakref.finalize(made, journal.close)
    return made


def run(*line: str | Path) -> str:
    """What a command prints that must succeed."""
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout
