from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol.payload import (
    Blocks,
    BlocksSpec,
    Dense,
    DenseSpec,
    Flat,
    Payload,
    Run,
    Scalars,
    ScalarsSpec,
    Sparse,
    SparseSpec,
    Spec,
    decode,
    encode,
    spec_of,
)
from protocol.wire import RemoteProtocolError
from tests.oracles import f32

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def arrays(n: int) -> st.SearchStrategy[Flat]:
    return hnp.arrays(np.float32, n, elements=finite)


@st.composite
def scalars(draw: st.DrawFn) -> Scalars:
    counts = draw(st.lists(st.integers(0, 5), max_size=4))
    scale, weight = st.floats(-1e30, 1e30), st.floats(0, 1e15, exclude_min=True)
    runs = tuple(Run(i, n, draw(scale), draw(weight)) for i, n in enumerate(counts))
    return Scalars(runs, draw(arrays(sum(counts))))


@st.composite
def sparses(draw: st.DrawFn) -> Sparse:
    size = draw(st.integers(0, 200))
    places = draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=min(size, 40)))
    if draw(st.booleans()):
        places = set(range(size)) - places  # the dense end, too
    return Sparse(size, np.array(sorted(places), np.int64), draw(arrays(len(places))))


denses = st.builds(
    Dense,
    st.integers(0, 40).flatmap(arrays),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
)


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    counts = draw(st.lists(st.integers(0, 6), max_size=5))
    values = draw(arrays(sum(counts))) * np.float32(1e-4)  # 16 bits hold what is below 2^116
    return Blocks.of(np.array(counts, np.int64), values, draw(st.sampled_from(["f32", "f16"])))


payloads: st.SearchStrategy[Payload] = st.one_of(scalars(), sparses(), denses, blocks())


def assert_same(left: Payload, right: Payload) -> None:
    assert type(left) is type(right)
    assert left.values.dtype == right.values.dtype == np.float32
    assert left.values.tobytes() == right.values.tobytes()  # -0.0 is not 0.0
    if isinstance(left, Scalars) and isinstance(right, Scalars):
        assert left.runs == right.runs
    if isinstance(left, Dense) and isinstance(right, Dense):
        assert left.units == right.units
    if isinstance(left, Sparse) and isinstance(right, Sparse):
        assert left.size == right.size
        assert left.places.dtype == right.places.dtype == np.int64
        assert left.places.tolist() == right.places.tolist()
    if isinstance(left, Blocks) and isinstance(right, Blocks):
        assert (left.coding, left.exponent) == (right.coding, right.exponent)
        assert left.counts.dtype == right.counts.dtype == np.int64
        assert left.counts.tolist() == right.counts.tolist()


@given(payloads)
def test_decode_inverts_encode_and_the_spec_knew_the_size(payload: Payload) -> None:
    spec = spec_of(payload)
    declared = spec.nbytes
    buffer = encode(payload)
    assert (len(buffer), buffer.format) == (declared, "B")
    assert_same(decode(spec, buffer), payload)
    assert_same(decode(spec, bytes(buffer)), payload)
    unaligned = memoryview(b"x" + bytes(buffer))[1:]
    assert_same(decode(spec, unaligned), payload)


