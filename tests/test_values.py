"""The codings of values: bounds, layouts by hand, and that nothing else is read."""

from __future__ import annotations

import math
import struct
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol import kernels, noise
from protocol.values import BLOCK, Coding, Flat, decode, encode, nbytes, rounded
from protocol.wire import RemoteProtocolError
from tests.oracles import f32

CODINGS: tuple[Coding, ...] = get_args(Coding)
KEY = noise.key("values", 1, 2)
TOP = float(np.finfo(np.float32).max)
keys = st.integers(0, 2**64 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def vectors(draw: st.DrawFn) -> Flat:
    """All of binary32, or numbers of one size, over up to three blocks."""
    n = draw(st.integers(0, 2 * BLOCK + 20))
    if draw(st.booleans()):
        return draw(hnp.arrays(np.float32, n, elements=finite))
    normal = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(n)
    return (normal * 2.0 ** draw(st.integers(-140, 120))).astype(np.float32)


def assert_only_encode_makes(coding: Coding, count: int, buffer: bytes) -> None:
    """Refused, or finite values that are this buffer, whatever the key."""
    try:
        values = decode(coding, count, buffer)
    except RemoteProtocolError:
        return
    assert values.dtype == np.float32
    assert values.shape == (count,)
    assert np.isfinite(values).all()
    assert encode(coding, values, KEY) == buffer
    assert encode(coding, values, KEY + 1) == buffer


def blocks_of(x: Flat) -> list[Flat]:
    return [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]


def largest(x: Flat) -> float:
    return float(np.abs(x).max(initial=0))


# --- there and back ----------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
@given(values=vectors(), key=keys, other=keys)
def test_the_size_was_known_and_a_second_rounding_changes_nothing(
    coding: Coding, values: Flat, key: int, other: int
) -> None:
    before = values.copy()
    values.flags.writeable = False
    buffer = encode(coding, values, key)
    assert values.tobytes() == before.tobytes()
    assert len(buffer) == nbytes(coding, len(values))
    once = decode(coding, len(values), buffer)
    assert once.dtype == np.float32
    assert once.shape == values.shape
    assert rounded(coding, values, key).tobytes() == once.tobytes()
    assert encode(coding, once, other) == buffer
    for raw in (memoryview(buffer), memoryview(b"x" + buffer)[1:]):
        assert decode(coding, len(values), raw).tobytes() == once.tobytes()


@given(vectors(), keys)
def test_f32_changes_nothing_and_shares_the_memory(values: Flat, key: int) -> None:
    buffer = encode("f32", values, key)
    back = decode("f32", len(values), buffer)
    assert back.tobytes() == values.tobytes()
    if len(values):
        assert np.shares_memory(back, np.frombuffer(buffer, np.uint8))


@given(vectors())
def test_16_bits_keep_11_or_8_of_them(values: Flat) -> None:
    exact = values.astype(np.float64)
    error = np.abs(rounded("f16", values, KEY) - exact)
    assert (error <= np.maximum(np.abs(exact) * 2.0**-11, largest(values) * 2.0**-39)).all()
    error = np.abs(rounded("bf16", values, KEY) - exact)
    assert (error <= np.maximum(np.abs(exact) * 2.0**-8, 2.0**-134)).all()


@given(vectors(), keys)
def test_int8_is_a_step_off_at_most(values: Flat, key: int) -> None:
    for block, before in zip(
        blocks_of(rounded("int8", values, key)), blocks_of(values), strict=True
    ):
        tiny = 127 * 2.0**-126
        step = max(largest(before) / 126, tiny if largest(before) <= tiny * (1 + 2**-16) else 0)
        assert (np.abs(block - before.astype(np.float64)) <= step).all()


@given(vectors())
def test_sign_keeps_the_signs_and_the_mean_size(values: Flat) -> None:
    back = rounded("sign", values, KEY)
    assert np.signbit(back).tolist() == np.signbit(values).tolist()
    assert len(set(np.abs(back).tolist())) <= 1
    if len(values):
        mean = math.fsum(np.abs(values).tolist()) / len(values)
        assert abs(back[0]) == pytest.approx(mean, rel=2**-24, abs=2**-149)


@pytest.mark.parametrize("coding", ["f16", "bf16"])
def test_zeros_keep_their_signs_in_16_bits(coding: Coding) -> None:
    values = f32(0, -0.0)
    assert rounded(coding, values, KEY).tobytes() == values.tobytes()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    "values",
    [(TOP,), (-TOP, 1), (TOP, TOP), (2.0**-149,), (2.0**-126, -(2.0**-149)), (65504,), (65519, 1)],
)
def test_the_ends_of_binary32_come_back_finite(coding: Coding, values: tuple[float, ...]) -> None:
    once = rounded(coding, f32(*values), KEY)
    assert np.isfinite(once).all()
    assert rounded(coding, once, KEY + 1).tobytes() == once.tobytes()
    if coding in ("f16", "bf16"):
        unit = 2.0**-134 if coding == "bf16" else 2.0**-39 * max(map(abs, values))
        np.testing.assert_allclose(once, f32(*values), rtol=2.0**-8, atol=unit)


