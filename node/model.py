"""The model on a node: a frozen base, and the tensors that are trained, in a fixed order.

The model is always in ``eval`` mode.  Two-point estimates and forward mode compare
losses of one and the same function, and a dropout mask that changes between two calls
makes it another; so there is no dropout for any method, and rows stay comparable.

Whatever a checkpoint does not hold (a new head, LoRA's A, a ``random:`` base) comes
from the shared stream, keyed by the run's seed and the tensor's name, never from a global
generator, so every node starts from the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as peft_library
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from node import base as base_models
from node import shapes, sources
from protocol.errors import ModelError
from protocol.experiment import Data, Model, Peft
from protocol.messages import TensorInfo


@dataclass
class TrainedModel:
    """A model on its device, and what of it is trained.

    Attributes:
        infos: the trained tensors; those of one unit stand together.
        parameters: the tensors themselves, fp32, in the order of ``infos``.
        names: their names in ``model.named_parameters()``, same order, for
            ``torch.func.functional_call``.
    """

    model: nn.Module
    tokenizer: Any
    infos: tuple[TensorInfo, ...]
    parameters: list[nn.Parameter]
    names: list[str]

    @property
    def core(self) -> Any:
        """The transformers model, without peft around it."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, peft_library.PeftModel) else model

    def export(self, directory: Path) -> None:
        """Save what ``from_pretrained`` loads, and the tokenizer.

        A peft adapter (LoRA and head) for LoRA, else the whole model.  A head trained
        over a bf16 base is stored in fp32; load it with ``dtype=torch.float32``.
        """
        with base_models.quiet():
            if isinstance(self.model, peft_library.PeftModel):
                # "auto" would ask the hub whether the embedding was resized.
                self.model.save_pretrained(str(directory), save_embedding_layers=False)
            else:
                self.core.save_pretrained(str(directory))
            self.tokenizer.save_pretrained(str(directory))


def load(
    model: Model, peft: Peft, data: Data, num_classes: int, *, device: str, seed: int
) -> TrainedModel:
    """Load a model for a task and choose what is trained.

    With ``full`` nothing is frozen, and the model is fp32 whatever ``model.dtype`` says.

    Raises:
        ModelError: the model is not there, is not of the task's kind, or lacks the
            layers or modules that ``peft`` names.
    """
    is_half = model.dtype == "bf16" and peft.kind != "full"
    options: dict[str, Any] = {"dtype": torch.bfloat16 if is_half else torch.float32}
    with base_models.quiet():
        base, tokenizer, fresh = base_models.load(model.id, data.task, num_classes, options)
        base_models.check_length(model.id, base, data.max_length)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        base.config.pad_token_id = tokenizer.pad_token_id
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(peft.kind == "full")
            if name in fresh:
                shapes.fill(seed, name, parameter)
        head = _head(base, fresh) if data.task == "classify" else []
        whole = base if peft.kind != "lora" else _with_lora(model.id, base, peft, head, seed)
    if peft.kind == "head":
        for name in head:
            base.get_submodule(name).requires_grad_(True)
    whole.eval()
    _train_in_fp32(whole)
    whole.to(device)
    names = _in_units([name for name, p in whole.named_parameters() if p.requires_grad])
    by_name = dict(whole.named_parameters())
    parameters = [by_name[name] for name in names]
    infos = tuple(
        TensorInfo(name=_saved(name), shape=tuple(p.shape), unit=_unit(name))
        for name, p in zip(names, parameters, strict=True)
    )
    return TrainedModel(whole, tokenizer, infos, parameters, names)


def _head(base: Any, fresh: set[str]) -> list[str]:
    """Modules on top of the base model, and a pooler that the checkpoint lacks."""
    names = [n for n, m in base.named_children() if n != base.base_model_prefix]
    head = [n for n in names if any(True for _ in base.get_submodule(n).parameters())]
    poolers = {n.rpartition(".")[0] for n in fresh if ".pooler." in n}
    return [*sorted(poolers), *head]


def _with_lora(model_id: str, base: Any, peft: Peft, head: list[str], seed: int) -> nn.Module:
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    leaves = ", ".join(sorted({n.rpartition(".")[2] for n in linear} - set(head)))
    for target in peft.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(f"peft.targets {target!r} is not in {model_id}; it has {leaves}")
    config = peft_library.LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        r=peft.rank,
        lora_alpha=peft.alpha,  # type: ignore[arg-type]  # peft divides; a float is fine
        lora_dropout=0.0,
        target_modules=list(peft.targets) or None,
        layers_to_transform=_layers(model_id, base, peft.layers),
        modules_to_save=head or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    try:
        wrapped = peft_library.get_peft_model(base, config)
    except ValueError as error:
        why = sources.first_line(error)
        raise ModelError(f"LoRA on {model_id}: {why}; peft.targets may be {leaves}") from error
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:  # as peft does it, kaiming uniform with a = sqrt(5)
            shapes.fill(seed, name, parameter, 1 / math.sqrt(parameter.shape[1]))
    return wrapped


def _layers(model_id: str, base: Any, layers: tuple[int, ...]) -> list[int] | None:
    if not layers:
        return None
    count = base.config.num_hidden_layers
    for layer in layers:
        if not -count <= layer < count:
            raise ModelError(
                f"peft.layers {layer}: {model_id} has layers 0 to {count - 1}, or -{count} to -1"
            )
    return sorted({layer % count for layer in layers})


def _train_in_fp32(model: nn.Module) -> None:
    """Hold trained tensors in fp32, and cast what flows into a module that has them.

    peft casts inside LoRA's layers, but not for a head over a bf16 base.
    """
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in own:
            parameter.data = parameter.data.float()
        if own and ".lora_" not in name:
            module.register_forward_pre_hook(_cast_to_fp32)


def _cast_to_fp32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)


def _in_units(names: list[str]) -> list[str]:
    """The same names, those of one unit together, units in order of appearance."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(_unit(name), []).append(name)
    return [name for unit in units.values() for name in unit]


def _saved(name: str) -> str:
    """A parameter's name in the saved checkpoint: without the adapter's name."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _unit(name: str) -> str:
    """The path of the module whose tensors belong together: a LoRA pair, a layer."""
    path = _saved(name).removeprefix("base_model.model.").rpartition(".")[0]
    return path.removesuffix(".lora_A").removesuffix(".lora_B")
