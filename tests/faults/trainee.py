"""A model of a few numbers: each client pulls them towards a place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedalgos.method import Batch
from fedalgos.space import ParamSpace
from node.engine import Setup
from node.partition import Indices
from node.trainee import Scored
from protocol.experiment import Experiment
from protocol.parts import TensorInfo
from protocol.payload import Flat
from tests.faults.actor import Actor
from tests.oracles import Exact, Numpy

EXAMPLES = 12  # of each client
RANK = 2  # of a LoRA pair; the experiment's own is not asked


def tensors(size: int) -> tuple[TensorInfo, ...]:
    """Two units of ``size`` numbers together."""
    half = size // 2
    return tuple(TensorInfo(name, (n,), name) for name, n in (("a", half), ("b", size - half)))


def pairs(size: int) -> tuple[TensorInfo, ...]:
    """As many LoRA pairs, each of a 3 by 2 weight."""
    shapes = {"lora_A": (RANK, 2), "lora_B": (3, RANK)}
    return tuple(
        TensorInfo(f"t{i}.{part}.weight", shape, f"t{i}")
        for i in range(size)
        for part, shape in shapes.items()
    )


MODELS = {"tiny": tensors, "lora": pairs}


@dataclass(frozen=True)
class Bowl(Numpy):
    """f = mean((x - target)^2) / 2, where the batch is the target."""

    size: int

    def value(self, x: Exact, batch: Batch) -> float:
        return float(np.mean((x - batch) ** 2) / 2)

    def gradient(self, x: Exact, batch: Batch) -> Exact:
        gradient: Exact = (x - batch) / self.size
        return gradient


class Tiny:
    """Implements ``node.trainee.Trainee``; ``model.id`` is "MODEL:SIZE", a key of ``MODELS``.

    Says when it is loaded, when it trains and when it evaluates.
    """

    def __init__(self, experiment: Experiment, setup: Setup, actor: Actor) -> None:
        del setup
        actor.at("load")
        model, size = experiment.model.id.split(":")
        self.infos = MODELS[model](int(size))
        self._size, self._actor = ParamSpace.of(self.infos).size, actor
        self.oracle = Bowl(self._size)

    def initial(self) -> Flat:
        return np.zeros(self._size, np.float32)

    def num_examples(self, client: int) -> int:
        del client
        return EXAMPLES

    def batch(self, client: int, rows: Indices) -> Batch:
        self._actor.at("train")
        places = np.arange(self._size) % 7 + client + 1
        return places + float(np.mean(rows)) / EXAMPLES

    def deal(self, mesh: Any) -> None:
        raise NotImplementedError

    def probe(self, batch_size: int) -> None:
        del batch_size

    def score(self, x: Flat, last: bool) -> Scored:
        del last
        self._actor.at("evaluate")
        loss = self.oracle.value(x.astype(np.float64), np.arange(self._size) % 7)
        return Scored(loss, 1 / (1 + loss), EXAMPLES)

    def export(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
