"""Ferret's projection and reconstruction, K = 64, over the blocks of SmolLM2-135M.

    python -m benchmarks.ferret

The straightforward way makes each basis vector with a torch generator of its own, in the
block's length, and takes a dot product or adds it; ours makes it piece by piece in the
cache, all K of a block in one pass, and never holds one.  The loop is timed with
``LOOP_K`` vectors a block and scaled to 64, for it takes K times as long.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.harness import Metric, alternate, no_arguments, num_cores, progress, report
from fedalgos.ferret import Ferret, cut, ferret
from fedalgos.space import ParamSpace
from node import shapes
from protocol import kernels, noise
from protocol.noise import Flat
from protocol.parts import TensorInfo
from protocol.payload import Blocks

K, LOOP_K, REPEATS = 64, 2, 3


def smollm2() -> ParamSpace:
    """The trained tensors, without the numbers in them."""
    _, sizes = shapes.SHAPES["smollm2-135m"]
    h, wide, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    kv = h * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = [("q", (h, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, h)), ("gate", (wide, h))]
    layer += [("up", (wide, h)), ("down", (h, wide)), ("norm1", (h,)), ("norm2", (h,))]  # type: ignore[list-item]
    tensors = [("embed", (sizes["vocab_size"], h))]
    tensors += [(f"{i}.{name}", shape) for i in range(layers) for name, shape in layer]
    tensors += [("norm", (h,))]  # type: ignore[list-item]
    return ParamSpace.of([TensorInfo(name, shape, name) for name, shape in tensors])


def vector(seed: int, size: int) -> torch.Tensor:
    """A basis vector as the published code makes it, but uniform: its own draw is slower."""
    bound = 1 / math.sqrt(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(size).uniform_(-bound, bound, generator=generator)


def main() -> None:
    """Time in turn, report."""
    no_arguments(__doc__)
    torch.set_num_threads(num_cores())
    kernels.use_threads(num_cores())
    space = smollm2()
    blocks = cut(space)
    progress(f"{space.size:,} parameters in {len(blocks)} blocks")
    delta: Flat = np.empty(space.size, np.float32)
    kernels.shifted(np.zeros_like(delta), 1, np.array([1e-4], np.float32), delta[None])
    x = np.zeros_like(delta)
    counts = np.full(len(blocks), K)
    coefficients = Blocks(counts, np.full(K * len(blocks), 1e-6, np.float32))
    method = ferret(Ferret(projections=K), space, 0)
    d, out = torch.from_numpy(delta), torch.from_numpy(x.copy())

    def loop_project() -> None:
        for i, j in blocks:
            for seed in range(LOOP_K):
                float(d[i:j] @ vector(seed, j - i))

    def loop_reconstruct() -> None:
        for i, j in blocks:
            for seed in range(LOOP_K):
                out[i:j].add_(vector(seed, j - i), alpha=1e-6)

    def project() -> None:
        for b, (i, j) in enumerate(blocks):
            keys = [noise.key("basis", 0, 1, b, k) for k in range(K)]
            kernels.dots(delta[i:j], keys, start=i, kind="uniform")

    def reconstruct() -> None:
        method.apply(x, 1, coefficients)

    loop_p, loop_r, ours_p, ours_r = alternate(
        loop_project, loop_reconstruct, project, reconstruct, repeats=REPEATS
    )
    scaled = K / LOOP_K
    progress(f"loop: {loop_p * scaled:.1f} s and {loop_r * scaled:.1f} s (scaled to K = {K})")
    progress(f"ours: {ours_p:.2f} s and {ours_r:.2f} s")
    both = (loop_p + loop_r) * scaled / (ours_p + ours_r)
    report(
        "ferret",
        {
            "speedup": Metric(both, "ratio", "higher", 10.0),
            "project_speedup": Metric(loop_p * scaled / ours_p, "ratio", "higher"),
            "reconstruct_speedup": Metric(loop_r * scaled / ours_r, "ratio", "higher"),
            "project": Metric(ours_p, "s", "lower"),
            "reconstruct": Metric(ours_r, "s", "lower"),
        },
    )


if __name__ == "__main__":
    main()
