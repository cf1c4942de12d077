"""The noise kernels on torch tensors: the same bits on a CPU and on a CUDA device."""

from __future__ import annotations

from typing import Any

import torch

from protocol import kernels
from protocol.noise import Direction, Flat


def add_(x: torch.Tensor, alpha: float, direction: Direction) -> None:
    """Add alpha z to x in place, on the direction's ranges."""
    if x.device.type == "cpu":
        kernels.add_direction_(x.numpy(), alpha, direction)  # shares the memory
        return
    for start, stop in direction.ranges:
        _cuda().add_(x[start:stop], [direction.key], [alpha], start=start, kind=direction.kind)


def shifted(
    x: torch.Tensor, direction: Direction, offsets: Flat, out: torch.Tensor, start: int
) -> None:
    """out[s] = x + offsets[s] z, where x begins with element ``start``; out is (s, len(x))."""
    key, kind = direction.key, direction.kind
    if x.device.type == "cpu":
        kernels.shifted(x.numpy(), key, offsets, out.numpy(), start=start, kind=kind)
        return
    whole = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    _cuda().shifted(x, key, offsets, whole, start=start, kind=kind)
    if whole is not out:  # a few rows of a larger scratch
        out.copy_(whole)


def expect(x: torch.Tensor) -> None:
    """Many small jobs will follow that together draw as many numbers as x has."""
    if x.device.type == "cpu":
        kernels.choose(x.numel())


def _cuda() -> Any:
    from node import kernels_cuda  # Triton comes with torch's CUDA builds only

    return kernels_cuda
