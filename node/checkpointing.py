"""Activation checkpointing of a transformer's blocks, for any model.

transformers' own switch works only in ``train`` mode, which would bring dropout back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def enable(model: nn.Module) -> None:
    """From now on backpropagation keeps what enters each block, and runs the block again."""
    for block in blocks(model):
        block.forward = _checkpointed(block.forward)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: a transformer's layers."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
