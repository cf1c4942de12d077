"""From examples to a loss, for one model: what every task offers, and which there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from node.causal import CausalTask
from node.classify import TextTask
from node.data import Examples
from node.model import TrainedModel
from node.tokens import Batch, Tokens
from protocol.experiment import Data

__all__ = ["Batch", "Task", "TextTask", "Tokens", "build"]


class Task(Protocol):
    """What the oracle and the worker ask of a task.

    Attributes:
        label_rows: output heads of which only some rows are wanted, see ``Shifter``.
    """

    label_rows: dict[nn.Module, torch.Tensor]

    def tokenise(self, examples: Examples) -> Tokens:
        """Tokenise a whole shard, once."""

    def batch(self, tokens: Tokens, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Gather rows and pad them."""

    def encode(self, examples: Examples) -> Batch:
        """All the examples as one batch."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy over the batch's weight, fp32."""

    def score(self, batch: Batch) -> tuple[float, int, int]:
        """Sum of the losses, how many predictions are right, and how many there are."""


def build(trained: TrainedModel, data: Data, classes: Sequence[str]) -> Task:
    """The task of an experiment.

    Raises:
        DataError: template, words or lengths do not fit the data or the model.
        ModelError: the model or its tokenizer cannot do the task.
    """
    if data.task == "causal":
        return CausalTask(trained, data)
    return TextTask(trained, data, classes)