def test_encode_takes_any_layout_in_memory() -> None:
    strided = np.arange(6, dtype=np.float32)[::2]
    for coding in CODINGS:
        assert encode(coding, strided, KEY) == encode(coding, f32(0, 2, 4), KEY)
        assert encode(coding, strided.astype(">f4"), KEY) == encode(coding, strided, KEY)


# --- chance ------------------------------------------------------------------------------


def test_int8_is_right_on_average() -> None:
    """Error over the steps of 600 values, 400 keys: within 5 standard errors each, 4 in all."""
    values = np.random.default_rng(1).standard_normal(600).astype(np.float32)
    steps = np.concatenate([np.full(len(b), largest(b) / 127) for b in blocks_of(values)])
    keys = [noise.key("values", i) for i in range(400)]
    errors = np.stack([(rounded("int8", values, k) - values) / steps for k in keys])
    part = np.abs(values / steps) % 1
    deviation = np.sqrt(part * (1 - part))  # of one draw, between the two neighbours
    assert (np.abs(errors.mean(axis=0)) <= 5 * deviation / 20 + 2.0**-8).all()
    assert abs(errors.mean()) <= 4 * np.sqrt((deviation**2).mean() / errors.size) + 2.0**-16
    np.testing.assert_allclose((errors**2).mean(), (deviation**2).mean(), rtol=0.02)


def test_int8_rounds_up_where_the_stream_says_so() -> None:
    """By hand: |v| in steps plus a uniform number on (0, 1), and the integer part of that."""
    values = f32(127, *(-0.25, 0.75, 2.5, -126.5) * 100)  # two blocks; the second scaled by 126.5
    got = rounded("int8", values, KEY)
    draws = noise.uniforms(KEY, 0, len(values)).astype(np.float64) / 2 + 0.5
    by_hand = np.copysign(np.floor(np.abs(values[:BLOCK]) + draws[:BLOCK]), values[:BLOCK])
    assert got[:BLOCK].tolist() == by_hand.tolist()
    other = rounded("int8", values, KEY + 1)
    assert got[:BLOCK].tolist() != other[:BLOCK].tolist()
    assert got[BLOCK:].tolist() != other[BLOCK:].tolist()


