"""Perturbed inference against the plain way: form x + s z whole, and ask about that."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from node import device, model
from node.data import Examples
from node.model import TrainedModel
from node.oracle import TorchOracle
from node.shift import Shifter
from node.task import Batch, TextTask
from protocol.errors import ModelError
from protocol.experiment import Data, Model, Peft
from protocol.noise import Direction
from protocol.payload import Flat
from tests.oracles import f32

torch.set_num_threads(1)
PROMPT = Data(
    id="x",
    task="prompt",
    template="{text} It was",
    words=(" terrible", " great"),
    max_length=32,
)
HEAD = Data(id="x", max_length=16)
TASKS = {
    "gpt2-tiny": PROMPT,  # tied, absolute positions
    "opt-tiny": PROMPT,  # tied, positions in an embedding with a forward of its own
    "llama-tiny": PROMPT,  # not tied
    "qwen2-tiny": PROMPT,
    "bert-tiny": HEAD,
    "roberta-tiny": HEAD,
    "distilbert-tiny": HEAD,
}
EXAMPLES = Examples(["one text", "another, longer text", "a third"], np.array([0, 1, 1]))
OFFSETS = (0.01, -0.01)


class Loaded:
    def __init__(self, name: str, peft: Peft, dtype: Any = "fp32") -> None:
        data = TASKS[name]
        if name == "distilbert-tiny":  # peft has no default for it
            peft = msgspec.structs.replace(peft, targets=("q_lin", "lin1"))
        self.trained: TrainedModel = model.load(
            Model(id=f"random:{name}", dtype=dtype), peft, data, 2, device="cpu", seed=0
        )
        task = TextTask(self.trained, data, ("0", "1"))
        self.task = task
        self.oracle = TorchOracle(self.trained, task)
        self.x = self.oracle.initial()
        self.batch: Batch = task.batch(task.tokenise(EXAMPLES), range(3))

    def dense(self, x: Flat, direction: Direction, offset: float) -> float:
        moved = x + np.float32(offset) * direction.dense(len(x))
        return self.oracle.loss(torch.from_numpy(moved), self.batch)

    def bits(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.trained.parameters)


def whole(x: Flat, key: int = 7) -> Direction:
    return Direction(key, ((0, len(x)),))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", TASKS)
def test_losses_are_to_the_bit_those_of_the_whole_moved_vector(name: str, kind: Any) -> None:
    m = Loaded(name, Peft(kind=kind, rank=2))
    w, direction = m.oracle.start(m.x), whole(m.x)
    for offsets in (OFFSETS, (0.02,), (0.0, 0.01, -0.3)):
        found = m.oracle.losses(w, [direction], offsets, m.batch)[0]
        assert found == tuple(m.dense(m.x, direction, s) for s in offsets)
        assert len(set(found)) == len(offsets)
        m.oracle.start(m.x)


@pytest.mark.parametrize("kind", ["normal", "uniform", "sign"])
def test_over_a_bf16_base_the_trained_tensors_are_moved_in_fp32(kind: Any) -> None:
    m = Loaded("llama-tiny", Peft(rank=2), "bf16")
    direction = Direction(5, ((0, len(m.x)),), kind)
    found = m.oracle.losses(m.oracle.start(m.x), [direction], (0.5, -0.5), m.batch)[0]
    assert found == tuple(m.dense(m.x, direction, s) for s in (0.5, -0.5))


def test_the_point_may_be_another_than_the_models_own() -> None:
    m = Loaded("gpt2-tiny", Peft(kind="full"))
    x = m.x + np.float32(0.01)
    direction = whole(x)
    assert m.oracle.losses(torch.from_numpy(x), [direction], OFFSETS, m.batch)[0] == tuple(
        m.dense(x, direction, s) for s in OFFSETS
    )


def test_a_direction_moves_its_ranges_and_nothing_else() -> None:
    m = Loaded("gpt2-tiny", Peft(kind="full"))
    cuts = ((3, 700), (20_000, 20_001), (len(m.x) - 900, len(m.x)))
    direction = Direction(9, cuts)
    w = m.oracle.start(m.x)
    found = m.oracle.losses(w, [direction], (0.5, -0.5), m.batch)[0]
    assert found == tuple(m.dense(m.x, direction, s) for s in (0.5, -0.5))


@pytest.mark.parametrize("name", TASKS)
def test_after_200_steps_of_rate_zero_every_weight_has_its_bits(name: str) -> None:
    m = Loaded(name, Peft(kind="full"))
    w, before = m.oracle.start(m.x), m.bits()
    own = [id(p) for p in m.trained.model.parameters()]
    for step in range(200):
        plus, minus = m.oracle.losses(w, [whole(m.x, step)], OFFSETS, m.batch)[0]
        m.oracle.add_(w, -0.0 * (plus - minus), whole(m.x, step))
    assert m.bits() == before
    assert [id(p) for p in m.trained.model.parameters()] == own
    assert m.oracle.loss(w, m.batch) == m.dense(m.x, whole(m.x), 0.0)


def test_the_scratch_holds_the_largest_module_twice_and_no_vocabulary() -> None:
    m = Loaded("llama-tiny", Peft(kind="full"))
    m.oracle.losses(m.oracle.start(m.x), [whole(m.x)], OFFSETS, m.batch)
    sizes = [
        sum(p.numel() for p in module.parameters(recurse=False))
        for module in m.trained.model.modules()
    ]
    vocabulary = 512 * 32
    assert sorted(sizes)[-2:] == [vocabulary, vocabulary]  # embedding and head
    rows = len(m.batch.inputs["input_ids"].unique()) * 32
    largest = max([rows, *(size for size in sizes if size < vocabulary)])
    assert len(m.oracle._shifter._scratch) == 2 * largest


def test_the_noise_of_a_module_is_drawn_once_for_all_offsets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = Loaded("llama-tiny", Peft(kind="full"))
    drawn: list[tuple[int, int]] = []
    shifted = device.shifted

    def counted(x: Any, direction: Any, offsets: Any, out: Any, start: int) -> None:
        drawn.append((start, start + len(x)))
        shifted(x, direction, offsets, out, start)

    monkeypatch.setattr(device, "shifted", counted)
    m.oracle.losses(m.oracle.start(m.x), [whole(m.x)], OFFSETS, m.batch)
    assert len(set(drawn)) == len(drawn)
    vocabulary = 2 * 512 * 32  # of which only rows are drawn
    rows = len(m.batch.inputs["input_ids"].unique()) + len(PROMPT.words)
    assert sum(b - a for a, b in drawn) == len(m.x) - vocabulary + 32 * rows


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Loaded("llama-tiny", Peft(kind="full"))
    w, before, direction = m.oracle.start(m.x), m.bits(), whole(m.x)
    expected = m.oracle.losses(w, [direction], OFFSETS, m.batch)[0]
    calls = 0
    loss = m.task.loss

    def failing(batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no room")
        return loss(batch)

    with monkeypatch.context() as patch:
        patch.setattr(m.task, "loss", failing)
        with pytest.raises(MemoryError, match="no room"):
            m.oracle.losses(w, [direction], OFFSETS, m.batch)
    assert m.bits() == before
    assert m.oracle.losses(w, [direction], OFFSETS, m.batch)[0] == expected


class Outer(nn.Module):
    """Owns a tensor and a module that owns one: both are moved together."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.inner = nn.Linear(1, 1, bias=False)
        self.inner.weight.data.fill_(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x * self.scale) * self.scale
        return out


