"""The base of a model, a checkpoint or a ``random:`` shape, in its dtype; and its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from node import quantised, shapes, sources
from node.quantised import BITS
from protocol.errors import ModelError

# These two are typed in part only.
hub: Any = huggingface_hub.utils
logging: Any = transformers.utils.logging


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no chatter from the libraries; errors reach the user as exceptions."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub_level = hub.logging.get_verbosity()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.logging.set_verbosity_error()
    hub.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # peft and transformers deprecate each other's names, which a user cannot mend.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


def load(model_id: str, task: str, num_classes: int, dtype: str) -> tuple[Any, Any, set[str]]:
    """The model, its tokenizer, and the tensors that are still to get a first value.

    With few bits per weight the linear layers of the base are quantised, a checkpoint's
    after it is loaded and one by one; all else is fp32.

    Raises:
        ModelError: the model is not there, or is not of the task's kind.
    """
    auto: Any = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    labels = {"num_labels": num_classes} if task == "classify" else {}
    if model_id.startswith("random:"):
        base, tokenizer = shapes.build(model_id, auto, labels, dtype)
        fresh = {n for n, _ in base.named_parameters() if labels and _is_head(base, n)}
        return base, tokenizer, fresh
    # What is quantised is read as it is stored: fp32 would be a copy of twice the size.
    stored_as = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype, "auto")
    base, tokenizer, fresh = _from_checkpoint(model_id, auto, labels, stored_as)
    if dtype in BITS:
        for name in quantised.layers(base, fresh):
            quantised.replace(base, name, BITS[dtype])
        base.float()
    return base, tokenizer, fresh


def _from_checkpoint(
    model_id: str, auto: Any, labels: dict[str, int], dtype: torch.dtype | str
) -> tuple[Any, Any, set[str]]:
    path = sources.resolve_model(model_id)
    if isinstance(path, Path):
        path = sources.converted(path) if path.suffix == ".gguf" else path
    options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    try:
        tokenizer = _from_cache_first(transformers.AutoTokenizer, path, {})
        base, report = _from_cache_first(auto, path, options | labels)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        where = "" if isinstance(path, Path) else " (no such directory, nor to be had from the hub)"
        why = sources.first_line(error)
        raise ModelError(f"cannot load model {model_id}{where}: {why}") from error
    fresh = set(report["missing_keys"])
    # Only a classifier, and the pooler under it, may start without weights.
    may_be_new = {n for n in fresh if labels and (_is_head(base, n) or ".pooler." in n)}
    if inside := fresh - may_be_new:
        raise ModelError(f"{model_id} is not made for this task: it lacks {min(inside)}")
    return base, tokenizer, fresh


def _from_cache_first(auto: Any, path: Path | str, options: dict[str, Any]) -> Any:
    """Without a network the hub's client retries for most of a minute; so ask it last."""
    try:
        return auto.from_pretrained(str(path), local_files_only=True, **options)
    except OSError:
        if isinstance(path, Path):
            raise
        return auto.from_pretrained(path, **options)


def _is_head(base: Any, name: str) -> bool:
    return not name.startswith(f"{base.base_model_prefix}.")


def check_length(model_id: str, base: Any, max_length: int) -> None:
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and base.config.model_type in ("roberta", "xlm-roberta"):
        positions -= 2  # its first two rows stand for padding
    if positions is not None and max_length > positions:
        raise ModelError(f"data.max_length {max_length}: {model_id} has {positions} positions")
