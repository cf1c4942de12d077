"""The Triton kernels against ``protocol.noise``, to the bit.

Without a CUDA device Triton's interpreter runs them.  It must be switched on before
triton is imported, so that part is this file as a program: it prints what differs.
The interpreter never fuses a product and a sum; that is looked up in the compiled code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol import noise
from protocol.noise import PIECE, Kind

ROOT = Path(__file__).parent.parent
KINDS: tuple[Kind, ...] = ("normal", "uniform", "sign")
# start, size, scale of x and of the scalars; a program of ``add_`` is 1,024 numbers
SPANS = {
    "aligned": (64, 64, 1.0),
    "odd": (3, 61, 1.0),
    "inside a block": (81, 5, 1.0),
    "one number": (13, 1, 1.0),
    "two programs": (13, 1024, 1.0),  # two because of the start
    "across a piece": (3 * PIECE - 19, 45, 1.0),
    "across 2^35": (2**35 - 11, 40, 1.0),  # where the block's number needs a 33rd bit
    "past 2^35": (2**35 + 5 * PIECE + 3, 50, 1.0),
    "up to 2^40": (2**40 - 30, 30, 1.0),
    "subnormal": (5, 100, 1e-40),
}
ON_DEVICE = {**SPANS, "pieces": (2 * PIECE - 3, 3 * PIECE + 10, 1.0)}  # minutes if interpreted
# interpreting is slow; the kinds differ in their last step alone
INTERPRETED = [
    (span, kind)
    for kind in KINDS
    for span in SPANS
    if kind == "normal" or span in ("odd", "across a piece", "subnormal")
]
# with two pieces, more pairs than one program of ``dots`` takes; the other kernels get FEW
KEYS = [0, 2**64 - 1, 2**63 + 5, *(noise.key("direction", k) for k in range(15))]
FEW = 4

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None,
    reason="no CUDA device that torch can use, or no triton",
)


def differing(span: str, kind: Kind, device: str) -> list[str]:
    """The kernels whose bits are not the reference's."""
    from node import kernels_cuda

    start, size, scale = ON_DEVICE[span]
    keys = np.array(KEYS, np.uint64)
    alphas = (noise.uniforms(1, 0, FEW) * scale).astype(np.float32)
    x = (noise.uniforms(2, 0, size) * scale).astype(np.float32)
    on_device = torch.tensor(x, device=device)

    out = np.zeros((len(alphas), size), np.float32)
    noise.shifted(x, start, KEYS[1], alphas, out, kind)
    made = torch.zeros(out.shape, device=device)
    kernels_cuda.shifted(on_device, KEYS[1], alphas, made, start=start, kind=kind)
    wrong = [] if made.cpu().numpy().tobytes() == out.tobytes() else ["shifted"]

    products = noise.total(noise.dots(x, start, keys, kind))
    if kernels_cuda.dots(on_device, KEYS, start=start, kind=kind).tobytes() != products.tobytes():
        wrong.append("dots")

    noise.add(x, start, keys[:FEW], alphas, kind)
    kernels_cuda.add_(on_device, KEYS[:FEW], alphas.tolist(), start=start, kind=kind)
    return wrong if on_device.cpu().numpy().tobytes() == x.tobytes() else [*wrong, "add_"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.test_kernels_cuda"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, list[str]] = json.loads(done.stdout)
    return outcome


@pytest.mark.slow
@pytest.mark.timeout(300)  # all cases are made in the first test's set-up
@needs_triton
@pytest.mark.parametrize(("span", "kind"), INTERPRETED)
def test_interpreted_kernels_give_the_bits_of_the_reference(
    span: str, kind: Kind, interpreted: dict[str, list[str]]
) -> None:
    assert interpreted[f"{span}, {kind}"] == []


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", ON_DEVICE)
def test_kernels_on_a_device_give_the_bits_of_the_reference(span: str, kind: Kind) -> None:
    assert differing(span, kind, "cuda") == []


@pytest.mark.gpu
@needs_cuda
def test_positions_in_memory_may_exceed_31_bits() -> None:
    size, tail = 2**31 + 1000, 500
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("less than 10 GB free on the device")
    from node import kernels_cuda

    x = torch.zeros(size, device="cuda")
    kernels_cuda.add_(x, [7], [0.3], start=5)
    expected = np.zeros(tail, np.float32)
    noise.add(
        expected, 5 + size - tail, np.array([7], np.uint64), np.array([0.3], np.float32), "normal"
    )
    assert x[-tail:].cpu().numpy().tobytes() == expected.tobytes()


# --- what is compiled, which needs no device ---


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}


