"""Forward mode through every family of models: against backpropagation, and both attentions.

TV14 and TV15 of the forward-gradient papers' test vectors; the second the other way round:
the fused attention, which torch cannot differentiate forward, works and gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from node import model, task
from node.data import Examples
from node.oracle import TorchOracle
from protocol.experiment import Compute, Data, Model, Peft
from protocol.noise import Direction, normals
from protocol.payload import Flat

torch.set_num_threads(1)
# torch's own, where an operation has no rule of ours and takes torch's
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
CLASSIFY = Data(id="x", max_length=24)
PROMPT = Data(
    id="x", task="prompt", template="{text} It was", words=(" terrible", " great"), max_length=24
)
CAUSAL = Data(id="x", task="causal", max_length=24)
TARGETS = {  # where peft has no default
    "distilbert-tiny": ("q_lin", "v_lin"),
    "albert-tiny": ("query", "value"),
    "gpt2-tiny": ("c_attn", "c_fc"),
    "llama-tiny": ("q_proj", "v_proj", "down_proj"),
    "t5-tiny": ("q", "v", "wo"),
}
TASKS = {
    "bert-tiny": CLASSIFY,
    "roberta-tiny": CLASSIFY,
    "distilbert-tiny": CLASSIFY,
    "albert-tiny": CLASSIFY,
    "t5-tiny": CLASSIFY,
    "gpt2-tiny": PROMPT,
    "opt-tiny": PROMPT,
    "llama-tiny": PROMPT,
    "qwen2-tiny": CAUSAL,
}
TEXTS = Examples(["so it goes", "on, and on, and further", "x y z it is"], np.array([0, 1, 1]))


@dataclass
class Made:
    """A model, and a batch to ask it about."""

    oracle: TorchOracle
    batch: task.Batch

    def at(self) -> Flat:
        """A point where every trained number matters: LoRA's B is off zero."""
        x = self.oracle.initial()
        return x + np.float32(0.03) * normals(3, 0, len(x))

    def slopes(self, x: Flat, along: list[Direction]) -> list[float]:
        return self.oracle.jvp(self.oracle.array(x), along, self.batch)[1]

    def gradient(self, x: Flat) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return self.oracle.grad(self.oracle.array(x), self.batch)[1].numpy().astype(np.float64)


def made(name: str, kind: str, *, dtype: str = "fp32", attention: str = "") -> Made:
    targets = TARGETS.get(name, ()) if kind == "lora" else ()
    peft = Peft(kind=kind, rank=2, targets=targets)  # type: ignore[arg-type]
    base = Model(id=f"random:{name}", dtype=dtype)  # type: ignore[arg-type]
    trained = model.load(base, peft, TASKS[name], 2, device="cpu", seed=0)
    if attention:
        trained.core.set_attn_implementation(attention)
    work = task.build(trained, TASKS[name], ("0", "1"))
    return Made(TorchOracle(trained, work, Compute(directions=2)), work.encode(TEXTS))


def directions(size: int) -> list[Direction]:
    """The whole, a part across tensors, and another whole."""
    return [Direction(5, ((0, size),)), Direction(6, ((7, size // 2),)), Direction(7, ((0, size),))]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", TASKS)
def test_forward_mode_is_the_gradient_along_a_direction(name: str, kind: str) -> None:
    m = made(name, kind)
    x = m.at()
    g, along = m.gradient(x), directions(len(x))
    got = np.array(m.slopes(x, along))
    want = np.array([g @ z.dense(len(x)) for z in along])
    assert np.linalg.norm(want) > 1e-3
    apart = np.abs(got - want)
    assert apart.max() <= 1e-5 * max(np.abs(want).max(), float(np.linalg.norm(g)))


@pytest.mark.parametrize("name", ["roberta-tiny", "llama-tiny", "gpt2-tiny", "t5-tiny"])
def test_fused_and_eager_attention_have_the_same_derivatives(name: str) -> None:
    fused, eager = made(name, "lora", attention="sdpa"), made(name, "lora", attention="eager")
    x = fused.at()
    along = directions(len(x))
    assert fused.slopes(x, along) == pytest.approx(eager.slopes(x, along), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("bert-tiny", "bf16", 0.03),  # of the gradient's norm: 8 bits a number
        ("llama-tiny", "bf16", 0.03),
        ("bert-tiny", "int8", 1e-5),  # the weights are rounded, the arithmetic is fp32
        ("llama-tiny", "int4", 1e-5),
    ],
)
def test_over_a_small_base_too(name: str, dtype: str, tolerance: float) -> None:
    m = made(name, "lora", dtype=dtype)
    x = m.at()
    g, along = m.gradient(x), directions(len(x))
    want = np.array([g @ z.dense(len(x)) for z in along])
    apart = np.abs(np.array(m.slopes(x, along)) - want)
    assert apart.max() <= tolerance * np.linalg.norm(g)