def test_the_draws_of_a_long_vector_which_may_be_compiled_are_those_of_the_stream() -> None:
    count, few = kernels.WORTH + 1, 3 * BLOCK
    up_to_127 = np.minimum(np.arange(128, dtype=np.float32) + 0.5, 127)  # so the scale is 1
    values = np.tile(up_to_127, count // 128 + 1)[:count]
    got = rounded("int8", values, KEY)
    draws = noise.uniforms(KEY, count - few, count).astype(np.float64) / 2 + 0.5
    by_hand = np.minimum(np.floor(values[-few:] + draws), 127)
    assert got[-few:-1].tolist() == by_hand[:-1].tolist()  # the last is a block by itself


@given(vectors(), keys)
def test_the_largest_of_a_block_is_always_127_steps(values: Flat, key: int) -> None:
    raw = encode("int8", values, key)
    steps = np.frombuffer(raw, np.int8, offset=len(raw) - len(values)).astype(np.int64)
    for i, block in enumerate(blocks_of(values)):
        is_largest = np.abs(block) == largest(block)
        got = np.abs(steps[i * BLOCK :][: len(block)][is_largest])
        assert (got == 127).all() or (largest(block) < 127.01 * 2.0**-126 and not got.any())


# --- layouts by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "values", "written"),
    [
        ("f32", (1, -2, 0.5), "0000803f" + "000000c0" + "0000003f"),
        # 2 is 2^15 with E = -14, in binary16 7800; 1 is 2^14, 7400
        ("f16", (1, -2, 0.5), "f2" + "0074" + "00f8" + "0070"),
        # the largest is 2^15, so halves are 1 apart at 2^11 and 2^-24 near 0; ties go to even
        (
            "f16",
            (1, 1 + 2**-11, 1 + 3 * 2**-11, 2**-40, 3 * 2**-40),
            "f1" + "0078" + "0078" + "0278" + "0000" + "0200",
        ),
        ("f16", (), "83"),
        ("f16", (0, -0.0), "83" + "0000" + "0080"),
        ("f16", (65504,), "00" + "ff7b"),
        ("f16", (65520,), "01" + "0078"),  # would be 65536, so 2^15 with E = 1
        ("f16", (TOP,), "70" + "ff7b"),
        ("bf16", (1, -2, 0.5), "803f" + "00c0" + "003f"),
        ("bf16", (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20), "803f" + "823f" + "813f"),
        ("bf16", (TOP, -TOP), "7f7f" + "7fff"),
        ("int8", (127, -3, 0), "0000803f" + "7ffd00"),
        ("int8", (-254, 4, -2), "00000040" + "8102ff"),
        ("int8", (TOP, -TOP), "0002017c" + "7f81"),
        ("int8", (0, 0), "00000000" + "0000"),
        ("int8", (), ""),
        ("sign", (1, -2, 0.5, -0.5), "0000803f" + "0a"),
        ("sign", (-3,) * 9, "00004040" + "ff01"),
        ("sign", (), "00000000"),
    ],
)
def test_golden_bytes(coding: Coding, values: tuple[float, ...], written: str) -> None:
    assert encode(coding, f32(*values), KEY).hex() == written
    back = decode(coding, len(values), bytes.fromhex(written))
    assert encode(coding, back, KEY + 1).hex() == written


def test_a_scale_for_each_block_stands_before_all_values() -> None:
    values = np.concatenate([np.full(BLOCK, 127, np.float32), f32(0.5 * 127, 1)])
    raw = encode("int8", values, KEY)
    assert raw == struct.pack("<2f", 1, 0.5) + b"\x7f" * (BLOCK + 1) + b"\x02"


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_not_sent(coding: Coding, bad: float) -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        encode(coding, f32(1, bad), KEY)
    with pytest.raises(ArithmeticError, match="not finite"):
        rounded(coding, f32(1, bad), KEY)


