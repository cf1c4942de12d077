"""``seedwire node`` with an actor at its socket, and a model of a few numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import seedwire
from node import collective, engine, session, worker
from node.engine import Setup
from node.trainee import Trainee
from protocol.experiment import Experiment
from protocol.messages import Reduce
from tests.faults.actor import Actor, dealer
from tests.faults.trainee import Tiny


def run(address: str, who: str, arguments: list[str]) -> None:
    """Be the node ``who`` until it ends."""
    actor = Actor(address, who)

    def load(experiment: Experiment, setup: Setup) -> Trainee:
        return Tiny(experiment, setup, actor)

    make = partial(worker.Worker, load=load)
    node_session: Any = session  # what its module has imported is replaced there
    node_session.Dealer = dealer(actor)
    node_session.Session = partial(session.Session, make_engine=partial(engine.Engine, make=make))
    _announce_meeting(actor)
    seedwire.app(["node", *arguments])


def _announce_meeting(actor: Actor) -> None:
    """Say "met" when the nodes of a collective are connected, and nothing is summed yet."""
    join = collective.Circle._join

    def joined(self: collective.Circle, order: Reduce) -> Any:
        group = join(self, order)
        actor.at("met")
        return group

    collective.Circle._join = joined  # type: ignore[method-assign]
