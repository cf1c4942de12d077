"""The model as methods see it: derivatives against differences, and nothing left behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from node import model
from node.data import Examples
from node.model import TrainedModel
from node.oracle import TorchOracle
from node.task import Batch, TextTask
from protocol import kernels
from protocol.experiment import Compute, Data, Model, Peft
from protocol.noise import Direction
from protocol.payload import Flat

torch.set_num_threads(1)

TASKS = {
    "llama-tiny": Data(
        id="x",
        task="prompt",
        template="{text} It was",
        words=(" terrible", " great"),
        max_length=32,
    ),
    "bert-tiny": Data(id="x", max_length=16),
}
EXAMPLES = Examples(["one text", "another, longer text", "a third"], np.array([0, 1, 1]))
NAMES = pytest.mark.parametrize("name", TASKS)


@cache
def loaded(name: str) -> tuple[TrainedModel, TextTask, TorchOracle, Flat]:
    """LoRA of both matrices: B moved off zero, where A would have no gradient."""
    trained, task = fresh(name)
    oracle = TorchOracle(trained, task)
    return trained, task, oracle, oracle.initial()


def fresh(name: str) -> tuple[TrainedModel, TextTask]:
    trained = model.load(
        Model(id=f"random:{name}"), Peft(rank=2), TASKS[name], 2, device="cpu", seed=0
    )
    return trained, TextTask(trained, TASKS[name], ("0", "1"))


def made(name: str, compute: Compute) -> TorchOracle:
    return TorchOracle(*fresh(name), compute)


def at(name: str, seed: int = 1) -> Flat:
    """A point where every trained number matters."""
    x = loaded(name)[3].copy()
    kernels.add_direction_(x, 0.3, Direction(seed, ((0, len(x)),)))
    return x


def batch(name: str) -> Batch:
    task = loaded(name)[1]
    return task.batch(task.tokenise(EXAMPLES), range(3))


def slope(name: str, x: Flat, u: Flat, h: float = 0.02) -> float:
    """The derivative along u by differences of order 4, whose error is far below fp32's."""
    oracle = loaded(name)[2]

    def f(at: float) -> float:
        return oracle.loss(oracle.array(x + np.float32(at) * u), batch(name))

    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


@NAMES
def test_grad_equals_finite_differences(name: str) -> None:
    _, _, oracle, _ = loaded(name)
    x = at(name)
    loss, g = oracle.grad(oracle.array(x), batch(name))
    gradient = oracle.numpy(g).astype(np.float64)
    assert loss == pytest.approx(oracle.loss(oracle.array(x), batch(name)), rel=1e-6)
    steepest = gradient / np.linalg.norm(gradient)
    for key in range(3):
        z = Direction(key, ((0, len(x)),)).dense(len(x))
        u = (steepest + z / np.linalg.norm(z)).astype(np.float32)
        assert gradient @ u == pytest.approx(slope(name, x, u), rel=1e-4)


@NAMES
def test_jvp_is_the_gradient_in_the_direction_and_the_loss_itself(name: str) -> None:
    _, _, oracle, _ = loaded(name)
    x = at(name)
    loss, g = oracle.grad(oracle.array(x), batch(name))
    gradient = oracle.numpy(g).astype(np.float64)
    for key in range(3):
        direction = Direction(key, ((0, len(x)),))
        primal, (derivative,) = oracle.jvp(oracle.array(x), [direction], batch(name))
        assert primal == pytest.approx(loss, rel=1e-6)
        assert derivative == pytest.approx(gradient @ direction.dense(len(x)), rel=1e-4, abs=1e-6)


