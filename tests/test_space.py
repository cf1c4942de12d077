from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalgos.space import ParamSpace, Unit, digest
from protocol.parts import TensorInfo
from tests.oracles import f32, space_of

TENSORS = [
    TensorInfo("a.A", (2, 3), "a"),
    TensorInfo("a.B", (2,), "a"),
    TensorInfo("head.bias", (), "head"),
    TensorInfo("b.A", (1, 4), "b"),
]
SPACE = ParamSpace.of(TENSORS)
X = np.arange(13, dtype=np.float32)


def test_tensors_lie_in_order_and_units_span_them() -> None:
    assert SPACE.offsets == (0, 6, 8, 9, 13)
    assert SPACE.size == 13
    assert SPACE.units == (Unit("a", 0, 8), Unit("head", 8, 9), Unit("b", 9, 13))


def test_named_gives_views_in_their_shapes() -> None:
    x = X.copy()
    named = SPACE.named(x)
    assert list(named) == ["a.A", "a.B", "head.bias", "b.A"]
    assert {n: t.shape for n, t in named.items()} == {t.name: t.shape for t in TENSORS}
    assert named["a.A"].tolist() == [[0, 1, 2], [3, 4, 5]]
    named["b.A"][0, 0] = -1
    assert x[9] == -1


def test_no_units_means_everything() -> None:
    assert SPACE.ranges() == ((0, 13),)
    assert SPACE.count() == 13
    assert SPACE.take(X).tolist() == X.tolist()


def test_units_are_taken_in_the_order_named() -> None:
    assert SPACE.ranges((2, 1)) == ((9, 13), (8, 9))
    assert SPACE.count((2, 1)) == 5
    assert SPACE.take(X, (2, 1)).tolist() == [9, 10, 11, 12, 8]


def test_putting_all_takes_the_values_themselves_if_they_may_be_written_to() -> None:
    values = X + 1
    assert SPACE.put(X, values) is values
    values.flags.writeable = False
    got = SPACE.put(X, values)
    assert got.flags.writeable
    np.testing.assert_array_equal(got, X + 1)


@pytest.mark.parametrize(("count", "units"), [(12, ()), (14, ()), (2, (1,)), (0, (1,))])
def test_values_of_another_number_than_the_units_have_are_refused(
    count: int, units: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=f"{count} values for"):
        SPACE.put(X, np.zeros(count, np.float32), units)


def test_take_is_a_copy_and_put_leaves_its_argument_alone() -> None:
    x = X.copy()
    SPACE.take(x)[:] = -1
    SPACE.take(x, (1,))[:] = -1
    SPACE.put(x, f32(7), (1,))[:] = -1
    assert x.tobytes() == X.tobytes()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
def test_put_inverts_take_and_touches_nothing_else(sizes: list[int], data: st.DataObject) -> None:
    space = space_of(*sizes)
    units = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(1, len(sizes)))]
    x = np.arange(space.size, dtype=np.float32)
    values = -1 - space.take(x, units)
    y = space.put(x, values, units)
    assert space.take(y, units).tolist() == values.tolist()
    rest = [u for u in range(len(sizes)) if u not in units]
    if rest:
        assert space.take(y, rest).tolist() == space.take(x, rest).tolist()


def test_a_scattered_unit_and_an_empty_space_are_refused() -> None:
    with pytest.raises(ValueError, match="unit a is scattered"):
        ParamSpace.of([TENSORS[0], TENSORS[2], TENSORS[1]])
    with pytest.raises(ValueError, match="no tensor is trained"):
        ParamSpace.of([])


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.A"):
        ParamSpace.of([TENSORS[0], TensorInfo("a.A", (1,), "a")])


@pytest.mark.parametrize(
    "other",
    [
        TensorInfo("a.C", (2, 3), "a"),
        TensorInfo("a.A", (3, 2), "a"),
        TensorInfo("a.A", (2, 3), "c"),
    ],
)
def test_the_spaces_digest_covers_names_shapes_and_units(other: TensorInfo) -> None:
    assert len(SPACE.digest) == 16
    assert ParamSpace.of(TENSORS).digest == SPACE.digest
    one = ParamSpace.of([TENSORS[0]])
    assert ParamSpace.of([other]).digest != one.digest


def test_the_spaces_digest_is_pinned() -> None:
    assert SPACE.digest.hex() == "192e9036a9e71d6ff07a6ea623248005"


def test_the_digest_of_parameters_is_over_their_bits() -> None:
    assert digest(f32(1, 2)).hex() == "42f796cded228dc080ef1964ee5d73c3"
    assert digest(f32(0)) != digest(f32(-0.0))
    assert digest(np.arange(6, dtype=np.float32)[::2]) == digest(f32(0, 2, 4))
    assert digest(f32(1, 2).astype(">f4")) == digest(f32(1, 2))
    assert len(digest(f32())) == 16
