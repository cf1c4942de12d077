"""LoRA's layers with duals: the low-rank product is added in place.

peft's own ``result + lora_B(lora_A(x)) * scaling`` makes three tensors of the layer's
output size, of value and tangents each.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from torch import nn
from torch.nn import functional

from node.forward.dual import Dual, lifted, num_directions, primal_of
from node.forward.patching import Patch


def patches(model: nn.Module) -> list[Patch]:
    """What to patch in a model while a forward-mode pass runs."""
    found: list[Patch] = []
    for module in model.modules():
        if _is_plain(module):
            found += _of(module)
    return found


def _is_plain(module: nn.Module) -> bool:
    """One active adapter without dropout, variants or a merge: what ``node.model`` makes."""
    layer: Any = module
    return (
        type(module) is lora.Linear
        and "forward" not in vars(module)  # an output head's is the task's
        and list(layer.active_adapters) == list(layer.lora_A)
        and len(layer.lora_A) == 1
        and not (layer.lora_variant or layer.merged or layer.disable_adapters)
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _of(layer: Any) -> list[Patch]:
    (name,) = layer.lora_A
    down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    results: list[Any] = []  # of the base layer, while the product is formed

    def forward(x: Any) -> Any:
        results.append(layer.base_layer(x))
        try:  # as a call of the module, whose hooks put its tangents in place
            return up(down(x.to(down.weight.dtype)))
        finally:
            results.pop()

    def add(a: Any) -> Any:
        return added(results[-1], a, up.weight, scale)

    return [(layer, "forward", forward), (up, "forward", add)]


def added(y: Any, a: Any, weight: Any, scale: float) -> Any:
    """Y + scale a W^T, into y's own stack if it has one."""
    duals = [x for x in (y, a, weight) if isinstance(x, Dual)]
    fits = y.dtype == a.dtype and primal_of(y).is_contiguous()
    if not duals or not fits:
        return y + (functional.linear(a, weight) * scale).to(y.dtype)
    k = num_directions(duals)
    stack, w = lifted(y, k), primal_of(weight)
    flat = stack.view(1 + k, -1, stack.shape[-1])
    rows = primal_of(a).reshape(-1, a.shape[-1])
    if isinstance(a, Dual):
        whole = flat.view(-1, flat.shape[-1])
        whole.addmm_(a.stack.reshape(-1, a.shape[-1]), w.mT, alpha=scale)
    else:
        flat[0].addmm_(rows, w.mT, alpha=scale)
    if isinstance(weight, Dual):
        flat[1:].baddbmm_(rows.expand(k, -1, -1), weight.tangents.mT, alpha=scale)
    return Dual(stack)
