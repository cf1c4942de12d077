"""``seedwire coordinator`` with an actor at its socket and around its commit and events."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import seedwire
from coordinator import central, journal, server
from coordinator import run as runs
from coordinator.events import Event, NodeLost, NodeReady, UpdateArrived
from fedalgos.method import Contribution
from tests.faults.actor import Actor, router


def run(address: str, who: str, arguments: list[str]) -> None:
    """Be the coordinator until it ends."""
    actor = Actor(address, who)
    module: Any = runs  # what it has imported is replaced there
    module.Router = router(actor)
    _announce_commits(actor)
    _announce_events(actor)
    seedwire.app(["coordinator", *arguments])


def _announce_events(actor: Actor) -> None:
    """Say "found NAME", "lost NAME" and "has update", a whole one, as the round machine is told."""
    whole = server.Server.feed

    def feed(self: server.Server, event: Event) -> None:
        whole(self, event)
        if isinstance(event, NodeReady | NodeLost):
            actor.at(f"{'found' if isinstance(event, NodeReady) else 'lost'} {event.node}")
        elif isinstance(event, UpdateArrived):
            actor.at("has update")

    server.Server.feed = feed  # type: ignore[method-assign]


def _announce_commits(actor: Actor) -> None:
    """Say "commit", "folded" when the round is in memory, "save" and "saved" as it is durable."""
    fold, save, is_folded = central.Central.commit, journal.Journal.commit, threading.Event()

    def commit(self: central.Central, round: int, contributions: Iterable[Contribution]) -> None:
        actor.at("commit")
        fold(self, round, contributions)
        is_folded.set()
        actor.at("folded")

    def transaction(self: journal.Journal) -> None:
        if not is_folded.is_set():
            save(self)
            return
        actor.at("save")
        save(self)
        is_folded.clear()
        actor.at("saved")

    central.Central.commit = commit  # type: ignore[method-assign]
    journal.Journal.commit = transaction  # type: ignore[method-assign]
