from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedalgos.masks import (
    Pool,
    decayed,
    places_of,
    rank_mask,
    restricted,
    sparsify,
    tensor_ranges,
    top_k,
)
from fedalgos.space import ParamSpace
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Flat
from tests.oracles import f32, space_of

# two pairs of rank 3 and a head: A (3, 2) at 0, B (2, 3) at 6, A (3, 1) at 12, B (1, 3) at 15
LORA = ParamSpace.of(
    [
        TensorInfo("a.lora_A.weight", (3, 2), "a"),
        TensorInfo("a.lora_B.weight", (2, 3), "a"),
        TensorInfo("b.lora_A.weight", (3, 1), "b"),
        TensorInfo("b.lora_B.weight", (1, 3), "b"),
        TensorInfo("head.weight", (2, 1), "head"),
    ]
)
vectors = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.integers(-3, 3).map(float)
)  # many ties, many zeros


def by_hand(x: Flat, k: int) -> list[int]:
    return sorted(sorted(range(len(x)), key=lambda i: (-abs(float(x[i])), i))[: max(0, k)])


def test_of_equals_the_lower_index_is_taken_whatever_its_sign() -> None:
    assert top_k(f32(1, -1, 1, -1), 2).tolist() == [0, 1]
    assert top_k(f32(0, -2, 1, 2, -2), 2).tolist() == [1, 3]
    assert top_k(f32(0, -0.0, 0), 1).tolist() == [0]
    assert top_k(np.ones(1000, np.float32), 300).tolist() == list(range(300))


def test_what_is_no_number_comes_last_and_by_index() -> None:
    x = f32(np.nan, 1, np.nan, np.inf)
    assert top_k(x, 1).tolist() == [3]
    assert top_k(x, 2).tolist() == [1, 3]
    assert top_k(x, 3).tolist() == [0, 1, 3]


@given(vectors, st.integers(-1, 41))
def test_top_k_is_the_stable_sort_by_magnitude(x: Flat, k: int) -> None:
    sparse = sparsify(x, k)
    assert sparse.places.tolist() == by_hand(x, k)
    assert sparse.places.dtype == np.int64
    assert sparse.dense()[sparse.places].tobytes() == x[sparse.places].tobytes()


@given(vectors, st.data())
def test_the_mask_follows_from_what_it_left_over_and_smaller_ones_nest(
    w: Flat, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(w)))
    fewer = data.draw(st.integers(0, k))
    always = data.draw(st.sets(st.integers(0, len(w) - 1), max_size=fewer).map(sorted))
    pool = Pool(len(w), np.array(always, np.int64))
    mask = pool.largest(w, k)
    x = restricted(w, mask)
    assert len(mask) == k
    assert pool.largest(x, k).tolist() == mask.tolist()
    assert pool.largest(x, fewer).tolist() == pool.largest(w, fewer).tolist()
    assert set(always) <= set(pool.largest(x, fewer).tolist()) <= set(mask.tolist())


def test_the_head_outside_is_always_in_and_takes_nobodys_place() -> None:
    pool = Pool.of(LORA, "outside")
    x = np.zeros(20, np.float32)
    x[[3, 7, 18]] = 1, 2, 9
    assert pool.always.tolist() == [18, 19]
    assert pool.count(2 / 18) == 4
    assert pool.largest(x, 4).tolist() == [3, 7, 18, 19]
    assert Pool.of(LORA, "inside").largest(x, 2).tolist() == [7, 18]


@pytest.mark.parametrize(
    "space", [space_of(3, 4), ParamSpace.of(LORA.tensors[:4]), ParamSpace.of(LORA.tensors[4:])]
)
def test_a_head_that_cannot_be_told_is_refused(space: ParamSpace) -> None:
    with pytest.raises(ExperimentError, match='head = "outside"'):
        Pool.of(space, "outside")
    assert not len(Pool.of(space, "inside").always)


@pytest.mark.parametrize(
    ("density", "size", "k"), [(0.29, 100, 29), (1.0, 7, 7), (1e-6, 7, 1), (0.25, 10, 2)]
)
def test_densities_are_rounded_and_never_nothing(density: float, size: int, k: int) -> None:
    assert Pool(size, np.arange(0)).count(density) == k
    assert Pool(size + 3, np.arange(3)).count(density) == k + 3


def test_densities_decay_by_steps() -> None:
    assert [decayed(1.0, 0.5, 2, r) for r in range(1, 7)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_ranks_are_rows_of_a_and_columns_of_b_by_hand() -> None:
    assert rank_mask(LORA, 1).tolist() == [0, 1, 6, 9, 12, 15, 18, 19]
    assert rank_mask(LORA, 2).tolist() == [0, 1, 2, 3, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19]
    assert rank_mask(LORA, 3).tolist() == rank_mask(LORA, 9).tolist() == list(range(20))


def test_the_tensors_but_some_by_hand() -> None:
    ranges = tensor_ranges(LORA, ".lora_A.")
    assert ranges == ((6, 12), (15, 18), (18, 20))
    assert places_of(ranges).tolist() == [*range(6, 12), *range(15, 20)]
    assert places_of(()).tolist() == []