class Twice(nn.Module):
    """Visits one module two times, and modules in an order that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.other = Outer(), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.outer(x)
        x = self.other(self.outer(x)) if x > 12 else self.outer(self.other(x))
        out: torch.Tensor = x
        return out


class Peeking(nn.Module):
    """Uses a module's weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.a(x) @ self.b.weight
        return out


def flat(module: nn.Module) -> tuple[torch.Tensor, dict[int, int]]:
    parameters, at, offsets = list(module.parameters()), 0, {}
    for p in parameters:
        offsets[id(p)] = at
        at += p.numel()
    return torch.cat([p.detach().reshape(-1) for p in parameters]), offsets


@torch.no_grad()
def test_modules_inside_each_other_visited_twice_and_out_of_step() -> None:
    module = Twice()
    x, offsets = flat(module)
    direction, one = Direction(3, ((0, len(x)),)), torch.ones(1)
    found = Shifter(module, offsets, {}).run(
        x, direction, (1.0, -1.0, 0.5), lambda: float(module(one))
    )
    for s, value in zip((1.0, -1.0, 0.5), found, strict=True):
        fresh = Twice()
        z = x.numpy() + f32(s) * direction.dense(len(x))
        nn.utils.vector_to_parameters(torch.from_numpy(z), fresh.parameters())
        assert float(fresh(one)) == value


@torch.no_grad()
def test_a_model_that_reads_a_tensor_behind_its_module_is_refused() -> None:
    module = Peeking()
    x, offsets = flat(module)
    shifter = Shifter(module, offsets, {})
    before = [id(p) for p in module.parameters()]
    with pytest.raises(ModelError, match="outside of the module"):
        shifter.run(x, Direction(3, ((0, len(x)),)), OFFSETS, lambda: float(module(torch.ones(1))))
    assert [id(p) for p in module.parameters()] == before


class Aliased(nn.Module):
    """One tensor under two names, and an embedding that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = self.a
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(12.0).view(4, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.table(input=ids) * self.a + self.b).sum()
        return out


@torch.no_grad()
def test_two_names_of_one_tensor_and_an_input_by_keyword() -> None:
    module, ids = Aliased(), torch.tensor([1, 3])
    x, offsets = flat(module)
    direction = Direction(3, ((0, len(x)),))
    found = Shifter(module, offsets, {}).run(x, direction, OFFSETS, lambda: float(module(ids)))
    for s, value in zip(OFFSETS, found, strict=True):
        fresh = Aliased()
        moved = x.numpy() + f32(s) * direction.dense(len(x))
        nn.utils.vector_to_parameters(torch.from_numpy(moved), fresh.parameters())
        assert float(fresh(ids)) == value
