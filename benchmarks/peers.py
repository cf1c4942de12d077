"""The processes of ``benchmarks.round``: the coordinator, nodes without a model, an echo.

What only the measuring needs is not imported here: it would be counted as the coordinator's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from benchmarks.doorkeeper import Keys
from protocol import experiment as experiments
from protocol import heap, kernels
from protocol.keys import Identity, KeyPair

SECRETS = {"coordinator": b"c" * 32, "node-0": b"0" * 32, "node-1": b"1" * 32, "judge": b"j" * 32}
KEYS = Keys(SECRETS["coordinator"], frozenset(KeyPair.of(s).public for s in SECRETS.values()))


class Oracle:
    """A loss of nothing: what is measured is the way to it and back."""

    def __init__(self, size: int) -> None:
        self._gradient = np.full(size, 1e-3, np.float32)

    def start(self, x: Any) -> Any:
        return x.copy()

    def array(self, x: Any) -> Any:
        return x.copy()

    def numpy(self, x: Any) -> Any:
        return x

    def loss(self, x: Any, batch: object) -> float:
        del batch
        return float(x[0])

    def grad(self, x: Any, batch: object, ranges: object = None) -> tuple[float, Any]:
        del ranges
        return self.loss(x, batch), self._gradient

    def losses(self, x: Any, directions: Any, offsets: Any, batch: object) -> Any:
        return [tuple(self.loss(x, batch) + offset for offset in offsets) for _ in directions]

    def add_(self, x: Any, alpha: float, direction: Any) -> None:
        kernels.add_direction_(x, alpha, direction)


@dataclass(frozen=True)
class Nothing:
    """Implements ``node.trainee.Trainee``: a vector."""

    size: int
    oracle: Any
    infos: tuple[Any, ...]

    def initial(self) -> Any:
        return np.zeros(self.size, np.float32)

    def num_examples(self, client: int) -> int:
        del client
        return 1

    def batch(self, client: int, rows: Any) -> Any:
        del client
        return rows

    def deal(self, mesh: Any) -> None:
        raise NotImplementedError("no rank holds a part of a vector")

    def probe(self, batch_size: int) -> None:
        """There is nothing to infer."""

    def score(self, x: Any, last: bool) -> Any:
        from node.trainee import Scored

        del last
        return Scored(float(x[0]), 0.0, 1)

    def export(self, directory: Path) -> None:
        """There is nothing to save."""


def be_node(endpoint: str, name: str, size: int) -> None:
    """``seedwire node`` with a vector for a model."""
    from node import engine, session, worker
    from node.engine import Setup
    from protocol.dealer import Dealer
    from protocol.parts import TensorInfo

    identity = Identity(KeyPair.of(SECRETS[name]), KeyPair.of(SECRETS["coordinator"]).public)
    module: Any = session  # what it has imported is replaced there
    module.Dealer = lambda where, *_: Dealer(where, identity)
    infos = (TensorInfo("x", (size,), "x"),)
    model: Any = Nothing(size, Oracle(size), infos)
    make = partial(worker.Worker, load=lambda *_: model)
    clients = () if name == "judge" else (int(name[-1]),)
    setup = Setup(clients, evaluates=not clients)
    me = session.Session(
        endpoint,
        name,
        metadata.version("seedwire"),
        setup,
        make_engine=partial(engine.Engine, make=make),
    )
    me.run()
    me.leave("")


def be_coordinator(directory: Path, table: dict[str, Any]) -> None:
    """``seedwire coordinator``; it fails if that has loaded torch."""
    from rich.console import Console

    from coordinator import run
    from coordinator.place import Place
    from protocol.router import Router

    heap.share()  # as the command does
    module: Any = run  # what it has imported is replaced there
    module.Router = lambda where, *_: Router(where, KEYS)
    place = Place("tcp://127.0.0.1:*", directory, starts_evaluator=False)
    run.run(experiments.convert(table, "round"), place, Console(quiet=True))
    if "torch" in sys.modules:
        raise RuntimeError("the coordinator has loaded torch")


def be_echo(port: str, repeats: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"here")
        for _ in range(int(repeats)):
            dealer.send_multipart(dealer.recv_multipart(copy=False), copy=False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["coordinator", folder, text]:
            be_coordinator(Path(folder), json.loads(text))
        case ["node", endpoint, name, size]:
            be_node(endpoint, name, int(size))
        case ["echo", port, repeats]:
            be_echo(port, repeats)
        case _:
            sys.exit(__doc__)