@given(sparses())
def test_dense_fills_zeros_in_and_the_smaller_coding_is_chosen(payload: Sparse) -> None:
    dense = payload.dense()
    assert dense.dtype == np.float32
    assert dense[payload.places].tobytes() == payload.values.tobytes()
    assert np.count_nonzero(dense) == np.count_nonzero(payload.values)
    k, size = len(payload.places), payload.size
    assert spec_of(payload).nbytes == 4 * k + min(4 * k, -(-size // 8))


@pytest.mark.parametrize(
    ("size", "count", "places"),
    [(64, 1, "u32"), (64, 2, "bitmap"), (65, 2, "u32"), (64, 3, "bitmap"), (64, 0, "u32")],
)
def test_coding_by_hand_and_a_draw_goes_to_the_bitmap(size: int, count: int, places: str) -> None:
    spec = spec_of(Sparse(size, np.arange(count), np.ones(count, np.float32)))
    assert spec == SparseSpec(size, count, places)  # type: ignore[arg-type]


def test_places_past_32_bits_never_take_32_bits() -> None:
    assert spec_of(Sparse(1 << 32, np.array([(1 << 32) - 1]), f32(1))).nbytes == 8
    beyond = spec_of(Sparse((1 << 32) + 1, np.array([1 << 32]), f32(1)))
    assert beyond == SparseSpec((1 << 32) + 1, 1, "bitmap")


def test_layout_by_hand() -> None:
    one, minus = "0000803f", "000080bf"
    assert bytes(encode(Dense(f32(1, -1)))).hex() == one + minus
    assert bytes(encode(Scalars((Run(0, 1),), f32(-0.0)))).hex() == "00000080"
    by_bitmap = Sparse(10, np.array([0, 9]), f32(1, -1))
    assert bytes(encode(by_bitmap)).hex() == one + minus + "0102"  # bit 0 of a byte is first
    by_index = Sparse(100, np.array([0x41]), f32(1))
    assert bytes(encode(by_index)).hex() == one + "41000000"
    counts = np.array([0x102, 0])  # the lengths first, 16 bits each
    assert bytes(encode(Blocks(counts, np.ones(0x102, np.float32))))[:8].hex() == "02010000" + one
    half = Blocks(np.array([2]), f32(8, -3), "f16", 3)  # 1.0 and -0.375 times 2^3
    assert bytes(encode(half)).hex() == "0200" + "003c" + "00b6"


def test_a_decoded_dense_payload_shares_the_buffer() -> None:
    buffer = bytes(8)
    decoded = decode(DenseSpec(2), buffer)
    assert np.shares_memory(decoded.values, np.frombuffer(buffer, np.uint8))


def test_encode_takes_any_layout_in_memory() -> None:
    strided = np.arange(6, dtype=np.float32)[::2]
    assert bytes(encode(Dense(strided))) == bytes(encode(Dense(f32(0, 2, 4))))
    assert bytes(encode(Dense(strided.astype(">f4")))) == bytes(encode(Dense(f32(0, 2, 4))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    "kind", ["scalars", "sparse bitmap", "sparse u32", "dense", "blocks f32", "blocks f16"]
)
def test_a_value_that_is_not_finite_is_refused(kind: str, at: int, bad: float) -> None:
    values = f32(1, 1)
    values[at] = bad
    by_kind: dict[str, Payload] = {
        "scalars": Scalars((Run(0, 2),), values),
        "sparse bitmap": Sparse(8, np.array([1, 5]), values),
        "sparse u32": Sparse(800, np.array([1, 5]), values),
        "dense": Dense(values),
        "blocks f32": Blocks.of(np.array([1, 1]), values, "f32"),
        "blocks f16": Blocks.of(np.array([1, 1]), values, "f16"),
    }
    payload = by_kind[kind]
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(spec_of(payload), encode(payload))


def indices(*places: int) -> bytes:
    return np.ones(len(places), "<f4").tobytes() + np.array(places, "<u4").tobytes()


def u16(*numbers: int) -> bytes:
    return np.array(numbers, "<u2").tobytes()


@pytest.mark.parametrize(
    ("spec", "buffer", "why"),
    [
        (SparseSpec(9, 2, "u32"), indices(3, 3), "do not increase"),
        (SparseSpec(9, 2, "u32"), indices(4, 3), "do not increase"),
        (SparseSpec(9, 3, "u32"), indices(1, 8, 5), "do not increase"),
        (SparseSpec(9, 2, "u32"), indices(3, 9), "pass its size"),
        (SparseSpec(9, 1, "u32"), indices(0xFFFFFFFF), "pass its size"),
        (SparseSpec(0, 1, "u32"), indices(0), "pass its size"),
        (
            SparseSpec(9, 1, "bitmap"),
            bytes(4) + b"\x00\x02",
            "a place of the payload is beyond its size",
        ),
        (
            SparseSpec(9, 1, "bitmap"),
            bytes(4) + b"\x00\x81",
            "a place of the payload is beyond its size",
        ),
        (SparseSpec(9, 1, "bitmap"), bytes(4) + b"\x03\x00", "2 places for 1 values"),
        (SparseSpec(9, 1, "bitmap"), bytes(4) + b"\x00\x00", "0 places for 1 values"),
        (SparseSpec(9, 1, "bitmap"), bytes(5), "payload of 5 bytes, spec says 6"),
        (SparseSpec(9, 1, "u32"), bytes(9), "payload of 9 bytes, spec says 8"),
        (DenseSpec(2), bytes(7), "payload of 7 bytes, spec says 8"),
        (DenseSpec(1), bytes(8), "payload of 8 bytes, spec says 4"),
        (ScalarsSpec((Run(0, 1), Run(1, 2))), bytes(8), "payload of 8 bytes, spec says 12"),
        (BlocksSpec(2, 3), u16(1, 1) + bytes(12), "blocks of 2 values in all, not 3"),
        (BlocksSpec(2, 3), u16(2, 2) + bytes(12), "blocks of 4 values in all, not 3"),
        (BlocksSpec(2, 1), u16(0xFFFF, 2) + bytes(4), "blocks of 65537 values in all, not 1"),
        (BlocksSpec(0, 1), bytes(4), "blocks of 0 values in all, not 1"),
        (BlocksSpec(1, 1), u16(1) + bytes(2), "payload of 4 bytes, spec says 6"),
        (BlocksSpec(1, 1, "f16"), u16(1) + bytes(4), "payload of 6 bytes, spec says 4"),
        (BlocksSpec(2, 1), u16(1) + bytes(4), "payload of 6 bytes, spec says 8"),
        (BlocksSpec(1, 2, "f16"), u16(2, 0, 0x7C00), "not finite"),
        (BlocksSpec(1, 2, "f16"), u16(2, 0xFC00, 0), "not finite"),
        (BlocksSpec(1, 2, "f16", -100), u16(2, 0, 0x7E00), "not finite"),
        (BlocksSpec(1, 2, "f16"), u16(2, 0, 0x7C01), "not finite"),  # a signalling NaN
        (BlocksSpec(1, 1), u16(1, 1, 0x7F80), "not finite"),  # and one of 32 bits
    ],
)
def test_a_buffer_that_encode_could_not_have_made_is_refused(
    spec: Spec, buffer: bytes, why: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        decode(spec, buffer)


@given(st.integers(0, 40), st.integers(0, 6), st.sampled_from(["bitmap", "u32"]), st.data())
def test_garbage_of_the_right_size_decodes_to_legal_places_or_is_refused(
    size: int, count: int, places: str, data: st.DataObject
) -> None:
    spec = SparseSpec(size, count, places)  # type: ignore[arg-type]
    buffer = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    try:
        payload = decode(spec, buffer)
    except RemoteProtocolError:
        return
    assert isinstance(payload, Sparse)
    assert len(payload.places) == len(payload.values) == count
    assert payload.places.tolist() == sorted(set(payload.places.tolist()) & set(range(size)))


# --- blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("coding", "width"), [("f32", 4), ("f16", 2)])
def test_blocks_take_two_bytes_for_each_length_and_two_or_four_for_each_value(
    coding: Literal["f32", "f16"], width: int
) -> None:
    spec = spec_of(Blocks.of(np.array([3, 0, 65_535]), np.ones(65_538, np.float32), coding))
    assert spec == BlocksSpec(3, 65_538, coding, -14 if coding == "f16" else 0)
    assert spec.nbytes == 6 + width * 65_538


def in_16_bits(*values: float) -> Blocks:
    return Blocks.of(np.array([len(values)]), f32(*values), "f16")


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (1.0, -14),  # to 2^14: below 65,504 by a margin, and the rest as far above 0 as can be
        (0.75, -15),
        (-65_504.0, 1),  # a sign makes no difference
        (1e30, 85),
        (1e-30, -100),
        (1e-45, -100),  # the exponent goes no further
        (2.0**100, 86),
        (2.0**110, 96),
        (0.0, -15),
    ],
)
def test_the_largest_value_sets_the_exponent(largest: float, exponent: int) -> None:
    made = in_16_bits(largest, largest / 4)
    assert made.exponent == exponent
    if abs(largest) > 1e-37:  # else it is below what the smallest exponent leaves
        np.testing.assert_allclose(made.values, [largest, largest / 4], rtol=2**-11)
    assert_same(decode(spec_of(made), encode(made)), made)


def test_values_are_rounded_to_eleven_bits_or_a_part_of_the_largest_ties_to_even() -> None:
    """With 1 the unit is 2^-10; far below it 2^-38, the smallest half times 2^-14."""
    made = in_16_bits(1, 1 + 2**-10 + 2**-11, 1 + 2**-11, 0.1, 2.0**-38, 2.0**-39, 3 * 2.0**-39)
    assert made.exponent == -14
    assert made.values.tolist() == [1, 1 + 2**-9, 1, 1638 / 16_384, 2.0**-38, 0, 2.0**-37]


@settings(deadline=None)
@given(arrays(20), st.integers(-60, 60))
def test_what_was_rounded_once_is_carried_exactly_and_not_rounded_again(
    values: Flat, power: int
) -> None:
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.clip(values * np.float32(2.0**power), -1e30, 1e30)
    counts = np.array([7, 0, 13])
    once = Blocks.of(counts, scaled, "f16")
    back = decode(spec_of(once), encode(once))
    assert_same(back, once)
    unit = 2.0 ** max(once.exponent - 24, -124)
    allowed = np.maximum(np.abs(scaled.astype(np.float64)) * 2.0**-11, unit / 2)
    assert (np.abs(once.values.astype(np.float64) - scaled) <= allowed).all()


@pytest.mark.parametrize("coding", ["f32", "f16"])
def test_blocks_of_zeros_keep_their_signs_and_no_blocks_are_no_bytes(
    coding: Literal["f32", "f16"],
) -> None:
    zeros = Blocks.of(np.array([2, 2]), f32(0, -0.0, 0, 0), coding)
    assert_same(decode(spec_of(zeros), encode(zeros)), zeros)
    assert np.signbit(zeros.values).tolist() == [False, True, False, False]
    none = Blocks.of(np.array([], np.int64), f32(), coding)
    assert (spec_of(none).nbytes, len(encode(none))) == (0, 0)
    assert_same(decode(spec_of(none), encode(none)), none)


def test_full_precision_rounds_nothing() -> None:
    values = f32(1e-45, 3.4e38, 1 + 2**-23, -1e-30)
    made = Blocks.of(np.array([4]), values, "f32")
    assert made.values.tobytes() == values.tobytes()
    assert (made.coding, made.exponent) == ("f32", 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_what_16_bits_cannot_hold_is_refused_and_does_not_become_a_number(bad: float) -> None:
    made = in_16_bits(1, bad)
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(spec_of(made), encode(made))


def test_rounding_does_not_touch_the_callers_values() -> None:
    values = f32(1, 0.1)
    values.flags.writeable = False
    made = Blocks.of(np.array([2]), values, "f16")
    assert made.values.dtype == np.float32
    assert not np.shares_memory(made.values, values)


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 5), st.sampled_from(["f32", "f16"]), st.data())
def test_garbage_blocks_of_the_right_size_are_what_encode_makes_or_are_refused(
    count: int, values: int, coding: Literal["f32", "f16"], data: st.DataObject
) -> None:
    exponent = data.draw(st.integers(-100, 100)) if coding == "f16" else 0
    spec = BlocksSpec(count, values, coding, exponent)
    tail = spec.nbytes - 2 * count
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    buffer = u16(*lengths) + data.draw(st.binary(min_size=tail, max_size=tail))
    try:
        payload = decode(spec, buffer)
    except RemoteProtocolError:
        return
    assert isinstance(payload, Blocks)
    assert payload.counts.tolist() == lengths
    assert sum(lengths) == len(payload.values) == values
    assert np.isfinite(payload.values).all()
    assert bytes(encode(payload)) == buffer
    assert spec_of(payload) == spec


def test_an_exponent_means_nothing_with_full_precision() -> None:
    """``encode`` does not divide by it, so ``decode`` must not multiply, or must refuse."""
    try:
        back = decode(BlocksSpec(1, 1, "f32", 3), u16(1) + f32(1).tobytes())
    except RemoteProtocolError:
        return
    assert back.values.tolist() == [1]


# --- runs ------------------------------------------------------------------------------


def run_of(*fields: Any) -> Run:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Run)


