"""Other methods in the place of a module's own, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Patch = tuple[nn.Module, str, Callable[..., Any]]  # whose method, its name, what stands for it


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Put them in place, in order, and what was there back at the end."""
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in patches]
    try:
        for module, name, method in patches:
            module.__dict__[name] = method
        yield
    finally:
        for module, name, own in before:
            module.__dict__.pop(name, None)
            if own is not None:
                module.__dict__[name] = own
