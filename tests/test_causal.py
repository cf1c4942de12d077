"""Causal language modelling: what is scored, and the same loss as transformers' own."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from node import chunked, model, task
from node.causal import IGNORED, CausalTask
from node.data import Examples
from node.model import TrainedModel
from node.oracle import TorchOracle
from node.tokens import Batch
from protocol.errors import DataError, ModelError
from protocol.experiment import Compute, Data, Model, Peft
from protocol.noise import Direction

torch.set_num_threads(1)
PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning", "ignore:fan_in_fan_out:UserWarning"
)

PLAIN = Data(id="x", task="causal", max_length=120)
ASKED = Data(id="x", task="causal", prompt="q", template="Q: {prompt} A:{text}", max_length=120)
TEXTS = ["a short one", "one of a middling length, " * 2, "one that is long enough to be cut " * 8]
VOCABULARY = 512
NAMES = pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "qwen2-tiny", "opt-tiny"])
EOS = "</s>"


def examples(texts: list[str], prompts: list[str] | None = None) -> Examples:
    return Examples(texts, np.zeros(len(texts), dtype=np.int64), prompts or [])


def loaded(
    name: str, data: Data = PLAIN, peft: Peft | None = None
) -> tuple[TrainedModel, CausalTask]:
    trained = model.load(
        Model(id=f"random:{name}"), peft or Peft(rank=2), data, 0, device="cpu", seed=0
    )
    for key, parameter in enumerate(trained.parameters):  # LoRA's B off zero
        with torch.no_grad():
            wave = torch.sin(key + torch.arange(parameter.numel()))
            parameter.add_(0.05 * wave.view_as(parameter))
    made = task.build(trained, data, ())
    assert isinstance(made, CausalTask)
    return trained, made


def shown(trained: TrainedModel, batch: Batch) -> list[str]:
    """The tokens that are scored, row by row, as text."""
    rows = [row[row != IGNORED].tolist() for row in batch.labels]
    return [trained.tokenizer.decode(row) for row in rows]


# --- what is scored --------------------------------------------------------------


def test_a_row_goes_in_without_its_last_token_and_is_scored_on_all_but_its_first() -> None:
    trained, made = loaded("llama-tiny")
    a, b, c = trained.tokenizer("abc")["input_ids"]
    end, pad = trained.tokenizer.eos_token_id, trained.tokenizer.pad_token_id
    batch = made.encode(examples(["abc", "b"]))
    assert batch.inputs["input_ids"].tolist() == [[a, b, c], [b, pad, pad]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[b, c, end], [end, IGNORED, IGNORED]]
    assert (batch.counts, batch.weight, len(batch)) == ((3, 1), 4, 2)


def test_what_is_before_the_answer_is_read_and_not_scored() -> None:
    trained, made = loaded("gpt2-tiny", ASKED)
    batch = made.encode(examples(["four", " 5 {text}"], ["2+2?", ""]))
    assert shown(trained, batch) == [f"four{EOS}", f" 5 {{text}}{EOS}"]
    read = trained.tokenizer.decode(batch.inputs["input_ids"][0][: len("Q: 2+2? A:four")])
    assert read == "Q: 2+2? A:four"
    assert batch.counts == (5, 10)
    constant = Data(id="x", task="causal", template="Say:{text}")
    trained, made = loaded("gpt2-tiny", constant)
    assert shown(trained, made.encode(examples(["no"]))) == [f"no{EOS}"]


def test_a_token_of_both_sides_is_the_answers() -> None:
    trained, made = loaded("gpt2-tiny", Data(id="x", task="causal", template="It was {text}"))
    batch = made.encode(examples(["great", "odd"]))  # " great" is one token
    assert shown(trained, batch) == [f" great{EOS}", f"odd{EOS}"]
    assert batch.counts == (2, 4)


def test_an_answer_is_cut_at_its_end_and_then_has_no_end_of_sequence() -> None:
    data = Data(id="x", task="causal", prompt="q", template="{prompt}{text}", max_length=6)
    trained, made = loaded("gpt2-tiny", data)
    batch = made.encode(examples(["abcdef", "abc", "abcd"], ["12", "12", "12"]))
    assert shown(trained, batch) == ["abcd", f"abc{EOS}", "abcd"]


def test_an_answer_without_room_is_dropped_in_one_line_and_none_left_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Data(id="x", task="causal", prompt="q", template="{prompt}{text}", max_length=4)
    trained, made = loaded("gpt2-tiny", data)
    with caplog.at_level(logging.WARNING):
        tokens = made.tokenise(examples(["ab", "cd", "e"], ["1234", "123", ""]))
    assert shown(trained, made.batch(tokens, range(2))) == ["c", EOS]  # nothing is before "e"
    (line,) = caplog.messages
    assert line == (
        "1 of 3 examples dropped: data.max_length 4 leaves no token of the answer to score"
    )
    with pytest.raises(DataError, match=r"leaves no token .* in any of 2 examples"):
        made.tokenise(examples(["ab", "cd"], ["1234", "12345"]))


def test_a_tokenizer_that_ends_rows_by_itself_is_not_helped() -> None:
    trained, made = loaded("gpt2-tiny")
    inner = trained.tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    batch = made.encode(examples(["ab"]))
    assert batch.inputs["input_ids"][0, 0] == 1
    assert shown(trained, batch) == [f"ab{EOS}"]  # after a first token, all of the text


def test_a_slow_tokenizer_is_refused() -> None:
    trained, _ = loaded("gpt2-tiny")
    trained.tokenizer = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ModelError, match="fast tokenizer"):
        CausalTask(trained, PLAIN)


# --- the loss --------------------------------------------------------------------


def theirs(trained: TrainedModel, made: CausalTask, data: Examples) -> torch.Tensor:
    """The loss of transformers, on whole rows with -100 where nothing is scored."""
    tokens = made.tokenise(data)
    width = max(len(tokens.row(i)) for i in range(len(tokens)))
    ids = torch.zeros((len(tokens), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i in range(len(tokens)):
        row = torch.from_numpy(tokens.row(i).astype(np.int64))
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        begin = int(tokens.labels[i])
        labels[i, begin : len(row)] = row[begin:]
    loss: torch.Tensor = trained.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


PEFTS = {
    "LoRA": Peft(rank=2),
    "full": Peft(kind="full"),
    "LoRA on the head": Peft(rank=2, targets=("lm_head",)),
}


@PEFT_WARNS
@NAMES
@pytest.mark.parametrize("kind", PEFTS)
def test_loss_and_gradients_are_those_of_transformers(name: str, kind: str) -> None:
    trained, made = loaded(name, ASKED, PEFTS[kind])
    data = examples(TEXTS, ["short?", "what is it? " * 4, ""])
    batch = made.encode(data)
    assert batch.weight > chunked.CHUNK  # more than one chunk, the last one not full
    ours, own = made.loss(batch), theirs(trained, made, data)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    for got, want in zip(
        torch.autograd.grad(ours, trained.parameters),
        torch.autograd.grad(own, trained.parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_the_mean_over_tokens_by_hand() -> None:
    trained, made = loaded("llama-tiny")
    batch = made.encode(examples(["abc", "b"]))
    with torch.no_grad():
        loss = made.loss(batch)
        logits = trained.model(**batch.inputs).logits  # without ``scored`` all is as before
    at = functional.log_softmax(logits, dim=2)
    (a, b, c), (d, *_) = batch.labels.tolist()
    by_hand = -(at[0, 0, a] + at[0, 1, b] + at[0, 2, c] + at[1, 0, d]) / 4
    torch.testing.assert_close(loss, by_hand)


def test_score_is_sums_over_tokens() -> None:
    trained, made = loaded("gpt2-tiny", ASKED)
    batch = made.encode(examples(TEXTS, ["a", "b", "c"]))
    with torch.no_grad():
        logits = trained.model(**batch.inputs).logits
    flat, labels = logits.reshape(-1, VOCABULARY), batch.labels.reshape(-1)
    batch.labels[2, 100] = logits[2, 100].argmax()  # one at least is right
    want = functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
    loss, right, count = made.score(batch)
    assert loss == pytest.approx(float(want), rel=1e-5)
    assert right == int((flat.argmax(1) == labels).sum()) > 0
    assert count == batch.weight == int((labels != IGNORED).sum())


@NAMES
def test_padding_and_parts_do_not_change_the_loss(name: str) -> None:
    _, made = loaded(name)
    data = examples([*TEXTS, "x", "yz"])
    batch = made.encode(data)
    with torch.no_grad():
        whole = made.loss(batch)
        alone = [made.encode(data.take([i])) for i in range(5)]
        for parts in (alone, list(batch.parts(2)), list(batch.parts(9))):
            assert sum(len(part) for part in parts) == 5
            shares = [part.weight / batch.weight for part in parts]
            losses = [share * made.loss(part)
                      for part, share in zip(parts, shares, strict=True)]  # fmt: skip
            torch.testing.assert_close(sum(losses), whole, rtol=1e-5, atol=0)
    assert [part.counts for part in batch.parts(2)] == [
        batch.counts[:2], batch.counts[2:4], batch.counts[4:]
    ]  # fmt: skip


def test_parts_of_a_classification_weigh_by_examples() -> None:
    batch = Batch({"input_ids": torch.arange(5)[:, None], "use_cache": False}, torch.arange(5))
    parts = list(batch.parts(2))
    assert [part.weight for part in parts] == [2, 2, 1]
    assert [part.labels.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.inputs["input_ids"].tolist() for part in parts] == [[[0], [1]], [[2], [3]], [[4]]]
    assert parts[0].inputs["use_cache"] is False


# --- memory, and other tensors in the head ----------------------------------------


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("with_grad", [True, False])
def test_no_more_logits_than_a_chunk_exist_at_any_time(with_grad: bool) -> None:
    trained, made = loaded("llama-tiny")
    batch = made.encode(examples(TEXTS * 4))
    assert batch.weight > 3 * chunked.CHUNK
    with torch.set_grad_enabled(with_grad), Widest() as ours:
        loss = made.loss(batch)
        if with_grad:
            torch.autograd.grad(loss, trained.parameters)
    assert ours.rows == chunked.CHUNK
    with torch.no_grad(), Widest() as scored:
        made.score(batch)
    assert scored.rows == chunked.CHUNK
    with torch.no_grad(), Widest() as own:  # the measure sees what is avoided
        trained.model(**batch.inputs)
    assert own.rows == batch.labels.numel()


def test_backpropagation_keeps_no_logits() -> None:
    _, made = loaded("llama-tiny")
    batch = made.encode(examples(TEXTS * 4))
    kept: list[torch.Size] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made.loss(batch)
    wide = [shape for shape in kept if len(shape) > 1 and shape[-1] == VOCABULARY]
    assert kept
    assert not wide


class Followed(torch.Tensor):
    """A tensor that asks to be told of every function; what it meets becomes one too."""

    names: set[str] = set()  # noqa: RUF012 - one list for all of them

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Followed.names.add(func.__name__)
        follow: Any = super().__torch_function__
        return follow(func, types, args, kwargs or {})


def test_a_tensor_of_another_kind_comes_out_as_that_kind() -> None:
    trained, made = loaded("gpt2-tiny")
    batch = made.encode(examples(TEXTS))
    head = trained.core.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden, scored: forward(hidden.as_subclass(Followed), scored)
    Followed.names = set()
    with torch.no_grad():
        loss = made.loss(batch)
    head.forward = forward
    assert isinstance(loss, Followed)
    assert Followed.names <= {
        *("reshape", "__get__", "__getitem__", "split", "linear", "float", "cross_entropy"),
        *("add", "div", "__truediv__"),
    }
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), made.loss(batch))


@PEFT_WARNS
@pytest.mark.parametrize("kind", PEFTS)
def test_perturbed_inference_reaches_the_head_in_every_chunk(kind: str) -> None:
    trained, made = loaded("gpt2-tiny", PLAIN, PEFTS[kind])  # tied
    oracle = TorchOracle(trained, made)
    x, batch = oracle.initial(), made.encode(examples(TEXTS * 2))
    direction = Direction(3, ((0, len(x)),))
    found = oracle.losses(oracle.start(x), [direction], (0.01, -0.01), batch)[0]
    for offset, loss in zip((0.01, -0.01), found, strict=True):
        moved = x + np.float32(offset) * direction.dense(len(x))
        assert loss == oracle.loss(torch.from_numpy(moved), batch)
    assert len(set(found)) == 2


@PEFT_WARNS
@pytest.mark.parametrize("kind", PEFTS)
def test_forward_mode_and_micro_batches_agree_with_backpropagation(kind: str) -> None:
    trained, made = loaded("gpt2-tiny", PLAIN, PEFTS[kind])
    oracle = TorchOracle(trained, made, Compute(micro_batch=2, checkpointing=True))
    x, batch = oracle.initial(), made.encode(examples([*TEXTS, TEXTS[2], "yz"]))
    assert max(part.weight for part in batch.parts(2)) > chunked.CHUNK
    with torch.no_grad():
        whole = float(made.loss(batch))
    loss, gradient = oracle.grad(oracle.start(x), batch)
    assert loss == pytest.approx(whole, rel=1e-5)
    directions = [Direction(key, ((0, len(x)),)) for key in (1, 2)]
    primal, slopes = oracle.jvp(oracle.start(x), directions, batch)
    assert primal == pytest.approx(whole, rel=1e-5)
    for slope, direction in zip(slopes, directions, strict=True):
        along = gradient.double() @ torch.from_numpy(direction.dense(len(x))).double()
        assert slope == pytest.approx(float(along), rel=1e-3)


# --- models that do something else with their logits --------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
SIZES |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_model_that_scales_or_caps_its_logits_is_refused(family: str) -> None:
    config = transformers.AutoConfig.for_model(
        family, **SIZES, pad_token_id=0, **({"logits_scaling": 8.0} if family == "granite" else {})
    )
    auto: Any = transformers.AutoModelForCausalLM
    core = auto.from_config(config)
    before = core.get_output_embeddings().forward
    with pytest.raises(ModelError, match="scales or caps the logits"):
        chunked.install(core)
    assert core.get_output_embeddings().forward == before


def test_a_head_over_something_else_is_refused() -> None:
    trained = model.load(
        Model(id="random:llama-tiny"), Peft(rank=2), PLAIN, 0, device="cpu", seed=0
    )
    head = trained.core.get_output_embeddings()
    head.register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    with pytest.raises(ModelError, match="not over its base model's output"):
        CausalTask(trained, PLAIN)
