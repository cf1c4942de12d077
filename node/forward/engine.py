"""Forward mode through a whole model: loss and derivatives along several directions at once.

While a pass runs, each module that owns trained tensors finds duals in their place: the
values with their tangents drawn from the shared stream, formed when the module is entered
and dropped when it is left.  Until the first of them everything is an ordinary inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from node import device, sites
from node.forward import layers, linear, lora, norms, pointwise, rowwise  # noqa: F401  (rules)
from node.forward.dual import Dual, NoForwardRuleError
from node.forward.patching import Patch, patched
from node.sites import Site
from protocol.errors import ModelError
from protocol.noise import Direction


class Forward:
    """Differentiates calls of one model.

    Args:
        model: on its device.
        offsets: of each trained tensor in the flat vector, by the tensor's id.
    """

    def __init__(self, model: nn.Module, offsets: Mapping[int, int]) -> None:
        self._model = model
        self._sites = sites.find(model, offsets)
        self._rowwise = rowwise.find(model)
        self._fused = [*lora.patches(model), *norms.patches(model)]
        self._owners = {m: b.module for b in self._rowwise for m in b.module.modules()}

    @torch.no_grad()
    def run(
        self, x: torch.Tensor, directions: Sequence[Direction], call: Callable[[], torch.Tensor]
    ) -> tuple[float, list[float]]:
        """The scalar that ``call`` gives with the model at x, and its derivatives.

        Raises:
            ModelError: the model uses an operation without a forward rule, or reads a
                trained tensor outside of the module that owns it.
        """
        touched = [site for site in self._sites if _touches(site, directions)]
        try:
            with self._duals(x, directions, touched), patched(self._patches(touched)):
                out = call()
        except NoForwardRuleError as error:
            where = self._module_of(error)
            raise ModelError(f"no forward mode through {where}: {error}") from error
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if sites.reads_elsewhere(error):
                why = "the model reads a trained tensor outside of the module that owns it"
                raise ModelError(f"forward mode: {why}: {error}") from error
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"forward mode in {self._module_of(error)}: {why}") from error
        if not isinstance(out, Dual):
            return float(out), [0.0] * len(directions)
        loss, *slopes = out.stack.tolist()
        return loss, slopes

    def _patches(self, touched: Sequence[Site]) -> list[Patch]:
        pieces = rowwise.patches(self._rowwise, {self._owner(site) for site in touched})
        return [*self._fused, *pieces]

    @contextmanager
    def _duals(
        self, x: torch.Tensor, directions: Sequence[Direction], touched: Sequence[Site]
    ) -> Iterator[None]:
        """Duals in place of the trained tensors, in each module while it is at work."""
        handles: list[Any] = []
        with sites.away(touched):
            try:
                for site in touched:
                    # what runs in pieces forms its tangents once, not once for each piece
                    handles += _attach(self._owner(site), site, x, directions)
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _owner(self, site: Site) -> nn.Module:
        """What has to be at work for the site's duals to be there."""
        return self._owners.get(site.module, site.module)

    def _module_of(self, error: Exception) -> str:
        """The innermost module at work when the error was raised, and what it is."""
        paths = {id(module): path for path, module in self._model.named_modules()}
        found, trace = "the model", error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in paths:
                found = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
            trace = trace.tb_next
        return found


def _touches(site: Site, directions: Sequence[Direction]) -> bool:
    return any(
        max(a, start) < min(b, start + shape.numel())
        for start, shape in site.places.values()
        for direction in directions
        for a, b in direction.ranges
    )


def _attach(
    owner: nn.Module, site: Site, x: torch.Tensor, directions: Sequence[Direction]
) -> list[Any]:
    """Hooks that put a site's duals in place while ``owner`` runs."""
    parameters: dict[str, Any] = site.module._parameters
    nothing: dict[str, Any] = {}

    def enter(*_: Any) -> None:
        nothing.update({name: parameters[name] for name in site.places})
        parameters.update(
            {
                name: _dual(x, start, shape, directions)
                for name, (start, shape) in site.places.items()
            }
        )

    def leave(*_: Any) -> None:
        parameters.update(nothing)

    return [
        owner.register_forward_pre_hook(enter),
        owner.register_forward_hook(leave, always_call=True),
    ]


def _dual(
    x: torch.Tensor, start: int, shape: torch.Size, directions: Sequence[Direction]
) -> torch.Tensor:
    """A trained tensor with its tangents; one that no direction touches stays plain."""
    size = shape.numel()
    primal = x[start : start + size]
    one, zero = np.ones(1, np.float32), primal.new_zeros(size)
    stack = primal.new_zeros((1 + len(directions), size))
    stack[0] = primal
    is_touched = False
    for k, direction in enumerate(directions):
        for a, b in direction.ranges:
            first, last = max(a, start), min(b, start + size)
            if first < last:
                part = slice(first - start, last - start)
                device.shifted(zero[part], direction, one, stack[1 + k : 2 + k, part], first)
                is_touched = True
    return Dual(stack.view(-1, *shape)) if is_touched else primal.view(shape)
