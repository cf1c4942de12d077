"""What is trained: adapters, biases, and how many numbers of each the papers count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from node import adapters, model, shapes
from node.adapters import Adapter
from node.model import TrainedModel
from protocol.errors import ModelError
from protocol.experiment import Data, Model, Peft

torch.set_num_threads(1)
CLASSIFY, PROMPT = Data(id="x", max_length=64), Data(id="x", task="prompt", max_length=64)
ADAPTER, BITFIT = Peft(kind="adapter", rank=4), Peft(kind="bitfit")
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])  # 2 ends a text: T5 wants one


def load(
    name: str,
    peft: Peft,
    data: Data = CLASSIFY,
    *,
    dtype: Any = "fp32",
    seed: int = 0,
) -> TrainedModel:
    model_id = name if "/" in name else f"random:{name}"
    return model.load(Model(id=model_id, dtype=dtype), peft, data, 4, device="cpu", seed=seed)


def logits(net: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net(input_ids=IDS).logits
    return found


def move(trained: TrainedModel) -> None:
    """Away from the first values: an adapter's ``up`` starts at zero."""
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters):
            parameter.add_(0.01 * (i % 7 + 1))


# --- how many, as in FwdLLM's notebooks for four classes ----------------------------


def count(name: str, peft: Peft) -> dict[str, int]:
    """Numbers trained, by tensor, from the configuration alone."""
    auto: Any = AutoModelForSequenceClassification
    base = shapes.skeleton(f"random:{name}", auto, {"num_labels": 4}, torch.float32)
    base.requires_grad_(False)
    whole = adapters.choose(name, base, peft, model._head(base, set()), 0)
    return {n: p.numel() for n, p in whole.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "total"),
    [("bert-base", 105_988), ("albert-base", 13_188), ("roberta-large", 1_325_060)],
)
def test_biases_and_head_are_as_many_as_published(name: str, total: int) -> None:
    found = count(name, BITFIT)
    assert sum(found.values()) == total
    if name == "roberta-large":  # the plotted runs leave the head's inner layer out
        inner = found["classifier.dense.weight"] + found["classifier.dense.bias"]
        assert total - inner == 275_460


def test_distilberts_adapters_of_reduction_16_are_as_many_as_published() -> None:
    found = count("distilbert-base", Peft(kind="adapter", rank=768 // 16))
    added = {n: size for n, size in found.items() if ".adapter." in n}
    assert sum(added.values()) == 6 * 74_544
    classifier = found["classifier.weight"] + found["classifier.bias"]
    assert sum(added.values()) + classifier == 450_340


# --- adapters --------------------------------------------------------------------

ENDS = {
    "bert-tiny": ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
    "roberta-tiny": [f"roberta.encoder.layer.{i}.output.dense" for i in (0, 1)],
    "distilbert-tiny": [f"distilbert.transformer.layer.{i}.ffn.lin2" for i in (0, 1)],
    "albert-tiny": ["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"],
    "gpt2-tiny": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],
    "opt-tiny": ["model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"],
    "llama-tiny": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    "qwen2-tiny": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    "t5-tiny": [
        *(f"transformer.encoder.block.{i}.layer.1.DenseReluDense.wo" for i in (0, 1)),
        *(f"transformer.decoder.block.{i}.layer.2.DenseReluDense.wo" for i in (0, 1)),
    ],
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ENDS)
def test_each_block_gets_one_where_its_feed_forward_part_ends(name: str, dtype: str) -> None:
    trained = load(name, ADAPTER, dtype=dtype)
    found = [n for n, m in trained.core.named_modules() if isinstance(m, Adapter)]
    assert found == [f"{end}.adapter" for end in ENDS[name]]
    units = [info.unit for info in trained.infos if ".adapter." in info.name]
    assert units == [f"{end}.adapter" for end in ENDS[name] for _ in range(4)]
    parts = ["down.weight", "down.bias", "up.weight", "up.bias"]
    names = [info.name for info in trained.infos if ".adapter." in info.name]
    assert names == [f"{end}.adapter.{part}" for end in ENDS[name] for part in parts]
    assert all(p.dtype == torch.float32 for p in trained.parameters)
    for end in ENDS[name]:  # `up` is to act, beyond what bf16 rounds off
        nn.init.ones_(trained.core.get_submodule(end).adapter.down.bias)
    before = logits(trained.model)
    assert torch.equal(before, logits(load(name, Peft(kind="head"), dtype=dtype).model))
    for info, parameter in zip(trained.infos, trained.parameters, strict=True):
        if ".adapter.up." in info.name:
            with torch.no_grad():
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            after = logits(trained.model)
            assert not torch.equal(before, after), info.name
            before = after


def test_an_adapter_by_hand() -> None:
    adapter = Adapter(3, 2)
    y = torch.tensor([[1.0, -2.0, 0.5]])
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        adapter.down.bias.copy_(torch.tensor([0.0, 3.0]))
        adapter.up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        adapter.up.bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
        a, b = functional.gelu(torch.tensor([2.0, 1.0])).tolist()
        assert adapter(y)[0].tolist() == pytest.approx([1 + a, -2 + b, 0.5 + a + b + 10])


def test_adapters_start_at_the_shared_stream_and_up_at_zero() -> None:
    zero, again, one = (load("bert-tiny", ADAPTER, seed=seed) for seed in (0, 0, 1))
    for info, a, b, c in zip(
        zero.infos, zero.parameters, again.parameters, one.parameters, strict=True
    ):
        assert torch.equal(a, b)
        if ".up." in info.name or info.name.endswith("bias"):
            assert not a.any()
        else:
            assert a.any()
            assert not torch.equal(a, c)
    first, second = (p for n, p in zip(zero.names, zero.parameters, strict=True) if "down.w" in n)
    assert not torch.equal(first, second)


def test_layers_choose_the_blocks_that_get_an_adapter() -> None:
    trained = load("gpt2-tiny", Peft(kind="adapter", layers=(-1,)), PROMPT)
    assert {info.unit for info in trained.infos} == {"transformer.h.1.mlp.c_proj.adapter"}
    with pytest.raises(ModelError, match=r"layers 2: .* has layers 0 to 1, or -2 to -1"):
        load("gpt2-tiny", Peft(kind="adapter", layers=(2,)), PROMPT)


def test_a_block_without_a_feed_forward_part_is_named() -> None:
    base = nn.Module()
    base.blocks = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(ModelError, match=r"m has no feed-forward part in blocks\.0"):
        adapters.choose("m", base, ADAPTER, [], 0)


# --- biases ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize(
    "name", ["bert-tiny", "albert-tiny", "gpt2-tiny", "opt-tiny", "qwen2-tiny"]
)
def test_all_biases_and_the_head_are_trained_and_each_is_a_unit(name: str, dtype: str) -> None:
    trained = load(name, BITFIT, dtype=dtype)
    parameters = dict(trained.core.named_parameters())
    biases = {n for n in parameters if n.endswith(".bias")}
    head = {n for n in parameters if not n.startswith(f"{trained.core.base_model_prefix}.")}
    assert {info.name for info in trained.infos} == biases | head
    assert [info.unit for info in trained.infos] == [info.name for info in trained.infos]
    assert all(p.dtype == torch.float32 for p in trained.parameters)
    loss = trained.model(input_ids=IDS).logits.square().sum()
    for info, gradient in zip(
        trained.infos, torch.autograd.grad(loss, trained.parameters, allow_unused=True), strict=True
    ):
        # OPT's last projection has none; keys' biases do not move a softmax
        assert gradient is not None, info.name
        if not any(word in info.name for word in ("key", "k_proj")):
            assert gradient.any(), info.name