def test_scale_and_weight_of_a_run_may_be_left_out() -> None:
    assert run_of(3, 5) == Run(3, 5, 1.0, 1.0)
    assert run_of(3, 5, -2.5) == Run(3, 5, -2.5, 1.0)
    assert run_of(3, 5, -2.5, 7) == run_of(3, 5, -2.5, 7.0) == Run(3, 5, -2.5, 7.0)


@pytest.mark.parametrize("weight", [0, -1, -0.0, 1.1e15, math.nan, math.inf, -math.inf])
def test_a_weight_is_above_zero_and_finite(weight: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        run_of(3, 5, 1.0, weight)
    assert run_of(3, 5, 1.0, 1e15).weight == 1e15


@pytest.mark.parametrize(
    "spec",
    [
        {"blocks": 1, "count": 1, "exponent": 101},
        {"blocks": 1, "count": 1, "exponent": -101},
        {"blocks": 1, "count": 1, "coding": "f64"},
        {"blocks": -1, "count": 1},
        {"blocks": 1},
    ],
)
def test_a_spec_of_blocks_out_of_bounds_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "blocks", **spec}, Spec)
    fine = msgspec.convert({"kind": "blocks", "blocks": 1, "count": 1}, Spec)
    assert fine == BlocksSpec(1, 1, "f32", 0)
