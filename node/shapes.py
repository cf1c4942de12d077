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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.initialization import no_init_weights

from protocol import noise
from protocol.errors import ModelError

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY |= {"vocab_size": 512, "max_position_embeddings": 512}
_WIDE = {"intermediate_size": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": ("bert", _TINY | _WIDE),
    "roberta-tiny": ("roberta", _TINY | _WIDE | {"max_position_embeddings": 514}),
    "distilbert-tiny": ("distilbert", _TINY | {"hidden_dim": 64}),
    "gpt2-tiny": ("gpt2", _TINY),
    "opt-tiny": ("opt", _TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama-tiny": ("llama", _TINY | _WIDE | {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2-tiny": ("qwen2", _TINY | _WIDE | {"num_key_value_heads": 2}),
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
        | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    "llama2-7b": ("llama", {}),  # the defaults of transformers are Llama 2 7B's
    "opt-13b": (
        "opt",
        {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480}
        | {"num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WORDS = ("great", "terrible", "good", "bad", "yes", "no", "positive", "negative")
_BLOCK = 1 << 20  # numbers drawn for a tensor; a larger one, of a `random:` base, repeats them


def build(
    model_id: str, auto: Any, labels: dict[str, int], options: dict[str, Any]
) -> tuple[Any, Any]:
    """The model that ``random:FAMILY-SIZE`` stands for, and a tokenizer of bytes.

    Args:
        model_id: as above.
        auto: the transformers class for the task.
        labels: entries of the configuration that the task adds.
        options: for ``auto.from_config``.

    Raises:
        ModelError: the shape is unknown.
    """
    shape = SHAPES.get(model_id.removeprefix("random:"))
    if shape is None:
        raise ModelError(f"{model_id}: unknown shape; known are {', '.join(SHAPES)}")
    family, sizes = shape
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, **special, **labels)
    with no_init_weights():
        base = auto.from_config(config, **options)
    base.tie_weights()
    for name, parameter in base.named_parameters():
        fill(0, name, parameter)  # as a checkpoint would be: the same for every run
    return base, _byte_tokenizer()


def _byte_tokenizer() -> Any:
    """Bytes, and a few label words as one token each with their leading space."""
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
