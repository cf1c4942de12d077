"""A coordinator up to the login: a real desk with a real guard, at a real port, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator import enrolled
from coordinator.arrivals import Arrival, LoggedIn
from coordinator.desk import Desk
from coordinator.guard import Guard
from coordinator.roster import Roster
from protocol.experiment import Nodes
from protocol.keys import Token
from protocol.router import Router

WITHIN_SECONDS = 30.0


class Centre:
    """What it sees is kept.

    Attributes:
        arrivals: all that came to something, or to a breach.
        gone: names and reasons of nodes that were lost.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.guard = store, Guard(store)
        self.router = Router("tcp://127.0.0.1:*", self.guard)
        self.endpoint = self.router.endpoint
        self._desk = Desk(self.router, Roster(100, "1.0"), Nodes(), time.monotonic, self.guard)
        self.arrivals: list[Arrival] = []
        self.gone: list[tuple[str, str]] = []
        self._turned, self._is_over = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._is_over.is_set():
            self.arrivals += self._desk.receive(0.02)
            for member, reason in self._desk.keep_alive():
                self.gone.append((member.name, reason))
                self._desk.drop(member)
            with self._turned:
                self._turned.notify_all()

    @property
    def logins(self) -> list[str]:
        """Names of nodes that came in, in order."""
        return [came.member.name for came in self.arrivals if isinstance(came, LoggedIn)]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a turn after which this is so."""
        with self._turned:
            assert self._turned.wait_for(condition, WITHIN_SECONDS), f"never happened: {what}"

    def token(self, uses: int = 1, valid_seconds: float = 600.0) -> Token:
        return enrolled.new_token(self.store, valid_seconds, uses)

    def close(self) -> None:
        """Once, or again."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._thread.join()
            self.router.close()


@pytest.fixture
def centre(tmp_path: Path) -> Iterator[Centre]:
    centre = Centre(tmp_path / "centre")
    yield centre
    centre.close()
