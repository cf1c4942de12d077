"""The noise kernels on torch tensors: the same bits on a CPU and on a CUDA device."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch

from protocol import kernels
from protocol.noise import Direction, Flat

log = logging.getLogger(__name__)


def add_(x: torch.Tensor, alpha: float, direction: Direction) -> None:
    """Add alpha z to x in place, on the direction's ranges."""
    if x.device.type == "cpu":
        kernels.add_direction_(x.numpy(), alpha, direction)  # shares the memory
        return
    cuda = _cuda()
    for start, stop in direction.ranges:
        part, at = x[start:stop], {"start": start, "kind": direction.kind}
        if cuda is not None:
            cuda.add_(part, [direction.key], [alpha], **at)
        else:
            here = part.cpu()
            kernels.add_(here.numpy(), [direction.key], [alpha], **at)  # type: ignore[arg-type]
            part.copy_(here)


def shifted(
    x: torch.Tensor, direction: Direction, offsets: Flat, out: torch.Tensor, start: int
) -> None:
    """out[s] = x + offsets[s] z, where x begins with element ``start``; out is (s, len(x))."""
    key, kind, cuda = direction.key, direction.kind, None
    if x.device.type != "cpu":
        cuda = _cuda()
    if cuda is not None:  # its kernel wants whole rows; a part of a larger scratch is none
        whole = torch.empty(out.shape, device=out.device)
        cuda.shifted(x, key, offsets, whole, start=start, kind=kind)
        out.copy_(whole)
        return
    here = out.cpu()
    kernels.shifted(x.cpu().numpy(), key, offsets, here.numpy(), start=start, kind=kind)
    if here is not out:
        out.copy_(here)


def expect(x: torch.Tensor) -> None:
    """Many small jobs will follow that together draw as many numbers as x has."""
    kernels.choose(x.numel())


@cache
def _cuda() -> Any:
    """The Triton kernels, or None: a Jetson's vendor build of torch comes without Triton."""
    try:
        return importlib.import_module("node.kernels_cuda")
    except ImportError as error:
        log.warning("noise for the CUDA device is drawn on the CPU: %s", error)
        return None