@NAMES
def test_jvp_of_a_part_is_the_derivative_along_that_part(name: str) -> None:
    trained, _, oracle, _ = loaded(name)
    x = at(name)
    gradient = oracle.numpy(oracle.grad(oracle.array(x), batch(name))[1]).astype(np.float64)
    first = trained.parameters[0].numel()
    whole = Direction(5, ((0, len(x)),)).dense(len(x)).astype(np.float64)
    for ranges in [((0, first),), ((first, len(x) - 3),), ((2, 9), (first + 1, first + 20))]:
        _, (derivative,) = oracle.jvp(oracle.array(x), [Direction(5, ranges)], batch(name))
        expected = sum(gradient[a:b] @ whole[a:b] for a, b in ranges)
        assert derivative == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_directions_share_a_pass_and_the_rest_come_after(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = made("bert-tiny", Compute(directions=2))
    x, directions = at("bert-tiny"), [Direction(key, ((0, 40),)) for key in range(5)]
    passes: list[int] = []
    run = oracle._forward.run

    def counted(x: Any, along: Any, call: Any) -> Any:
        passes.append(len(along))
        return run(x, along, call)

    monkeypatch.setattr(oracle._forward, "run", counted)
    loss, slopes = oracle.jvp(oracle.array(x), directions, batch("bert-tiny"))
    assert passes == [2, 2, 1]
    single = [oracle.jvp(oracle.array(x), [z], batch("bert-tiny")) for z in directions]
    assert slopes == pytest.approx([slope for _, (slope,) in single], rel=1e-5)
    assert [loss] * 5 == pytest.approx([each for each, _ in single])


def test_only_derivatives_in_forward_mode_try_modules_out() -> None:
    trained, task = fresh("bert-tiny")
    calls: list[int] = []
    layer: Any = next(m for m in trained.model.modules() if hasattr(m, "feed_forward_chunk"))
    layer.intermediate.register_forward_pre_hook(lambda *_: calls.append(1))
    oracle = TorchOracle(trained, task)
    x = oracle.array(at("bert-tiny"))
    oracle.loss(x, batch("bert-tiny"))
    oracle.grad(x, batch("bert-tiny"))
    oracle.losses(x, [Direction(1, ((0, 9),))], (0.1, -0.1), batch("bert-tiny"))
    assert len(calls) == 4
    oracle.jvp(x, [Direction(1, ((0, 9),))], batch("bert-tiny"))
    assert len(calls) > 5


@NAMES
def test_micro_batches_change_nothing_but_rounding(name: str) -> None:
    whole, parts = loaded(name)[2], made(name, Compute(micro_batch=2))
    x, along = at(name), [Direction(key, ((0, 50),)) for key in (1, 2)]
    ours, theirs = parts.array(x), whole.array(x)
    assert parts.loss(ours, batch(name)) == pytest.approx(whole.loss(theirs, batch(name)))
    loss, g = parts.grad(ours, batch(name))
    want_loss, want = whole.grad(theirs, batch(name))
    assert loss == pytest.approx(want_loss)
    torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-6)
    value, slopes = parts.jvp(ours, along, batch(name))
    want_value, want_slopes = whole.jvp(theirs, along, batch(name))
    assert value == pytest.approx(want_value)
    assert slopes == pytest.approx(want_slopes, rel=1e-4)
    points = parts.losses(ours, [along[0]], (0.1, -0.1), batch(name))[0]
    assert points == pytest.approx(whole.losses(theirs, [along[0]], (0.1, -0.1), batch(name))[0])


def test_a_micro_batch_is_all_that_the_model_sees() -> None:
    trained, task = fresh("bert-tiny")
    oracle = TorchOracle(trained, task, Compute(micro_batch=2))
    rows: list[int] = []
    trained.core.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    x = oracle.start(at("bert-tiny"))
    oracle.grad(x, batch("bert-tiny"))
    oracle.jvp(x, [Direction(1, ((0, 9),))], batch("bert-tiny"))
    assert rows == [2, 1, 2, 1]


@NAMES
def test_checkpointing_gives_the_same_gradient_and_runs_blocks_twice(name: str) -> None:
    trained, task = fresh(name)
    oracle = TorchOracle(trained, task, Compute(checkpointing=True))
    inner = next(m for n, m in trained.model.named_modules() if n.endswith(("mlp", "attention")))
    calls: list[int] = []
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, g = oracle.grad(oracle.array(at(name)), batch(name))
    assert len(calls) == 2
    want_loss, want = loaded(name)[2].grad(loaded(name)[2].array(at(name)), batch(name))
    assert loss == pytest.approx(want_loss)
    torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-7)
    calls.clear()
    oracle.loss(oracle.array(at(name)), batch(name))
    assert len(calls) == 1


