"""Models of a known shape without weights, and the first values of whatever has none.

The numbers are the shared stream's, keyed by a seed and the tensor's name, never from a
global generator, so every node starts from the same bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers.initialization import no_init_weights

from node import quantised
from node.quantised import BITS
from protocol import noise
from protocol.errors import ModelError

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY |= {"vocab_size": 512, "max_position_embeddings": 512}
_WIDE = {"intermediate_size": 64}
_BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_BERT_BASE |= {"intermediate_size": 3072}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": ("bert", _TINY | _WIDE),
    "roberta-tiny": ("roberta", _TINY | _WIDE | {"max_position_embeddings": 514}),
    "distilbert-tiny": ("distilbert", _TINY | {"hidden_dim": 64}),
    "albert-tiny": ("albert", _TINY | _WIDE | {"embedding_size": 16}),
    "t5-tiny": (
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"vocab_size": 512, "decoder_start_token_id": 0},
    ),
    "gpt2-tiny": ("gpt2", _TINY),
    "opt-tiny": ("opt", _TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama-tiny": ("llama", _TINY | _WIDE | {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2-tiny": ("qwen2", _TINY | _WIDE | {"num_key_value_heads": 2}),
    "distilbert-base": ("distilbert", {}),  # the defaults of transformers are the originals'
    "bert-base": ("bert", {}),
    "albert-base": ("albert", _BERT_BASE),
    "roberta-large": (
        "roberta",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096, "max_position_embeddings": 514, "vocab_size": 50265}
        | {"type_vocab_size": 1},
    ),
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
        | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    "llama2-7b": ("llama", {}),
    "opt-13b": (
        "opt",
        {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480}
        | {"num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WORDS = ("great", "terrible", "good", "bad", "yes", "no", "positive", "negative")
_BLOCK = 1 << 20  # numbers drawn for a tensor; a larger one, of a `random:` base, repeats them


def build(model_id: str, auto: Any, labels: dict[str, int], dtype: str) -> tuple[Any, Any]:
    """The model that ``random:FAMILY-SIZE`` stands for, and a tokenizer of bytes.

    Tensors get memory one after the other, and what is quantised is so at once.

    Args:
        model_id: as above.
        auto: the transformers class for the task.
        labels: entries of the configuration that the task adds.
        dtype: as in ``Model.dtype``.

    Raises:
        ModelError: the shape is unknown, or has no such task.
    """
    base = skeleton(model_id, auto, labels, torch.bfloat16 if dtype == "bf16" else torch.float32)
    if dtype in BITS:
        for name in quantised.layers(base, set()):
            linear = base.get_submodule(name)
            linear.weight = _made(f"{name}.weight", linear.weight)
            quantised.replace(base, name, BITS[dtype])
    made = {empty: _made(name, empty) for name, empty in base.named_parameters() if empty.is_meta}
    for module in base.modules():
        for name, empty in module._parameters.items():
            if empty in made:  # once for all modules that share it
                module._parameters[name] = made[empty]
    return base, _byte_tokenizer(ends=base.config.model_type == "t5")


def skeleton(model_id: str, auto: Any, labels: dict[str, int], dtype: torch.dtype) -> Any:
    """The model of a shape on the meta device: all its names and sizes, and no numbers.

    Raises:
        ModelError: the shape is unknown, or has no such task.
    """
    shape = SHAPES.get(model_id.removeprefix("random:"))
    if shape is None:
        raise ModelError(f"{model_id}: unknown shape; known are {', '.join(SHAPES)}")
    family, sizes = shape
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, **special, **labels)
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            base = auto.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ModelError(f"{model_id} is not made for this task") from error
    base.tie_weights()
    return base


def _made(name: str, empty: torch.Tensor) -> nn.Parameter:
    """First values in memory, as a checkpoint's would be: the same for every run."""
    tensor = torch.empty_like(empty, device="cpu", requires_grad=False)
    fill(0, name, tensor)
    return nn.Parameter(tensor)


def _byte_tokenizer(*, ends: bool) -> Any:
    """Bytes, and a few label words as one token each with their leading space.

    Args:
        ends: whether every text ends with a token that says so, as T5 wants it.
    """
    symbols = [*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    merges = []
    for word in _WORDS:
        part = "\u0120"  # the byte-level alphabet's space
        for letter in word:
            if part + letter not in vocabulary:
                merges.append((part, letter))
                vocabulary[part + letter] = len(vocabulary)
            part += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        end = _SPECIAL["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, symbols.index(end))]
        )
    wrap: Any = transformers.PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, **_SPECIAL)


def fill(seed: int, name: str, tensor: torch.Tensor, bound: float = 0.02 * math.sqrt(3)) -> None:
    """Give a tensor its first value: norms one, biases zero, matrices uniform.

    The numbers are the shared stream's, so that every node begins with the same bits;
    the bound gives the usual deviation of 0.02.
    """
    with torch.no_grad():
        if tensor.dim() < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
        key = noise.key("init", seed, int.from_bytes(digest, "little"))
        flat = tensor.view(-1)
        draws = noise.uniforms(key, 0, min(flat.numel(), _BLOCK))
        block = torch.from_numpy(draws * np.float32(bound))
        for start in range(0, flat.numel(), _BLOCK):
            part = flat[start : start + _BLOCK]
            part.copy_(block[: part.numel()])
