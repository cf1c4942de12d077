"""What a worker trains and scores: a model with the data of its clients.

``load`` is where a node imports torch; tests put a model of a few numbers in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedalgos.method import Batch, Oracle
from node.partition import Indices
from protocol.experiment import Experiment
from protocol.parts import TensorInfo
from protocol.payload import Flat

if TYPE_CHECKING:
    from node.engine import Setup


@dataclass(frozen=True, slots=True)
class Scored:
    """The test set's mean loss, share of hits, number of examples, and Rouge-L if asked."""

    loss: float
    metric: float
    examples: int
    rouge_l: float | None = None


class Trainee(Protocol):
    """A loaded model and its data.

    Attributes:
        infos: the trained tensors, in order.
        oracle: of the model's losses and derivatives.
    """

    infos: tuple[TensorInfo, ...]

    @property
    def oracle(self) -> Oracle: ...

    def initial(self) -> Flat:
        """The parameters that the model was loaded with, (size,); ask before anything else."""
        ...

    def num_examples(self, client: int) -> int: ...

    def batch(self, client: int, rows: Indices) -> Batch:
        """These rows of a client's training data."""
        ...

    def deal(self, mesh: Any) -> None:
        """Leave each rank of a group its part of the frozen weights."""
        ...

    def probe(self, batch_size: int) -> None:
        """Infer on one batch of test data: what memory is measured against."""
        ...

    def score(self, x: Flat, last: bool) -> Scored:
        """Evaluate parameters on the test set; ``last`` has answers written too."""
        ...

    def export(self, directory: Path) -> None:
        """Save the model as scored last."""
        ...


def load(experiment: Experiment, setup: Setup) -> Trainee:
    """Model and data as the experiment names them; this takes seconds to minutes.

    Raises:
        SeedwireError: the model or the data is not there or does not fit.
    """
    from node import data, sources

    # what is not there is told before torch is loaded, which takes seconds and memory
    if not experiment.model.id.startswith("random:"):
        sources.resolve_model(experiment.model.id)
    shards = data.load(experiment.data, experiment.partition, setup.clients)
    from node.transformer import Transformer  # loads torch

    return Transformer(experiment, setup, shards)
