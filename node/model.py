"""The model on a node: a frozen base, and the tensors that are trained, in a fixed order.

The model is always in ``eval`` mode.  Two-point estimates and forward mode compare
losses of one and the same function, and a dropout mask that changes between two calls
makes it another; so there is no dropout for any method, and rows stay comparable.

Whatever a checkpoint does not hold (a new head, LoRA's A, a ``random:`` base) comes
from the shared stream, keyed by the run's seed and the tensor's name, never from a global
generator, so every node starts from the same bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as peft_library
import torch
from torch import nn

from node import adapters, export, shapes
from node import base as base_models
from protocol.experiment import Data, Model, Peft
from protocol.parts import TensorInfo


@dataclass
class TrainedModel:
    """A model on its device, and what of it is trained.

    Attributes:
        infos: the trained tensors; those of one unit stand together.
        parameters: the tensors themselves, fp32, in the order of ``infos``.
        names: their names in ``model.named_parameters()``, same order.
        source: what the base was loaded from.
        device: where it is, or with ``deals`` will be.
    """

    model: nn.Module
    tokenizer: Any
    infos: tuple[TensorInfo, ...]
    parameters: list[nn.Parameter]
    names: list[str]
    source: str = ""
    device: str = "cpu"

    @property
    def core(self) -> Any:
        """The transformers model, without peft around it."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, peft_library.PeftModel) else model

    def export(self, directory: Path) -> None:
        """Save the model and its tokenizer, as ``node.export`` says.

        What was trained over a bf16 base is stored in fp32; load it with
        ``dtype=torch.float32``.
        """
        tensors: dict[str, torch.Tensor] = {
            i.name: p for i, p in zip(self.infos, self.parameters, strict=True)
        }
        with base_models.quiet():
            export.save(self.model, self.tokenizer, tensors, self.source, directory)


def load(
    model: Model,
    peft: Peft,
    data: Data,
    num_classes: int,
    *,
    device: str,
    seed: int,
    deals: bool = False,
) -> TrainedModel:
    """Load a model for a task and choose what is trained.

    With ``full`` nothing is frozen, and the model is fp32 even if ``model.dtype`` is bf16.
    A model that is to be dealt among ranks stays in the machine's memory until ``fsdp.deal``.

    Raises:
        ModelError: the model is not there, is not of the task's kind, or lacks the
            layers or modules that ``peft`` names; nothing is there to be dealt.
    """
    dtype = "fp32" if peft.kind == "full" else model.dtype
    with base_models.quiet():
        base, tokenizer, fresh = base_models.load(model.id, data.task, num_classes, dtype)
        base_models.check_length(model.id, base, data.max_length)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        base.config.pad_token_id = tokenizer.pad_token_id
        base.requires_grad_(False)
        for name, parameter in base.named_parameters():
            if name in fresh:
                shapes.fill(seed, name, parameter)
        head = _head(base, fresh) if data.task == "classify" else []
        whole = adapters.choose(model.id, base, peft, head, seed)
    whole.eval()
    _train_in_fp32(whole)
    if deals:
        from node import fsdp  # few need it, and it takes a while

        fsdp.check(whole)
    else:
        whole.to(device)
    by_name = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    units = {name: _unit(name, peft.kind) for name in by_name}
    names = _in_units(units)
    infos = tuple(
        TensorInfo(name=_saved(name), shape=tuple(by_name[name].shape), unit=units[name])
        for name in names
    )
    parameters = [by_name[n] for n in names]
    return TrainedModel(whole, tokenizer, infos, parameters, names, model.id, device)


def _head(base: Any, fresh: set[str]) -> list[str]:
    """Modules on top of the base model, and a pooler that the checkpoint lacks."""
    names = [n for n, m in base.named_children() if n != base.base_model_prefix]
    head = [n for n in names if any(True for _ in base.get_submodule(n).parameters())]
    poolers = {n.rpartition(".")[0] for n in fresh if ".pooler." in n}
    return [*sorted(poolers), *head]


def _train_in_fp32(model: nn.Module) -> None:
    """Hold trained tensors in fp32, and cast what flows into a module that has them.

    peft casts inside LoRA's layers, but not for a head over a bf16 base.
    """
    for name, module in list(model.named_modules()):
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in own:
            parameter.data = parameter.data.float()
        if any(p.dtype == torch.bfloat16 for p in module.parameters(recurse=False)):
            if own:
                _add_bias_in_fp32(module)
        elif own and ".lora_" not in name:
            module.register_forward_pre_hook(_cast_to_fp32)


def _cast_to_fp32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)


def _add_bias_in_fp32(module: Any) -> None:
    """Let a module whose bias alone is trained compute in bf16 without it, and then add it."""
    inner, nothing = module.forward, torch.zeros_like(module.bias, dtype=torch.bfloat16)

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = module._parameters["bias"]
        module._parameters["bias"] = nothing.to(x.device)
        try:
            y: torch.Tensor = inner(x.bfloat16())
        finally:
            module._parameters["bias"] = bias
        total: torch.Tensor = y + bias
        return total.to(x.dtype)

    module.forward = forward


def _in_units(units: dict[str, str]) -> list[str]:
    """The names of which the units are given, one unit's together, units as they appear."""
    members: dict[str, list[str]] = {}
    for name, unit in units.items():
        members.setdefault(unit, []).append(name)
    return [name for unit in members.values() for name in unit]


def _saved(name: str) -> str:
    """A parameter's name in the saved checkpoint: without the adapter's name."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _unit(name: str, kind: str) -> str:
    """The path of the module whose tensors belong together: a LoRA pair, an adapter, a layer.

    With BitFit each tensor stands for itself.
    """
    if kind == "bitfit":
        return _saved(name)
    path = _saved(name).removeprefix("base_model.model.").rpartition(".")[0]
    path = re.sub(r"\.adapter\.(down|up)$", ".adapter", path)
    return path.removesuffix(".lora_A").removesuffix(".lora_B")
