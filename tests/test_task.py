"""From examples to a loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from node import model
from node.data import Examples
from node.model import TrainedModel
from node.task import TextTask
from protocol.errors import DataError
from protocol.experiment import Data, Model, Peft

torch.set_num_threads(1)

CLASSIFY = Data(id="x", max_length=32)
PROMPT = Data(
    id="x",
    task="prompt",
    template="Review: {text} It was",
    words=(" terrible", " great"),
    max_length=40,
)
TEXTS = ["short", "a text of middling length", "a text so long that it does not fit " * 4]
EXAMPLES = Examples(TEXTS, np.array([0, 1, 1]))


LORA = Peft()


def _load(name: str, data: Data, peft: Peft = LORA) -> TrainedModel:
    return model.load(Model(id=f"random:{name}"), peft, data, 2, device="cpu", seed=0)


def _task(name: str, data: Data) -> tuple[TrainedModel, TextTask]:
    trained = _load(name, data)
    return trained, TextTask(trained, data, ("0", "1"))


def _texts(task: TextTask, trained: TrainedModel, examples: Examples) -> list[str]:
    tokens = task.tokenise(examples)
    return [trained.tokenizer.decode(tokens.row(i)) for i in range(len(tokens))]


@pytest.mark.parametrize("max_length", [16, 17, 18, 25, 40, 64])
def test_the_template_is_never_cut(max_length: int) -> None:
    config = Data(id="x", task="prompt", template="Review: {text} It was",
                  words=(" terrible", " great"), max_length=max_length)  # fmt: skip
    trained, task = _task("gpt2-tiny", config)
    for text, whole in zip(_texts(task, trained, EXAMPLES), TEXTS, strict=True):
        assert text.startswith("Review: ")
        assert text.endswith(" It was")
        assert whole.startswith(text[len("Review: ") : -len(" It was")])
    sizes = np.diff(task.tokenise(EXAMPLES).starts)
    assert sizes.max() == max_length


def test_braces_and_template_words_in_a_text_do_no_harm() -> None:
    trained, task = _task("gpt2-tiny", PROMPT)
    nasty = Examples(["{text} It was {0}", "\u00e9\U0001f600" * 30], np.array([0, 1]))
    first, second = _texts(task, trained, nasty)
    assert first == "Review: {text} It was {0} It was"
    assert second.endswith(" It was")
    assert len(task.tokenise(nasty).row(1)) == PROMPT.max_length


def test_a_template_that_a_text_breaks_into_more_tokens_still_fits() -> None:
    # " great" is one token of the bare template; a text in its midst leaves four.
    config = Data(id="x", task="prompt", template="It was gr{text}eat",
                  words=(" terrible", " great"), max_length=8)  # fmt: skip
    trained, task = _task("gpt2-tiny", config)
    assert _texts(task, trained, Examples(["xx"], np.array([0]))) == ["It was great"]


def test_a_template_that_fills_max_length_is_refused() -> None:
    config = Data(id="x", task="prompt", template="Review: {text} It was",
                  words=(" terrible", " great"), max_length=15)  # fmt: skip
    with pytest.raises(DataError, match="leaves no room"):
        _task("gpt2-tiny", config)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((" great",), "1 words for 2 classes"),
        ((" great", " awful"), "' awful' is .* tokens; it must be one"),
        ((" great", " great"), "the same token"),
    ],
)
def test_words_that_cannot_be_scored_are_refused(words: tuple[str, ...], why: str) -> None:
    config = Data(id="x", task="prompt", template="{text} It was", words=words)
    with pytest.raises(DataError, match=why):
        TextTask(_load("gpt2-tiny", PROMPT), config, ("0", "1"))


def test_a_template_with_two_slots_is_refused() -> None:
    config = Data(id="x", task="prompt", template="{text} {text}", words=PROMPT.words)
    with pytest.raises(DataError, match="once"):
        TextTask(_load("gpt2-tiny", PROMPT), config, ("0", "1"))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert-tiny", CLASSIFY),
        ("llama-tiny", CLASSIFY),
        ("gpt2-tiny", PROMPT),
        ("opt-tiny", PROMPT),
        ("llama-tiny", PROMPT),
    ],
)
def test_padding_does_not_change_an_examples_score(name: str, config: Data) -> None:
    _, task = _task(name, config)
    with torch.inference_mode():
        together = task.logits(task.encode(EXAMPLES))
        alone = [task.logits(task.encode(EXAMPLES.take([i]))) for i in range(3)]
    assert together.shape == (3, 2)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "peft"),
    [
        ("gpt2-tiny", Peft()),
        ("opt-tiny", Peft(kind="full")),
        ("llama-tiny", Peft(targets=("lm_head",))),
    ],
    ids=["LoRA", "full", "LoRA on the head"],
)
def test_prompt_scores_are_the_label_words_logits_at_the_last_position(
    name: str, peft: Peft
) -> None:
    trained = _load(name, PROMPT, peft)
    ids = trained.tokenizer("Review: short It was", return_tensors="pt")["input_ids"]
    words = [trained.tokenizer(word)["input_ids"][0] for word in PROMPT.words]
    with torch.inference_mode():
        expected = trained.model(ids).logits[:, -1, words]
        task = TextTask(trained, PROMPT, ("0", "1"))  # from here on the head scores the words
        scores = task.logits(task.encode(EXAMPLES.take([0])))
        assert trained.model(ids).logits.shape == (1, len(words))
    torch.testing.assert_close(scores, expected)


def test_a_batch_gathers_rows_by_number_and_pads_to_its_own_longest() -> None:
    _, task = _task("bert-tiny", CLASSIFY)
    tokens = task.tokenise(EXAMPLES)
    batch = task.batch(tokens, [1, 0])
    assert batch.labels.tolist() == [1, 0]
    assert batch.inputs["input_ids"].shape == (2, len(tokens.row(1)))
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [
        len(tokens.row(1)),
        len(tokens.row(0)),
    ]
    assert task.encode(EXAMPLES).inputs["input_ids"].shape == (3, CLASSIFY.max_length)


@pytest.mark.parametrize(("name", "config"), [("bert-tiny", CLASSIFY), ("llama-tiny", PROMPT)])
def test_loss_is_mean_cross_entropy_and_score_its_sum(name: str, config: Data) -> None:
    _, task = _task(name, config)
    batch = task.encode(EXAMPLES)
    scores = task.logits(batch).detach()
    by_hand = -functional.log_softmax(scores, dim=1)[range(3), [0, 1, 1]]
    loss = task.loss(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), by_hand.mean())
    loss_sum, correct, count = task.score(batch)
    assert loss_sum == pytest.approx(float(by_hand.sum()), rel=1e-5)
    assert correct == int((scores.argmax(1) == batch.labels).sum())
    assert count == len(batch) == 3