@NAMES
def test_a_gradient_of_some_ranges_is_that_part_and_asks_for_no_more(name: str) -> None:
    trained, _, oracle, _ = loaded(name)
    x, first = at(name), trained.parameters[0].numel()
    size = first + trained.parameters[1].numel()
    wanted: list[list[bool]] = []
    hook = trained.core.register_forward_pre_hook(
        lambda *_: wanted.append([p.requires_grad for p in trained.parameters])
    )
    _, whole = oracle.grad(oracle.array(x), batch(name))
    _, part = oracle.grad(oracle.array(x), batch(name), ((first, size),))
    hook.remove()
    torch.testing.assert_close(part[first:size], whole[first:size])
    assert not part[:first].any()
    assert not part[size:].any()
    assert wanted[0] == [True] * len(trained.parameters)
    assert wanted[1] == [i == 1 for i in range(len(trained.parameters))]
    assert all(p.requires_grad for p in trained.parameters)


def test_jvp_along_nothing_is_zero() -> None:
    oracle = loaded("bert-tiny")[2]
    x = oracle.array(at("bert-tiny"))
    loss, (derivative,) = oracle.jvp(x, [Direction(5, ())], batch("bert-tiny"))
    assert derivative == 0.0
    assert loss == oracle.loss(x, batch("bert-tiny"))


@NAMES
def test_losses_are_those_of_the_two_points(name: str) -> None:
    oracle = loaded(name)[2]
    x, direction = at(name), Direction(3, ((0, 50),))
    plus, minus = oracle.losses(oracle.array(x), [direction], (0.1, -0.1), batch(name))[0]
    z = direction.dense(len(x))
    step = np.float32(0.1) * z
    assert plus == oracle.loss(oracle.array(x + step), batch(name))
    assert minus == oracle.loss(oracle.array(x - step), batch(name))
    assert plus != minus


@NAMES
def test_nothing_that_is_asked_changes_x(name: str) -> None:
    oracle = loaded(name)[2]
    x = oracle.array(at(name))
    before, direction = oracle.numpy(x).tobytes(), Direction(3, ((0, 50),))
    oracle.loss(x, batch(name))
    oracle.grad(x, batch(name))
    oracle.jvp(x, [direction], batch(name))
    oracle.losses(x, [direction], (0.1, -0.1), batch(name))
    assert oracle.numpy(x).tobytes() == before


@NAMES
def test_an_answer_does_not_depend_on_what_was_asked_before(name: str) -> None:
    oracle = loaded(name)[2]
    first = oracle.loss(oracle.array(at(name)), batch(name))
    other = oracle.loss(oracle.array(at(name, seed=2)), batch(name))
    assert other != first
    assert oracle.loss(oracle.array(at(name)), batch(name)) == first


def test_add_is_the_reference_arithmetic_and_changes_x_alone() -> None:
    oracle = loaded("bert-tiny")[2]
    x, direction = at("bert-tiny"), Direction(11, ((3, 40), (60, 61)))
    vector = oracle.array(x)
    oracle.add_(vector, -0.123456789, direction)
    expected = x.copy()
    kernels.add_direction_(expected, -0.123456789, direction)
    assert oracle.numpy(vector).tobytes() == expected.tobytes()
    assert oracle.numpy(vector).tobytes() != x.tobytes()


def test_an_array_is_a_private_copy() -> None:
    oracle = loaded("bert-tiny")[2]
    x = at("bert-tiny")
    oracle.array(x).zero_()
    assert x.any()
    x.flags.writeable = False
    oracle.array(x)  # and one may be made of what came over the wire


def test_the_parameters_begin_as_loaded_and_load_moves_the_model_itself() -> None:
    trained, *_ = loaded("bert-tiny")
    new, task = fresh("bert-tiny")
    flat = torch.cat([p.detach().reshape(-1) for p in new.parameters]).numpy().copy()
    oracle = TorchOracle(new, task)
    start = oracle.initial()
    assert start.tobytes() == flat.tobytes()
    moved = start + np.float32(1)
    oracle.load(moved)
    now = torch.cat([p.detach().reshape(-1) for p in new.parameters]).numpy()
    assert now.tobytes() == moved.tobytes()
    assert start.tobytes() == flat.tobytes()  # what was handed out is no view of it
    assert [p.shape for p in new.parameters] == [p.shape for p in trained.parameters]


def test_a_gradient_of_ranges_without_a_whole_tensor_is_zero() -> None:
    oracle = loaded("bert-tiny")[2]
    x = oracle.array(at("bert-tiny"))
    loss, g = oracle.grad(x, batch("bert-tiny"), ((0, 0),))
    assert loss == oracle.loss(x, batch("bert-tiny"))
    assert not g.any()
