"""How good the model is: what a score says, by the name of what the task measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from protocol.experiment import Experiment
from protocol.messages import Score

MAX_EXPONENT = 700.0  # exp of more is not a double


@dataclass(frozen=True)
class Quality:
    """The measures of one task.

    Attributes:
        name: of ``Score.metric``.
        is_causal: the loss is of tokens, so that it has a perplexity.
    """

    name: str
    is_causal: bool

    @staticmethod
    def of(experiment: Experiment) -> Quality:
        is_causal = experiment.data.task == "causal"
        return Quality("token accuracy" if is_causal else "accuracy", is_causal)

    def more(self, score: Score) -> dict[str, Any]:
        """What an evaluation has besides loss and metric; what it has not is left out."""
        out: dict[str, Any] = {"perplexity": perplexity(score)} if self.is_causal else {}
        return out if score.rouge_l is None else out | {"rouge_l": score.rouge_l}

    def summary(self, before: Score, after: Score) -> dict[str, Any]:
        """The same of a whole run."""
        out: dict[str, Any] = {}
        if self.is_causal:
            out["perplexity"] = {"before": perplexity(before), "after": perplexity(after)}
        return out if after.rouge_l is None else out | {"rouge_l": after.rouge_l}

    def texts(self, score: Score) -> list[tuple[str, str]]:
        """For people: names and values, the loss first."""
        out = [("loss", f"{score.loss:.4f}")]
        if self.is_causal and (value := perplexity(score)) is not None:
            out.append(("perplexity", f"{value:.4g}"))
        out.append((self.name, f"{score.metric:.1%}"))
        return out if score.rouge_l is None else [*out, ("Rouge-L", f"{score.rouge_l:.1%}")]


def perplexity(score: Score) -> float | None:
    """E to the loss; None if that is more than a double holds."""
    return math.exp(score.loss) if score.loss < MAX_EXPONENT else None