class Compiler:
    """In a kernel's place: compiles for an A100 what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.code = kernel, ""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        constants = {name: options.pop(name) for name in names if name in options}
        types = {n: self.type(a) for n, a in zip(names, args, strict=False)}
        source = ASTSource(self.kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", 80, 32)
        self.code = triton.compile(source, target=target, options=options).asm["ptx"]

    def type(self, arg: torch.Tensor | int) -> str:
        if isinstance(arg, int):
            return "i64" if arg >= 2**31 else "i32"
        if arg.dtype == torch.float64:
            arg.zero_()  # the sums, which are added up afterwards
        return TYPES[arg.dtype]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["_add", "_shifted", "_dots"])
@pytest.mark.parametrize("start", [5, 2**35 + 5])
def test_compiled_kernels_round_the_product_and_keep_subnormals(
    name: str, kind: Kind, start: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from node import kernels_cuda

    compiler = Compiler(getattr(kernels_cuda, name))
    monkeypatch.setattr(kernels_cuda, name, compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(100)
    if name == "_add":
        kernels_cuda.add_(x, KEYS, [0.5] * len(KEYS), start=start, kind=kind)
    elif name == "_shifted":
        kernels_cuda.shifted(x, 1, [0.5, 1.0], torch.zeros(2, 100), start=start, kind=kind)
    else:
        kernels_cuda.dots(x, KEYS, start=start, kind=kind)
    rounded = "add.rn.f64" if name == "_dots" else "add.rn.f32"  # ".rn": never to be fused
    assert rounded in compiler.code
    assert rounded.replace("add", "mul") in compiler.code
    assert "fma" not in compiler.code
    assert ".ftz" not in compiler.code


# --- what is refused or has nothing to do: no launch, so no device ---


@needs_triton
def test_what_a_kernel_would_misread_is_refused() -> None:
    from node.kernels_cuda import add_, dots, shifted

    x = torch.zeros(10)
    for bad in (torch.zeros(20)[::2], x.double(), x.bfloat16(), x.reshape(2, 5)):
        with pytest.raises(ValueError, match="contiguous float32"):
            add_(bad, [1], [1.0])
        with pytest.raises(ValueError, match="contiguous float32"):
            dots(bad, [1])
        with pytest.raises(ValueError, match="contiguous float32"):
            shifted(bad, 1, [1.0], torch.zeros(1, 10))
    for out in (torch.zeros(3, 10), torch.zeros(10, 2).T, torch.zeros(2, 10, device="meta")):
        with pytest.raises(ValueError, match="contiguous float32"):
            shifted(x, 1, [1.0, 2.0], out)
    with pytest.raises(ValueError, match="1 keys, 2 alphas"):
        add_(x, [1], [1.0, 2.0])


@needs_triton
def test_nothing_to_do_launches_nothing() -> None:
    from node.kernels_cuda import add_, dots, shifted

    x, empty = torch.ones(10), torch.zeros(0)
    add_(x, [], [])
    add_(empty, [1], [1.0])
    shifted(x, 1, [], torch.zeros(0, 10))
    shifted(empty, 1, [1.0], torch.zeros(1, 0))
    assert dots(empty, [1, 2]).tolist() == [0, 0]
    assert dots(x, []).shape == (0,)
    assert x.tolist() == [1] * 10


if __name__ == "__main__":
    outcomes = {f"{s}, {k}": differing(s, k, "cpu") for s, k in INTERPRETED}
    sys.stdout.write(json.dumps(outcomes))
