"""What a causal model answers by itself, and how much of the true answer is in it.

Answers are greedy: the most likely token, again and again.  Rouge-L is the F1 of the
longest common subsequence of words, of the ``rouge-score`` package without a stemmer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from node import base as base_models
from node.model import TrainedModel
from node.tokens import Tokens, padded
from protocol.errors import DataError, ModelError
from protocol.experiment import Data

BATCH = 16  # answers written at once


def check(trained: TrainedModel, data: Data) -> None:
    """Find out before the run what would fail at its end.

    Raises:
        DataError: the package for Rouge-L is not installed.
        ModelError: prompt and answer are more tokens than the model has positions.
    """
    if not data.generate:
        return
    if importlib.util.find_spec("rouge_score") is None:
        raise DataError('data.generate needs a package: pip install "seedwire[rouge]"')
    has = getattr(trained.core.config, "max_position_embeddings", None)
    length = data.max_length + data.generate
    if has is not None and length > has:
        raise ModelError(
            f"data.max_length {data.max_length} and data.generate {data.generate} "
            f"are more than the model's {has} positions"
        )


def rouge_l(trained: TrainedModel, tokens: Tokens, data: Data) -> float:
    """Mean Rouge-L of greedy answers to the first examples, 0 to 1.

    The true answer is that of the tokens: cut, if it was cut to ``data.max_length``.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    count = min(data.generate_examples, len(tokens))
    wanted = [_text(trained, tokens.row(i)[tokens.labels[i] :]) for i in range(count)]
    written = [
        answer
        for start in range(0, count, BATCH)
        for answer in _answers(trained, tokens, range(start, min(start + BATCH, count)), data)
    ]
    pairs = zip(wanted, written, strict=True)
    return sum(float(scorer.score(*pair)["rougeL"].fmeasure) for pair in pairs) / count


@torch.no_grad()
def _answers(trained: TrainedModel, tokens: Tokens, rows: range, data: Data) -> list[str]:
    """Greedy answers to what is before the answers of these rows."""
    contexts = [tokens.row(i)[: tokens.labels[i]] for i in rows]
    arrays = padded(contexts, trained.tokenizer.pad_token_id, left=True)
    device = trained.parameters[0].device
    inputs = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
    with base_models.quiet(), _greedy(trained, data.generate):
        ids = trained.core.generate(**inputs)
    return [_text(trained, row[arrays["input_ids"].shape[1] :]) for row in ids.cpu().numpy()]


@contextmanager
def _greedy(trained: TrainedModel, count: int) -> Iterator[None]:
    """No sampling, penalties or other habits that the checkpoint came with."""
    core, special = trained.core, trained.tokenizer
    before = core.generation_config
    make: Any = transformers.GenerationConfig  # not typed
    core.generation_config = make(
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=special.pad_token_id,
        eos_token_id=special.eos_token_id,
    )
    try:
        yield
    finally:
        core.generation_config = before


def _text(trained: TrainedModel, ids: np.ndarray[Any, Any]) -> str:
    text: str = trained.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return text
