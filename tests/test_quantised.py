"""Layers in few bits: the weight they stand for, and that they are linear in their input."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from node import model, quantised, shapes
from node.data import Examples
from node.measure import Phases
from node.model import TrainedModel
from node.oracle import TorchOracle
from node.quantised import QuantisedLinear
from node.task import Batch, TextTask
from protocol import kernels
from protocol.errors import ExperimentError
from protocol.experiment import Data, Model, Peft, convert
from protocol.noise import Direction
from protocol.payload import Flat

torch.set_num_threads(1)
BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = pytest.mark.parametrize("dtype", ["int8", "int4"])
# rows, columns: even, odd, a single row, groups of 8 and of 1
SHAPES = pytest.mark.parametrize("shape", [(6, 64), (7, 96), (1, 32), (5, 72), (9, 33)])


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def layer(bits: int, rows: int = 48, columns: int = 96) -> QuantisedLinear:
    return QuantisedLinear(0.02 * normals(rows, columns), nn.Parameter(normals(rows)), bits)


# --- the weight ------------------------------------------------------------------


def test_four_bits_by_hand() -> None:
    numbers = [-8.0, -4.0, 0.0, 3.0, 7.0, 7.6, 0.4, -0.6] * 4  # farthest from zero is -8: step 1
    found = QuantisedLinear(torch.tensor([numbers, [-x for x in numbers]]), None, 4)
    levels = [-8.0, -4.0, 0.0, 3.0, 7.0, 7.0, 0.0, -1.0] * 4  # 7.6 would be level 8
    assert found.scale.tolist() == [[1.0], [-1.0]]
    assert found.dense().tolist() == [levels, [-x for x in levels]]
    byte = found.weight.view(torch.uint8)[0, :4]  # both rows are in one
    assert byte.tolist() == [0x88, 0xCC, 0x00, 0x33]


def test_eight_bits_by_hand() -> None:
    found = QuantisedLinear(torch.tensor([[-128.0, 1.4, 64.0], [0.0, 0.0, 0.0]]), None, 8)
    assert found.dense().tolist() == [[-128.0, 1.0, 64.0], [0.0, 0.0, 0.0]]
    assert found.weight.tolist() == [[-128, 1, 64], [0, 0, 0]]


@BITS
@SHAPES
def test_a_number_is_off_by_half_a_step_or_by_one_where_levels_end(
    bits: int, shape: tuple[int, int]
) -> None:
    weight = normals(*shape)
    found = QuantisedLinear(weight, None, bits)
    group = shape[1] // found.scale.shape[1]
    step = found.scale.float().repeat_interleave(group, 1)
    off = (found.dense() - weight) / step
    top = 2 ** (bits - 1)
    is_end = weight / step > top - 1.5
    assert off[~is_end].abs().max() <= 0.5 + 1e-5
    assert not is_end.any() or off[is_end].abs().max() <= 1 + top / 128  # the scale is bf16
    assert found.dense().shape == shape


@pytest.mark.parametrize(("bits", "most"), [(8, 0.009), (4, 0.088)])
def test_the_error_on_normal_weights_is_as_documented(bits: int, most: float) -> None:
    weight = 0.02 * normals(256, 4096)
    off = QuantisedLinear(weight, None, bits).dense() - weight
    assert 0.8 * most < float(off.norm() / weight.norm()) < most


@pytest.mark.parametrize(("bits", "size"), [(8, 1 + 2 / 4096), (4, 0.5 + 2 / 32)])
def test_bytes_for_each_number(bits: int, size: float) -> None:
    found = QuantisedLinear(normals(64, 4096), None, bits)
    held = [*found.parameters(), *found.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) == size * 64 * 4096
    assert not any(p.requires_grad for p in found.parameters())


@BITS
@SHAPES
def test_the_pieces_are_the_whole_however_many(
    bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = normals(*shape), normals(3, shape[1], seed=1)
    whole = QuantisedLinear(weight, None, bits)
    monkeypatch.setitem(quantised._CHUNK, "cpu", 2 * shape[1])
    pieces = QuantisedLinear(weight, None, bits)
    assert torch.equal(pieces.weight, whole.weight)
    assert torch.equal(pieces.dense(), whole.dense())
    torch.testing.assert_close(pieces(x), functional.linear(x, whole.dense()))
    y = normals(3, shape[0], seed=2)
    torch.testing.assert_close(pieces.transposed(y), y @ whole.dense())


# --- the function ----------------------------------------------------------------


@BITS
def test_it_is_what_a_linear_layer_with_that_weight_gives_for_any_shape(bits: int) -> None:
    found = layer(bits)
    for lead in [(), (5,), (2, 3), (2, 3, 4)]:
        x = normals(*lead, 96)
        torch.testing.assert_close(found(x), functional.linear(x, found.dense(), found.bias))


@BITS
def test_a_stack_gives_what_each_slice_gives(bits: int) -> None:
    found, stack = layer(bits), normals(5, 2, 3, 96)
    torch.testing.assert_close(found(stack), torch.stack([found(x) for x in stack]))


@BITS
def test_differences_are_the_product_with_the_direction(bits: int) -> None:
    found = layer(bits)
    x, u = normals(4, 96, seed=1), normals(4, 96, seed=2)
    for h in (1e-3, 1.0, 1e3):
        difference = (found(x + h * u) - found(x - h * u)) / (2 * h)
        torch.testing.assert_close(difference, found.product(u), rtol=1e-3, atol=1e-3)


@BITS
def test_with_gradients_it_is_the_same_function_and_keeps_no_weight(bits: int) -> None:
    found, x = layer(bits), normals(4, 96, seed=1).requires_grad_()
    kept: list[int] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = found(x)
    assert max(kept, default=0) < found.weight.numel()
    with torch.no_grad():
        assert torch.equal(found(x), y)
    g = normals(4, 48, seed=2)
    (gradient,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient, g @ found.dense())


@BITS
def test_its_bias_can_be_trained(bits: int) -> None:
    found = layer(bits)
    assert found.bias is not None
    (gradient,) = torch.autograd.grad(found(normals(4, 96)).sum(), found.bias)
    assert torch.equal(gradient, torch.full((48,), 4.0))


@BITS
def test_in_half_precision_it_computes_in_that(bits: int) -> None:
    found = QuantisedLinear(normals(48, 96), None, bits)
    y = found(normals(4, 96).bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), found(normals(4, 96)), rtol=0.05, atol=0.3)


# --- in models -------------------------------------------------------------------

CLASSIFY = Data(id="x", max_length=16)
PROMPT = Data(
    id="x", task="prompt", template="{text} It was", words=(" terrible", " great"), max_length=32
)
LORA, HEAD = Peft(rank=2), Peft(kind="head")
BITFIT = Peft(kind="bitfit")
EXAMPLES = Examples(["one text", "another, longer text", "a third"], np.array([0, 1, 1]))


def load(
    name: str,
    dtype: Any,
    peft: Peft = LORA,
    data: Data = CLASSIFY,
) -> TrainedModel:
    model_id = name if "/" in name else f"random:{name}"
    return model.load(Model(id=model_id, dtype=dtype), peft, data, 2, device="cpu", seed=0)


def quantised_in(net: nn.Module) -> dict[str, QuantisedLinear]:
    return {n: m for n, m in net.named_modules() if isinstance(m, QuantisedLinear)}


FAMILIES = ["bert-tiny", "roberta-tiny", "gpt2-tiny", "opt-tiny", "llama-tiny", "qwen2-tiny"]
FAMILIES += ["t5-tiny"]


@DTYPES
@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_model_is_the_fp32_one_with_each_inner_layer_quantised(
    name: str, dtype: str
) -> None:
    plain, few = load(name, "fp32", HEAD), load(name, dtype, HEAD)
    layers, bits = quantised_in(few.core), quantised.BITS[dtype]
    linear = {n for n, m in plain.core.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    prefix = plain.core.base_model_prefix
    assert layers.keys() == {n for n in linear if n.startswith(f"{prefix}.")}
    for path, found in layers.items():
        original: Any = plain.core.get_submodule(path)
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        assert torch.equal(found.dense(), QuantisedLinear(weight, None, bits).dense()), path
    others = dict(plain.core.named_parameters())
    for path, parameter in few.core.named_parameters():
        if path.rpartition(".")[0] not in layers or path.endswith("bias"):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, others[path]), path


@DTYPES
@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_an_output_head_stays_as_it_is(name: str, dtype: str) -> None:
    few = load(name, dtype, data=PROMPT)
    assert type(few.core.lm_head) is nn.Linear
    assert few.core.lm_head.weight.dtype == torch.float32
    tied = few.core.lm_head.weight is few.core.get_input_embeddings().weight
    assert tied == (name == "gpt2-tiny")


@DTYPES
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_a_checkpoint_is_quantised_as_it_is_stored(
    dtype: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = torch.bfloat16 if stored == "bf16" else torch.float32
    whole = load("llama-tiny", "fp32", Peft(kind="full"), PROMPT).core
    whole.to(kind).save_pretrained(tmp_path)
    load("llama-tiny", "fp32", LORA, PROMPT).tokenizer.save_pretrained(tmp_path)
    read_as, original = set(), quantised.replace

    def replace(base: nn.Module, name: str, bits: int) -> None:
        read_as.add(base.get_parameter(f"{name}.weight").dtype)
        original(base, name, bits)

    monkeypatch.setattr(quantised, "replace", replace)
    few = load(str(tmp_path), dtype, LORA, PROMPT)
    assert read_as == {kind}
    originals = dict(whole.named_modules())
    layers = quantised_in(few.core)
    assert len(layers) == 14
    for path, found in layers.items():
        name = path.removesuffix(".base_layer")
        want = QuantisedLinear(originals[name].weight, None, quantised.BITS[dtype])
        assert torch.equal(found.weight, want.weight)
        assert torch.equal(found.scale, want.scale)
        assert found.scale.dtype == torch.bfloat16
    assert few.core.lm_head.weight.dtype == torch.float32
    assert few.core.dtype == torch.float32


def test_building_holds_one_unpacked_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, most = [], 0
    original = shapes._made

    def counted(name: str, empty: torch.Tensor) -> nn.Parameter:
        nonlocal most
        parameter = original(name, empty)
        if "_proj." in name:
            made.append(weakref.ref(parameter))
            most = max(most, sum(ref() is not None for ref in made))
        return parameter

    monkeypatch.setattr(shapes, "_made", counted)
    load("llama-tiny", "int4")
    assert len(made) == 14
    assert most == 1


def test_a_model_is_never_whole_before_it_is_quantised() -> None:
    load("llama-tiny", "int4", LORA, PROMPT)  # what a first load imports
    phases = Phases()
    with phases("load"):
        pass
    (before,) = phases.take()
    if before.rss is None:
        pytest.skip("this system does not say")
    with phases("load"):
        few = load("smollm2-135m", "int4", LORA, PROMPT)
    (cost,) = phases.take()
    assert cost.rss is not None
    held = sum(t.numel() * t.element_size() for t in few.model.parameters())
    assert held < 185e6
    assert cost.rss - before.rss < 400e6  # whole in fp32 it has 540e6 by itself


def test_full_training_of_a_quantised_model_is_refused() -> None:
    table = {"run": {"name": "r"}, "data": {"id": "d"}, "rounds": {"count": 1}}
    table |= {"method": {"name": "fedavg"}, "model": {"id": "m", "dtype": "int4"}}
    assert convert(table, "f").model.dtype == "int4"
    with pytest.raises(
        ExperimentError, match=r'"full" trains every tensor, which model\.dtype "int4"'
    ):
        convert(table | {"peft": {"kind": "full"}}, "f")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@DTYPES
@pytest.mark.parametrize(("name", "data"), [("bert-tiny", CLASSIFY), ("gpt2-tiny", PROMPT)])
def test_lora_goes_around_quantised_layers_and_its_export_loads_with_peft(
    tmp_path: Path, name: str, data: Data, dtype: str
) -> None:
    trained = load(name, dtype, Peft(rank=4), data)
    wrapped = [n for n in quantised_in(trained.core) if n.endswith(".base_layer")]
    assert len(wrapped) == sum(".lora_A." in i.name for i in trained.infos) > 0
    with torch.no_grad():
        for parameter in trained.parameters:
            parameter.add_(0.01)
    trained.export(tmp_path)
    base = load(name, dtype, BITFIT, data).core
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trained.model(ids).logits, rtol=0, atol=0)


# --- what is asked of them -------------------------------------------------------

CASES = [
    ("llama-tiny", LORA, PROMPT),
    ("bert-tiny", LORA, CLASSIFY),
    ("bert-tiny", BITFIT, CLASSIFY),
]
CASES += [("gpt2-tiny", BITFIT, PROMPT), ("bert-tiny", Peft(kind="adapter"), CLASSIFY)]


class Loaded:
    def __init__(self, name: str, dtype: str, peft: Peft, data: Data) -> None:
        trained = load(name, dtype, peft, data)
        task = TextTask(trained, data, ("0", "1"))
        self.oracle = TorchOracle(trained, task)
        self.x: Flat = self.oracle.initial()
        kernels.add_direction_(self.x, 0.1, Direction(1, ((0, len(self.x)),)))
        self.batch: Batch = task.batch(task.tokenise(EXAMPLES), range(3))

    def loss(self, x: Flat) -> float:
        return self.oracle.loss(self.oracle.array(x), self.batch)


@DTYPES
@pytest.mark.parametrize(("name", "peft", "data"), CASES)
def test_backprop_and_forward_mode_are_the_central_difference(
    name: str, peft: Peft, data: Data, dtype: str
) -> None:
    m = Loaded(name, dtype, peft, data)
    loss, g = m.oracle.grad(m.oracle.array(m.x), m.batch)
    gradient = m.oracle.numpy(g).astype(np.float64)
    assert loss == pytest.approx(m.loss(m.x), rel=1e-6)
    directions = [Direction(key, ((0, len(m.x)),)) for key in range(3)]
    primal, slopes = m.oracle.jvp(m.oracle.array(m.x), directions, m.batch)
    assert primal == pytest.approx(loss, rel=1e-5)
    h = 0.01
    for direction, slope in zip(directions, slopes, strict=True):
        v = direction.dense(len(m.x))
        u = (v / np.linalg.norm(v)).astype(np.float32)
        f = [m.loss(m.x + np.float32(s * h) * u) for s in (2, 1, -1, -2)]
        central = (8 * (f[1] - f[2]) - (f[0] - f[3])) / (12 * h)  # of order 4
        assert gradient @ u == pytest.approx(central, rel=1e-2, abs=2e-5)
        assert slope == pytest.approx(gradient @ v, rel=1e-4, abs=1e-6)


@DTYPES
@pytest.mark.parametrize(("name", "peft", "data"), CASES)
def test_perturbed_inference_is_to_the_bit_the_loss_of_the_moved_vector(
    name: str, peft: Peft, data: Data, dtype: str
) -> None:
    m = Loaded(name, dtype, peft, data)
    direction = Direction(7, ((0, len(m.x)),))
    found = m.oracle.losses(m.oracle.start(m.x), [direction], (0.01, -0.01), m.batch)[0]
    z = direction.dense(len(m.x))
    assert found == tuple(m.loss(m.x + np.float32(s) * z) for s in (0.01, -0.01))
    assert found[0] != found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BITS
def test_on_a_gpu_it_is_the_same_layer(bits: int) -> None:
    here, there = layer(bits), layer(bits).cuda()
    assert torch.equal(there.dense().cpu(), here.dense())
    made_there = QuantisedLinear(0.02 * normals(48, 96).cuda(), None, bits)
    assert torch.equal(made_there.weight.cpu(), here.weight)
    x, y = normals(4, 96, seed=1), normals(4, 48, seed=2)
    for found, want in (
        (there(x.cuda()), here(x)),
        (there.transposed(y.cuda()), here.transposed(y)),
    ):
        torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-5)