@pytest.mark.parametrize(
    ("coding", "count", "buffer"),
    [
        ("f32", 1, "0000807f"),  # infinity, NaN
        ("f32", 1, "0000c07f"),
        ("f32", 1, "000080"),
        ("f32", 1, "0000803f00"),
        ("f32", -1, ""),
        ("f16", 1, "f2" + "007c"),  # infinity, NaN
        ("f16", 1, "f2" + "00fe"),
        ("f16", 1, "71" + "0078"),  # E out of bounds
        ("f16", 1, "82" + "0078"),
        ("f16", 1, "f2" + "ff77"),  # E could be smaller
        ("f16", 2, "00" + "0000" * 2),
        ("f16", 0, "00"),
        ("f16", 0, ""),
        ("f16", 1, "f200"),
        ("bf16", 1, "807f"),  # infinity, NaN
        ("bf16", 1, "c0ff"),
        ("bf16", 1, "80"),
        ("int8", 2, "0000803f" + "7e00"),  # no 127
        ("int8", 2, "0000803f" + "0000"),
        ("int8", 2, "0000803f" + "807f"),  # -128
        ("int8", 2, "00000000" + "0001"),  # a value without a scale
        ("int8", 2, "00000080" + "0000"),  # scale: minus 0, below 0, infinity, NaN
        ("int8", 2, "000080bf" + "7f00"),
        ("int8", 2, "0000807f" + "7f00"),
        ("int8", 2, "0000c07f" + "7f00"),
        ("int8", 2, "0000807f" + "0000"),
        ("int8", 2, "8002017c" + "7f00"),  # 127 times that is beyond binary32
        ("int8", 2, "4000803f" + "7f00"),  # more than 17 bits, less than a normal number
        ("int8", 2, "0100803f" + "7f00"),
        ("int8", 2, "80ff7f00" + "7f00"),
        ("int8", 2, "00000000" + "00"),
        ("sign", 1, "000080bf" + "00"),  # scale: below 0, minus 0, infinity, NaN
        ("sign", 1, "00000080" + "00"),
        ("sign", 1, "0000807f" + "00"),
        ("sign", 1, "0000c07f" + "00"),
        ("sign", 1, "0000803f" + "02"),  # spare bits
        ("sign", 7, "0000803f" + "80"),
        ("sign", 8, "0000803f" + "0000"),
        ("sign", 0, "0000803f"),  # a scale for nothing
        ("sign", 0, ""),
    ],
)
def test_what_encode_does_not_make_is_refused(coding: Coding, count: int, buffer: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(coding, count, bytes.fromhex(buffer))


@pytest.mark.parametrize("coding", CODINGS)
@given(values=vectors(), data=st.data())
def test_a_damaged_buffer_is_refused_or_another_message(
    coding: Coding, values: Flat, data: st.DataObject
) -> None:
    values = values[data.draw(st.integers(0, 3)) :][: data.draw(st.integers(0, 9))]
    count, buffer = len(values), encode(coding, values, KEY)
    for end in range(len(buffer)):
        with pytest.raises(RemoteProtocolError):
            decode(coding, count, buffer[:end])
    with pytest.raises(RemoteProtocolError):
        decode(coding, count, buffer + b"\0")
    for bit in range(8 * len(buffer)):
        flipped = bytearray(buffer)
        flipped[bit // 8] ^= 1 << bit % 8
        assert_only_encode_makes(coding, count, bytes(flipped))


@pytest.mark.parametrize("coding", CODINGS)
@given(count=st.integers(0, 300), data=st.data())
def test_garbage_of_the_right_size_is_what_encode_makes_or_is_refused(
    coding: Coding, count: int, data: st.DataObject
) -> None:
    size = nbytes(coding, count)
    seed = data.draw(st.integers(0, 2**32))
    buffer = bytearray(np.random.default_rng(seed).bytes(size))
    if coding in ("int8", "sign"):
        some = data.draw(st.sampled_from(["0000803f", "80ff7f3f", "00000000", "8000800d"]))
        buffer[: 4 * -(-count // BLOCK)] = bytes.fromhex(some) * -(-count // BLOCK)
    assert_only_encode_makes(coding, count, bytes(buffer))
    assert_only_encode_makes(coding, count, data.draw(st.binary(max_size=30)))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_sizes(coding: Coding, count: int) -> None:
    sizes: dict[Coding, int] = {
        "f32": 4 * count,
        "f16": 1 + 2 * count,
        "bf16": 2 * count,
        "int8": count + 4 * math.ceil(count / 256),
        "sign": 4 + math.ceil(count / 8),
    }
    assert nbytes(coding, count) == sizes[coding]
