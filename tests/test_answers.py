"""What a causal model writes by itself, and how it is compared."""

from __future__ import annotations

import importlib.util

import msgspec
import numpy as np
import pytest
import torch

from node import answers, model, task
from node.data import Examples
from node.model import TrainedModel
from node.tokens import Tokens
from protocol.errors import DataError, ModelError
from protocol.experiment import Data, Model, Peft

torch.set_num_threads(1)
DATA = Data(id="x", task="causal", prompt="q", template="Q: {prompt} A:{text}", max_length=40,
            generate=6, generate_examples=2)  # fmt: skip
EXAMPLES = Examples(
    [" the cat sat", " a dog", " never asked"],
    np.zeros(3, dtype=np.int64),
    ["who?", "and a much longer question", "?"],
)


def loaded(name: str) -> tuple[TrainedModel, Tokens]:
    trained = model.load(Model(id=f"random:{name}"), Peft(rank=2), DATA, 0, device="cpu", seed=0)
    return trained, task.build(trained, DATA, ()).tokenise(EXAMPLES)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "opt-tiny"])
def test_answers_are_the_most_likely_tokens_one_after_the_other(name: str) -> None:
    trained, tokens = loaded(name)
    trained.core.generation_config.repetition_penalty = 5.0  # of the checkpoint: not obeyed
    written = answers._answers(trained, tokens, range(2), DATA)
    for i in range(2):  # each alone, so that padding would show
        ids = tokens.row(i)[: tokens.labels[i]].tolist()
        read = len(ids)
        with torch.no_grad():
            while len(ids) < read + DATA.generate:
                ids.append(int(trained.core(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[read:]
        end = trained.tokenizer.eos_token_id
        new = new[: new.index(end)] if end in new else new
        assert written[i] == trained.tokenizer.decode(new, skip_special_tokens=True)
    assert trained.core.generation_config.repetition_penalty == 5.0


def test_rouge_l_is_the_mean_over_the_first_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge_score")
    trained, tokens = loaded("llama-tiny")
    said = ["the cat slept and sat", "nothing of it"]
    monkeypatch.setattr(answers, "_answers", lambda *_args: said)
    # the, cat, sat of 5 words written and 3 wanted: F1 is 2 * 3 / 8; then nothing.
    assert answers.rouge_l(trained, tokens, DATA) == pytest.approx((0.75 + 0) / 2)
    monkeypatch.setattr(answers, "_answers", lambda *_args: [said[0]])
    monkeypatch.setattr(answers, "BATCH", 1)
    assert answers.rouge_l(trained, tokens, DATA) == pytest.approx((0.75 + 0) / 2)


def test_what_would_fail_at_the_end_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = loaded("llama-tiny")
    answers.check(trained, msgspec.structs.replace(DATA, generate=512 - 40))
    with pytest.raises(ModelError, match=r"data\.generate 473 are more than .* 512 positions"):
        answers.check(trained, msgspec.structs.replace(DATA, generate=473))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"seedwire\[rouge\]"):
        answers.check(trained, DATA)
    answers.check(trained, msgspec.structs.replace(DATA, generate=0))