def test_over_bf16_a_bias_acts_in_bf16_and_is_kept_in_fp32() -> None:
    plain, half = load("bert-tiny", BITFIT), load("bert-tiny", BITFIT, dtype="bf16")
    for trained in (plain, half):
        move(trained)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(logits(half.model), logits(plain.model), rtol=0.05, atol=0.02)
    name = "bert.encoder.layer.0.output.dense"
    linear: Any = half.core.get_submodule(name)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = functional.linear(x, linear.weight) + linear.bias
    with torch.no_grad():
        assert torch.equal(linear(x), want.bfloat16())


def test_a_prompt_trains_biases_alone() -> None:
    names = {info.name for info in load("gpt2-tiny", BITFIT, PROMPT).infos}
    assert names
    assert all(name.endswith(".bias") for name in names)


@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_a_model_without_biases_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f'"bitfit": random:{name} has no biases'):
        load(name, BITFIT)


# --- files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "peft", "data", "dtype"),
    [
        ("bert-tiny", ADAPTER, CLASSIFY, "fp32"),
        ("gpt2-tiny", ADAPTER, PROMPT, "fp32"),
        ("llama-tiny", ADAPTER, CLASSIFY, "int8"),
        ("bert-tiny", BITFIT, CLASSIFY, "int8"),
        ("bert-tiny", Peft(kind="head"), CLASSIFY, "int4"),
    ],
)
def test_the_readme_of_an_export_says_how_to_load_it(
    name: str, peft: Peft, data: Data, dtype: str, tmp_path: Path
) -> None:
    trained = load(name, peft, data, dtype=dtype)
    move(trained)
    trained.export(tmp_path)
    saved = load_file(tmp_path / "trained.safetensors")
    assert saved.keys() == {info.name for info in trained.infos}
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"# What was trained on random:{name}\n")
    code = text.partition("```python\n")[2].partition("```")[0]
    other = Peft(kind="head") if data is CLASSIFY else BITFIT
    base = load(name, other, data, dtype=dtype, seed=9).core
    assert not torch.equal(logits(base), logits(trained.model))
    exec(code, {"model": base, "here": tmp_path})  # noqa: S102  # ours
    assert torch.equal(logits(base), logits(trained.model))
    assert (tmp_path / "tokenizer.json").exists()


def test_a_model_whose_biases_were_trained_loads_with_from_pretrained(tmp_path: Path) -> None:
    trained = load("bert-tiny", BITFIT)
    move(trained)
    trained.export(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(trained.model))
