"""Classification of texts: by a head, or by the label word that is due after a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from node import uncached
from node.data import Examples
from node.model import TrainedModel
from node.tokens import Batch, Tokens, padded, positions
from protocol.errors import DataError, ModelError
from protocol.experiment import Data

_SLOT = "{text}"


class TextTask:
    """Classification of texts: by a head, or by the label word that ends a prompt."""

    def __init__(self, trained: TrainedModel, data: Data, classes: Sequence[str]) -> None:
        """Check that template, words and model fit together.

        Raises:
            DataError: a label word is not one token, words and classes differ in
                number, or the template leaves no room for the text.
            ModelError: the tokenizer cannot say which characters a token covers.
        """
        self._model = trained.model
        self._tokenizer = trained.tokenizer
        self._data = data
        self._is_prompt = data.task == "prompt"
        self._device = torch.device(trained.device)
        self._words = torch.tensor(self._word_ids(classes), device=self._device)
        takes = inspect.signature(trained.core.forward).parameters
        self._fixed = uncached.arguments(trained.core)
        self.label_rows: dict[nn.Module, torch.Tensor] = {}  # of output heads: see Shifter
        if self._is_prompt:
            head = trained.core.get_output_embeddings()
            head.forward = _LabelHead(head, self._words)
            if type(head) is nn.Linear:
                self.label_rows[head] = self._words
        self._template_ids: list[int] = []
        self._wants_positions = self._is_prompt and "position_ids" in takes
        if self._is_prompt:
            self._check_template()

    def tokenise(self, examples: Examples) -> Tokens:
        """Tokenise a whole shard, once."""
        if self._is_prompt:
            rows = self._prompts(examples.texts)
        else:
            rows = self._tokenizer(
                examples.texts, truncation=True, max_length=self._data.max_length
            )["input_ids"]
        return Tokens.of(rows, examples.labels)

    def batch(self, tokens: Tokens, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Gather rows and pad them to the longest: a prompt on the left, else on the right."""
        rows = [tokens.row(int(i)) for i in indices]
        arrays = padded(rows, self._tokenizer.pad_token_id, left=self._is_prompt)
        if self._wants_positions:
            arrays["position_ids"] = positions(arrays["attention_mask"])
        inputs = {k: torch.from_numpy(v).to(self._device) for k, v in arrays.items()}
        labels = torch.from_numpy(tokens.labels[np.asarray(indices, dtype=np.int64)])
        return Batch(inputs | self._fixed, labels.to(self._device))

    def encode(self, examples: Examples) -> Batch:
        """All the examples as one batch."""
        return self.batch(self.tokenise(examples), range(len(examples)))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Scores of the classes in fp32, of shape (n, classes)."""
        scores: torch.Tensor = self._model(**batch.inputs).logits
        return scores.float()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy, fp32."""
        return functional.cross_entropy(self.logits(batch), batch.labels)

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[float, int, int]:
        """Sum of the losses, how many are right, and how many there are."""
        scores = self.logits(batch)
        loss = functional.cross_entropy(scores, batch.labels, reduction="sum")
        correct = (scores.argmax(dim=1) == batch.labels).sum()
        return float(loss), int(correct), len(batch)

    def _word_ids(self, classes: Sequence[str]) -> list[int]:
        words = self._data.words
        if not self._is_prompt:
            return []
        if len(words) != len(classes):
            raise DataError(
                f"data.words has {len(words)} words for {len(classes)} classes: "
                f"{', '.join(classes[:20])}"
            )
        ids = []
        for word in words:
            pieces = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(pieces) != 1:
                raise DataError(f"data.words: {word!r} is {len(pieces)} tokens; it must be one")
            ids += pieces
        if len(set(ids)) < len(ids):
            raise DataError(f"data.words: two of {', '.join(map(repr, words))} are the same token")
        return ids

    def _check_template(self) -> None:
        if not self._tokenizer.is_fast:
            raise ModelError("data.task prompt needs a fast tokenizer, which knows its offsets")
        if self._data.template.count(_SLOT) != 1:
            raise DataError(f"data.template must contain {_SLOT} once")
        (self._template_ids,) = self._prompts([""])
        length = len(self._template_ids)
        if length >= self._data.max_length:
            raise DataError(
                f"data.max_length {self._data.max_length} leaves no room for the text: "
                f"the template alone takes {length} tokens"
            )

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Fill the template, tokenise it whole, and cut only tokens of the text.

        Tokenised whole, because a word after a space is another token than a word by
        itself.  A token that also covers a character of the template is not cut.
        """
        before, after = self._data.template.split(_SLOT)
        # One call per shard: the tokenizer works through the list in compiled code.
        encoded = self._tokenizer(
            [before + text + after for text in texts],
            return_offsets_mapping=True,
            verbose=False,  # it warns of long texts, which are cut below
        )
        return [
            self._cut(ids, offsets, len(before), len(before) + len(text))
            for ids, offsets, text in zip(
                encoded["input_ids"], encoded["offset_mapping"], texts, strict=True
            )
        ]

    def _cut(
        self, ids: list[int], offsets: list[tuple[int, int]], start: int, end: int
    ) -> list[int]:
        size = len(ids)
        while size and offsets[size - 1][0] == offsets[size - 1][1]:
            size -= 1  # an end-of-sequence token that the tokenizer adds by itself
        excess = size - self._data.max_length
        if excess <= 0 or start == end:
            return ids[:size]
        inside = [i for i in range(size) if start <= offsets[i][0] < offsets[i][1] <= end]
        if excess > len(inside):
            return self._template_ids
        return ids[: inside[-1] + 1 - excess] + ids[inside[-1] + 1 : size]


class _LabelHead:
    """An output head that scores the label words at the last position, and nothing else.

    Of a vocabulary of 49,152 words and a length of 128 that is a millionth of the work,
    and in forward mode it saves a copy of the head for each row.
    """

    def __init__(self, head: nn.Module, words: torch.Tensor) -> None:
        self._head: Any = head
        self._forward, self._words = head.forward, words

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, words) from (n, length, hidden)."""
        last, words = hidden[:, -1], self._words
        if type(self._head) is not nn.Linear:  # LoRA on the head, for one
            scores: torch.Tensor = self._forward(last)
            return scores.index_select(1, words)
        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        return functional.linear(last, weight[words], None if bias is None else bias[words])
