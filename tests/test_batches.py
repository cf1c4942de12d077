"""The order of a client's examples."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import batches


def rows(n: int, size: int, steps: int, *, seed: int = 1, client: int = 2, round: int = 3) -> (
    list[list[int]]
):  # fmt: skip
    drawn = batches.indices(n, size, steps, seed=seed, client=client, round=round)
    return [batch.tolist() for batch in drawn]


def flat(drawn: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(drawn))


def test_no_example_comes_twice_within_a_pass() -> None:
    drawn = rows(12, 4, 6)
    for start in (0, 3):
        once = flat(drawn[start : start + 3])
        assert sorted(once) == list(range(12))
    assert drawn[:3] != drawn[3:]  # the second pass has an order of its own


@given(n=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 30))
def test_examples_are_dealt_as_evenly_as_can_be(n: int, size: int, steps: int) -> None:
    drawn = rows(n, size, steps)
    assert [len(batch) for batch in drawn] == [min(size, n)] * steps
    dealt = flat(drawn)
    for start in range(0, len(dealt), n):  # pass by pass
        part = dealt[start : start + n]
        assert len(set(part)) == len(part)
    counts = Counter(dealt)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(n)) <= 1


@given(n=st.integers(1, 40), size=st.integers(1, 50))
def test_0_steps_are_one_pass_with_a_short_last_batch(n: int, size: int) -> None:
    drawn = rows(n, size, 0)
    assert sorted(flat(drawn)) == list(range(n))
    assert all(len(batch) == min(size, n) for batch in drawn[:-1])
    assert len(drawn) == -(-n // min(size, n))


def test_a_shard_smaller_than_a_batch_is_a_batch() -> None:
    assert [sorted(batch) for batch in rows(3, 16, 2)] == [[0, 1, 2]] * 2


def test_the_order_is_a_function_of_seed_client_and_round() -> None:
    assert rows(100, 8, 3) == rows(100, 8, 3)
    others = [rows(100, 8, 3, seed=9), rows(100, 8, 3, client=9), rows(100, 8, 3, round=9)]
    assert all(other != rows(100, 8, 3) for other in others)
    assert rows(100, 8, 3) == [*rows(100, 8, 2), rows(100, 8, 3)[-1]]  # not of the steps


def test_the_order_is_pinned() -> None:
    """Any change here changes every result."""
    assert rows(10, 4, 3) == [[2, 4, 5, 1], [6, 3, 8, 9], [0, 7, 7, 4]]


@pytest.mark.parametrize("steps", [0, 2])
def test_rows_are_integers_that_index(steps: int) -> None:
    first = next(batches.indices(5, 2, steps, seed=0, client=0, round=0))
    assert first.dtype == np.int64
