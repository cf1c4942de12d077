"""What a score says, under the name of what was measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator.quality import Quality
from protocol import experiment as experiments
from protocol.messages import Score


def quality(**data: Any) -> Quality:
    table: dict[str, Any] = {"run": {"name": "r"}, "model": {"id": "m"}, "data": {"id": "d"} | data}
    table |= {"rounds": {"count": 1}, "method": {"name": "fedavg"}}
    return Quality.of(experiments.convert(table, "here"))


def score(loss: float, rouge_l: float | None = None) -> Score:
    return Score(version=0, loss=loss, metric=0.25, examples=2, rouge_l=rouge_l)


def test_a_classification_has_accuracy_and_nothing_else() -> None:
    q = quality()
    assert q.texts(score(1.5)) == [("loss", "1.5000"), ("accuracy", "25.0%")]
    assert q.more(score(1.5)) == q.summary(score(1.5), score(1.0)) == {}


def test_a_causal_score_has_perplexity_and_token_accuracy() -> None:
    q, value = quality(task="causal"), pytest.approx(math.exp(1.5))
    assert q.texts(score(1.5)) == [
        ("loss", "1.5000"), ("perplexity", "4.482"), ("token accuracy", "25.0%")
    ]  # fmt: skip
    assert q.more(score(1.5)) == {"perplexity": value}
    assert q.summary(score(1.5), score(0.0)) == {"perplexity": {"before": value, "after": 1.0}}


def test_rouge_l_is_there_once_it_was_measured() -> None:
    q = quality(task="causal")
    assert q.texts(score(0.0, 0.5))[-1] == ("Rouge-L", "50.0%")
    assert q.more(score(0.0, 0.5)) == {"perplexity": 1.0, "rouge_l": 0.5}
    assert q.summary(score(0.0), score(0.0, 0.0))["rouge_l"] == 0.0


def test_a_diverged_model_has_no_perplexity() -> None:
    q = quality(task="causal")
    assert q.more(score(1e30)) == {"perplexity": None}
    assert [name for name, _ in q.texts(score(1e30))] == ["loss", "token accuracy"]
