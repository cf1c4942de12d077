"""An output head over a large vocabulary, some tokens at a time.

The logits of 2,048 tokens over 49,152 words are 400 MB in fp32, and backpropagation
would keep them three times over: more than all else of a small model.  Here only the
scored tokens pass the head, a chunk of them at a time, and of a chunk no more is kept
than what went in; backpropagation computes its logits once again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from protocol.errors import ModelError

CHUNK = 128  # tokens; 25 MB of logits over 49,152 words

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits, targets to a sum


@dataclass(frozen=True)
class Scored:
    """Which outputs are scored, and how.

    Attributes:
        places: in the batch's tokens, row after row.
        targets: the token that is due at each place.
        measure: of a chunk's logits and targets, summed over the chunks.
    """

    places: torch.Tensor  # (tokens,)
    targets: torch.Tensor  # (tokens,)
    measure: Measure


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over tokens, fp32."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def loss_and_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(2,): the sum of the losses, and how many tokens have the highest logit."""
    right = (logits.argmax(dim=1) == targets).sum()
    return torch.stack([cross_entropy(logits, targets), right.float()])


def install(core: Any) -> None:
    """Let a causal model take ``scored=``, and return the measure's sum instead of logits.

    Without it the model works as before, so that it can still generate.  All chunks pass
    the head within one call of it, because whoever puts other tensors into the head
    (``node.shift``, ``node.forward``) does so for the time of a call.

    Raises:
        ModelError: the model does more to its logits than its output head.
    """
    head = core.get_output_embeddings()
    _check(core, head)
    head.forward = _Chunked(head.forward)
    whole = core.forward

    @functools.wraps(whole)  # generate() looks at the signature
    def forward(*args: Any, scored: Scored | None = None, **kwargs: Any) -> Any:
        if scored is None:
            return whole(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # peft's
        return head(core.base_model(*args, **given).last_hidden_state, scored)

    core.forward = forward


class _Chunked:
    """The head's forward: of all that comes in, or of what is scored."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forward = forward

    def __call__(self, hidden: torch.Tensor, *which: Scored) -> torch.Tensor:
        """Logits, or with a ``Scored`` the sum of its measure; hidden is (n, length, d).

        Not a keyword with a default: ``node.forward.rowwise`` runs in pieces what takes one
        tensor, and these pieces are made here.
        """
        if not which:
            return self._forward(hidden)
        (scored,) = which
        rows = hidden.reshape(-1, hidden.shape[-1])[scored.places]  # (tokens, d)
        chunks = zip(torch.split(rows, CHUNK), torch.split(scored.targets, CHUNK), strict=True)
        sums = [self._sum(part, targets, scored.measure) for part, targets in chunks]
        return functools.reduce(torch.add, sums)

    def _sum(self, part: torch.Tensor, targets: torch.Tensor, measure: Measure) -> torch.Tensor:
        def run(part: torch.Tensor) -> torch.Tensor:
            return measure(self._forward(part), targets)

        if not torch.is_grad_enabled():
            return run(part)
        kept: torch.Tensor = checkpoint(run, part, use_reentrant=False, preserve_rng_state=False)
        return kept


@torch.no_grad()
def _check(core: Any, head: Any) -> None:
    """Make sure that the logits are the head's output, of the base model's output.

    Some models scale or cap them, which would be left out.  Found out on two tokens,
    with a head whose output is so large that no change of it can pass unseen.
    """
    if head is None:
        raise ModelError("data.task causal: the model has no output head")
    seen: list[torch.Tensor] = []

    def stand_in(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return torch.linspace(-50, 50, 8).to(hidden).expand(*hidden.shape[:-1], -1)

    inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.long, device=core.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    forward, head.forward = head.forward, stand_in
    try:
        logits = core(**inputs).logits
    finally:
        head.forward = forward
    if not torch.equal(logits.float(), stand_in(seen[0]).float()):
        raise ModelError("data.task causal: the model scales or caps the logits of its head")
    if not torch.allclose(core.base_model(**inputs).last_hidden_state, seen[0], rtol=1e-3):
        raise ModelError("data.task causal: the model's head is not over its base model's output")
