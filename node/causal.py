"""Causal language modelling: the next token of a text, at every place of its answer.

An example is the template with its text, tokenised whole and followed by the
end-of-sequence token.  What is before the text, a prompt for one, is read and not
scored.  A row enters the model without its last token, whose successor nobody knows;
the labels are the row without its first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from node import chunked, uncached
from node.chunked import Scored
from node.data import Examples
from node.model import TrainedModel
from node.tokens import Batch, Tokens, pad, padded
from protocol.errors import DataError, ModelError
from protocol.experiment import Data

IGNORED = -100  # the label of a place that is not scored, as in transformers

log = logging.getLogger(__name__)


class CausalTask:
    """Next tokens of an answer, given the answer so far and perhaps a prompt."""

    def __init__(self, trained: TrainedModel, data: Data) -> None:
        """Prepare the model's head to take the answer's places only, in chunks.

        Raises:
            ModelError: the tokenizer cannot say which characters a token covers, or the
                model does more to its logits than its output head.
        """
        self._model, self._tokenizer, self._data = trained.model, trained.tokenizer, data
        if not self._tokenizer.is_fast:
            raise ModelError("data.task causal needs a fast tokenizer, which knows its offsets")
        self._device = torch.device(trained.device)
        self._fixed = uncached.arguments(trained.core)
        self.label_rows: dict[nn.Module, torch.Tensor] = {}  # of the head all rows are wanted
        chunked.install(trained.core)

    def tokenise(self, examples: Examples) -> Tokens:
        """Tokenise a whole shard; drops what ``max_length`` leaves no token to score of.

        Raises:
            DataError: nothing is left.
        """
        rows = [
            (ids[: self._data.max_length], begin)
            for ids, begin in self._encoded(examples)
            if begin < min(len(ids), self._data.max_length)
        ]
        dropped = len(examples) - len(rows)
        why = f"data.max_length {self._data.max_length} leaves no token of the answer to score"
        if not rows:
            raise DataError(f"{why} in any of {dropped} examples")
        if dropped:
            log.warning("%d of %d examples dropped: %s", dropped, len(examples), why)
        return Tokens.of([ids for ids, _ in rows], np.array([b for _, b in rows], dtype=np.int64))

    def batch(self, tokens: Tokens, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Gather rows and pad them on the right to the longest."""
        rows = [tokens.row(int(i)) for i in indices]
        begins = [int(tokens.labels[int(i)]) for i in indices]
        arrays = padded([row[:-1] for row in rows], self._tokenizer.pad_token_id)
        inputs = {k: torch.from_numpy(v).to(self._device) for k, v in arrays.items()}
        labels = pad([row[1:] for row in rows], IGNORED)
        for label, begin in zip(labels, begins, strict=True):
            label[: begin - 1] = IGNORED
        counts = tuple(len(row) - begin for row, begin in zip(rows, begins, strict=True))
        return Batch(inputs | self._fixed, torch.from_numpy(labels).to(self._device), counts)

    def encode(self, examples: Examples) -> Batch:
        """All the examples as one batch."""
        tokens = self.tokenise(examples)
        return self.batch(tokens, range(len(tokens)))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy over the batch's scored tokens, fp32."""
        scored = _scored(batch, chunked.cross_entropy)
        total: torch.Tensor = self._model(**batch.inputs, scored=scored)
        return total / batch.weight

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[float, int, int]:
        """Sum of the losses, how many tokens are right, and how many are scored."""
        loss, right = self._model(**batch.inputs, scored=_scored(batch, chunked.loss_and_right))
        return float(loss), int(right), batch.weight

    def _encoded(self, examples: Examples) -> list[tuple[list[int], int]]:
        """Token numbers of each example, and the first of them that is scored.

        Tokenised whole, because a word after a space is another token than a word by
        itself.  A token that covers characters of both sides counts as the answer's.
        """
        contexts = self._contexts(examples)
        encoded = self._tokenizer(
            [before + text for before, text in zip(contexts, examples.texts, strict=True)],
            return_offsets_mapping=True,
            verbose=False,  # it warns of long texts, which are cut later
        )
        end = self._tokenizer.eos_token_id
        rows = []
        for before, ids, offsets in zip(
            contexts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(before)), len(ids))
            # Nothing predicts the first token of a row.
            begin = max(first, 1)
            is_ended = end is None or ids[-1:] == [end]
            rows.append((ids if is_ended else [*ids, end], begin))
        return rows

    def _contexts(self, examples: Examples) -> list[str]:
        """What is before each text: the template, with the prompt in it."""
        context = self._data.template.removesuffix("{text}")
        if not self._data.prompt:
            return [context] * len(examples)
        before, after = context.split("{prompt}")
        return [before + prompt + after for prompt in examples.prompts]


def _scored(batch: Batch, measure: chunked.Measure) -> Scored:
    flat = batch.labels.reshape(-1)
    places = (flat != IGNORED).nonzero()[:, 0]
    return Scored(places, flat[places], measure)
