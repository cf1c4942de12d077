"""The trainee of real runs: a transformer in torch, and examples that it has tokenised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedalgos.method import Batch
from node import answers, model, task
from node.data import Shards
from node.engine import Setup
from node.oracle import TorchOracle
from node.partition import Indices
from node.trainee import Scored
from protocol.experiment import Experiment
from protocol.payload import Flat

EVALUATION_BATCH = 32


class Transformer:
    """Implements ``node.trainee.Trainee``."""

    def __init__(self, experiment: Experiment, setup: Setup, shards: Shards) -> None:
        """Load the model and tokenise; this is the long part.

        Raises:
            SeedwireError: the model is not there or does not fit the data.
        """
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self._trained = model.load(
            experiment.model,
            experiment.peft,
            experiment.data,
            len(shards.classes),
            device=setup.device,
            seed=experiment.run.seed,
            deals=setup.ranks is not None and setup.ranks.fsdp,
        )
        self._data = experiment.data
        self._task = task.build(self._trained, experiment.data, shards.classes)
        if setup.evaluates:
            answers.check(self._trained, experiment.data)
        self.infos = self._trained.infos
        self.oracle = TorchOracle(self._trained, self._task, experiment.compute)
        self._train = {c: self._task.tokenise(e) for c, e in shards.train.items()}
        self._test = self._task.tokenise(shards.test)

    def initial(self) -> Flat:
        return self.oracle.initial()

    def num_examples(self, client: int) -> int:
        return len(self._train[client])

    def batch(self, client: int, rows: Indices) -> Batch:
        return self._task.batch(self._train[client], rows)

    def deal(self, mesh: Any) -> None:
        self.oracle.deal(mesh)

    def probe(self, batch_size: int) -> None:
        rows = range(min(batch_size, len(self._test)))
        self._task.score(self._task.batch(self._test, rows))

    def score(self, x: Flat, last: bool) -> Scored:
        self.oracle.load(x)
        loss, correct, count = 0.0, 0, 0
        # rows of a length together: less padding to compute
        by_length = np.argsort(np.diff(self._test.starts), kind="stable")
        for start in range(0, len(by_length), EVALUATION_BATCH):
            rows = by_length[start : start + EVALUATION_BATCH]
            batch_loss, right, n = self._task.score(self._task.batch(self._test, rows))
            loss, correct, count = loss + batch_loss, correct + right, count + n
        return Scored(loss / count, correct / count, len(self._test), self._rouge(last))

    def export(self, directory: Path) -> None:
        self._trained.export(directory)

    def _rouge(self, last: bool) -> float | None:
        """Of the answers that the model writes, if the experiment asks for them."""
        if not (last and self._data.generate):
            return None
        return answers.rouge_l(self._trained, self._test, self._data)
