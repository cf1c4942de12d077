from __future__ import annotations

import math
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol import noise, places, values
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
from protocol.values import Coding
from protocol.wire import LocalProtocolError, RemoteProtocolError
from tests import fuzz_payload
from tests.oracles import f32

CODINGS: tuple[Coding, ...] = get_args(Coding)
KEY = noise.key("rounding", 1, 2, 3)
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
    where, coding = np.array(sorted(places), np.int64), draw(st.sampled_from(CODINGS))
    return Sparse.of(size, where, draw(arrays(len(where))), coding, draw(st.integers(0, 99)))


denses = st.builds(
    Dense,
    st.integers(0, 40).flatmap(arrays),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
)


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    counts = draw(st.lists(st.integers(0, 6), max_size=5))
    coding: Literal["f32", "f16"] = draw(st.sampled_from(["f32", "f16"]))
    return Blocks.of(np.array(counts, np.int64), draw(arrays(sum(counts))), coding)


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
        assert (left.size, left.coding) == (right.size, right.coding)
        assert left.places.dtype == right.places.dtype == np.int64
        assert left.places.tolist() == right.places.tolist()
    if isinstance(left, Blocks) and isinstance(right, Blocks):
        assert left.coding == right.coding
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
    fuzz_payload.check(spec, bytes(buffer))


def test_layout_by_hand() -> None:
    one, minus = "0000803f", "000080bf"
    assert bytes(encode(Dense(f32(1, -1)))).hex() == one + minus
    assert bytes(encode(Scalars((Run(0, 1),), f32(-0.0)))).hex() == "00000080"
    sparse = Sparse(10, np.array([0, 9]), f32(1, -1))  # values, then places, here as a bitmap
    assert bytes(encode(sparse)).hex() == one + minus + "01" + "0102"
    signs = Sparse(10, np.array([0, 9]), f32(1, -1), "sign")
    assert bytes(encode(signs)).hex() == one + "02" + "01" + "0102"
    counts = np.array([0x102, 0])  # the lengths first, 16 bits each
    assert bytes(encode(Blocks(counts, np.ones(0x102, np.float32))))[:8].hex() == "02010000" + one
    half = Blocks(np.array([2]), f32(8, -3), "f16")  # 2^15 and -3 x 2^12 times 2^-12
    assert bytes(encode(half)).hex() == "0200" + "f4" + "0078" + "00f2"


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
@pytest.mark.parametrize("kind", ["scalars", "dense", "sparse", "blocks"])
def test_a_value_that_is_not_finite_is_refused(kind: str, at: int, bad: float) -> None:
    x = f32(1, 1)
    x[at] = bad
    fine: dict[str, Payload] = {
        "scalars": Scalars((Run(0, 2),), f32(1, 1)),
        "dense": Dense(f32(1, 1)),
        "sparse": Sparse(8, np.array([1, 5]), f32(1, 1)),
        "blocks": Blocks(np.array([1, 1]), f32(1, 1)),
    }
    spec, buffer = spec_of(fine[kind]), bytes(encode(fine[kind]))
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(spec, buffer.replace(f32(1, 1).tobytes(), x.tobytes()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("coding", CODINGS)
def test_rounding_leaves_what_is_not_finite_to_be_found_and_it_is_not_sent(
    coding: Coding, bad: float
) -> None:
    x = f32(1, bad, 0.3)
    made: list[Payload] = [Sparse.of(8, np.array([1, 5, 6]), x, coding, KEY)]
    if coding in ("f32", "f16"):
        made.append(Blocks.of(np.array([1, 2]), x, coding))
    for payload in made:
        assert payload.values.tobytes() == x.tobytes()
        with pytest.raises(ArithmeticError, match="not finite"):
            encode(payload)


def ones(count: int) -> bytes:
    return np.ones(count, "<f4").tobytes()


def u16(*numbers: int) -> bytes:
    return np.array(numbers, "<u2").tobytes()


@pytest.mark.parametrize(
    ("spec", "buffer", "why"),
    [
        (DenseSpec(2), bytes(7), "payload of 7 bytes, spec says 8"),
        (DenseSpec(1), bytes(8), "payload of 8 bytes, spec says 4"),
        (DenseSpec(1 << 40), bytes(8), "payload of 8 bytes, spec says"),
        (ScalarsSpec((Run(0, 1), Run(1, 2))), bytes(8), "payload of 8 bytes, spec says 12"),
        (SparseSpec(9, 1, 2), bytes(5), "payload of 5 bytes, spec says 6"),
        (SparseSpec(9, 1, 2), bytes(7), "payload of 7 bytes, spec says 6"),
        (SparseSpec(9, 1, 2, "f16"), bytes(6), "payload of 6 bytes, spec says 5"),
        (SparseSpec(1 << 40, 1 << 40, 1), ones(1) + b"\0", "payload of 5 bytes, spec says"),
        (SparseSpec(9, 2, 2), ones(2) + b"\1\x01", "not what their coding makes"),  # one place
        (SparseSpec(9, 2, 2), ones(2) + b"\1\x07", "not what their coding makes"),  # three
        (SparseSpec(3, 1, 2), ones(1) + b"\1\x08", "not what their coding makes"),  # too far
        (SparseSpec(9, 2, 3), ones(2) + b"\1\x03\0", "not what their coding makes"),  # trailing
        (SparseSpec(20, 3, 5), ones(3) + bytes.fromhex("0300010208"), "not what their coding"),  # r
        (SparseSpec(9, 1, 0), ones(1), "1 places below 9 as"),
        (SparseSpec(9, 1, 1), ones(1) + b"\0", "1 places below 9 as only"),
        (SparseSpec(9, 1, 1), ones(1) + b"\5", "1 places below 9 as"),
        (SparseSpec(1, 2, 1), ones(2) + b"\0", "2 places below 1"),
        (
            SparseSpec(20, 3, 4),
            ones(3) + bytes.fromhex("03021049"),
            "20 are to be sent as elias-fano",
        ),
        (SparseSpec(9, 1, 2, "bf16"), b"\x80\x7f" + b"\1\1", "not finite"),
        (SparseSpec(9, 1, 2, "int8"), bytes(4) + b"\1" + b"\1\1", "scale of the values"),
        (SparseSpec(9, 1, 2, "sign"), ones(1) + b"\2" + b"\1\1", "spare bit of the values"),
        (SparseSpec(9, 1, 2, "f16"), b"\xf2\1\0" + b"\1\1", "exponent of the values"),
        (BlocksSpec(2, 3), u16(1, 1) + bytes(12), "blocks of 2 values in all, not 3"),
        (BlocksSpec(2, 3), u16(2, 2) + bytes(12), "blocks of 4 values in all, not 3"),
        (BlocksSpec(2, 1), u16(0xFFFF, 2) + bytes(4), "blocks of 65537 values in all, not 1"),
        (BlocksSpec(0, 1), bytes(4), "blocks of 0 values in all, not 1"),
        (BlocksSpec(1, 1), u16(1) + bytes(2), "payload of 4 bytes, spec says 6"),
        (BlocksSpec(1, 1, "f16"), u16(1) + bytes(4), "payload of 6 bytes, spec says 5"),
        (BlocksSpec(2, 1), u16(1) + bytes(4), "payload of 6 bytes, spec says 8"),
        (BlocksSpec(1, 2, "f16"), u16(2) + b"\0" + u16(0, 0x7C00), "not finite"),
        (BlocksSpec(1, 2, "f16"), u16(2) + b"\0" + u16(0xFC00, 0), "not finite"),
        (BlocksSpec(1, 2, "f16"), u16(2) + b"\0" + u16(0, 0x7C01), "of the values"),  # signalling
        (BlocksSpec(1, 2, "f16"), u16(2) + b"\0" + u16(0, 0x3C00), "exponent of the values"),
        (BlocksSpec(1, 1), u16(1, 1, 0x7F80), "not finite"),  # and one of 32 bits
    ],
)
def test_a_buffer_that_encode_could_not_have_made_is_refused(
    spec: Spec, buffer: bytes, why: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        decode(spec, buffer)


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_damaged_and_lying_payloads_are_what_encode_makes_or_are_refused(
    seed: int, number: int
) -> None:
    fuzz_payload.check(*fuzz_payload.case(seed, number))


SPECS: dict[str, st.SearchStrategy[Spec]] = {
    "scalars": st.builds(lambda n: ScalarsSpec((Run(3, n),)), st.integers(0, 6)),
    "dense": st.builds(DenseSpec, st.integers(0, 6)),
    "sparse": st.builds(
        SparseSpec,
        st.integers(0, 40),
        st.integers(0, 6),
        st.integers(0, 12),
        st.sampled_from(CODINGS),
    ),
    "blocks": st.builds(
        BlocksSpec, st.integers(0, 3), st.integers(0, 5), st.sampled_from(["f32", "f16"])
    ),
}


@pytest.mark.parametrize("kind", SPECS)
@given(data=st.data())
def test_garbage_is_what_encode_makes_or_is_refused(kind: str, data: st.DataObject) -> None:
    spec = data.draw(SPECS[kind])
    fuzz_payload.check(spec, data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes)))
    fuzz_payload.check(spec, data.draw(st.binary(max_size=30)))


doubles: Any = np.ones(1)
FINE = Sparse(9, np.array([1]), f32(1))


def instead(value: Any) -> Any:
    return lambda spec, buffer: value


def too_large(spec: Spec, buffer: bytes) -> Any:
    np.zeros(200_000, np.uint8)
    return FINE


def falling(spec: Spec, buffer: bytes) -> Any:
    raise OverflowError("of some sum")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (instead(Sparse(9, np.array([2]), f32(1))), AssertionError),  # other bytes
        (instead(Sparse(10, np.array([1]), f32(1))), AssertionError),  # another spec
        (instead(Sparse(9, np.array([1]), f32(math.inf))), AssertionError),
        (instead(Sparse(9, np.array([1]), doubles)), AssertionError),
        (too_large, AssertionError),
        (falling, OverflowError),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(
    wrong: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, buffer = SparseSpec(9, 1, 2), ones(1) + b"\1\2"
    assert fuzz_payload.check(spec, buffer) == "Sparse"
    assert fuzz_payload.check(spec, ones(1) + b"\0\2").startswith("refused: ")
    monkeypatch.setattr(fuzz_payload, "decode", wrong)
    with pytest.raises(error):
        fuzz_payload.check(spec, buffer)


# --- sparse ----------------------------------------------------------------------------


@given(sparses())
def test_dense_fills_zeros_in_and_the_size_is_that_of_both_codings(payload: Sparse) -> None:
    dense = payload.dense()
    assert dense.dtype == np.float32
    assert dense[payload.places].tobytes() == payload.values.tobytes()
    assert np.count_nonzero(dense) == np.count_nonzero(payload.values)
    k, (_, place_nbytes) = len(payload.places), places.nbytes(payload.size, payload.places)
    assert spec_of(payload) == SparseSpec(payload.size, k, place_nbytes, payload.coding)
    assert spec_of(payload).nbytes == values.nbytes(payload.coding, k) + place_nbytes


@pytest.mark.parametrize(
    ("size", "count", "place_nbytes"),
    [(64, 0, 1), (64, 1, 2), (64, 63, 9), (64, 64, 1), (1 << 40, 1, 2), (1000, 640, 9)],
)
def test_sizes_by_hand_of_the_first_places(size: int, count: int, place_nbytes: int) -> None:
    """None and all; a bitmap to the last of them; one run: 1 + 5 + 2 bytes, and 1 bit."""
    spec = spec_of(Sparse(size, np.arange(count), np.ones(count, np.float32)))
    assert spec == SparseSpec(size, count, place_nbytes, "f32")
    assert spec.nbytes == 4 * count + place_nbytes


@pytest.mark.parametrize("coding", CODINGS)
@given(data=st.data(), key=st.integers(0, 2**64 - 1))
def test_the_sender_has_what_the_receiver_gets_and_it_is_not_rounded_twice(
    coding: Coding, data: st.DataObject, key: int
) -> None:
    x = data.draw(arrays(data.draw(st.integers(0, 40))))
    before, where = x.copy(), np.arange(len(x)) * 2
    x.flags.writeable = False
    once = Sparse.of(100, where, x, coding, key)
    assert x.tobytes() == before.tobytes()
    assert_same(decode(spec_of(once), encode(once)), once)
    assert_same(Sparse.of(100, where, once.values, coding, key ^ 1), once)
    assert once.values.tobytes() == values.rounded(coding, x, key).tobytes()
    assert coding != "f32" or once.values.tobytes() == x.tobytes()


def test_int8_is_rounded_by_the_stream_of_the_key_that_is_given() -> None:
    x = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    made = [Sparse.of(500, np.arange(500), x, "int8", KEY + i).values.tobytes() for i in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_every_coding_of_values_travels_beside_every_coding_of_places() -> None:
    rng = np.random.default_rng(0)
    masks: dict[places.Coding, tuple[int, Any]] = {
        "only": (9, np.arange(9)),
        "bitmap": (500, np.flatnonzero(rng.random(500) < 0.5)),
        "elias-fano": (1 << 40, np.array([1 << 39])),
        "golomb-rice": (9000, np.flatnonzero(rng.random(9000) < 0.02)),
        "runs": (9000, np.arange(4000, 4100)),
    }
    for name, (size, where) in masks.items():
        for coding in CODINGS:
            x = rng.standard_normal(len(where)).astype(np.float32)
            payload = Sparse.of(size, where, x, coding, KEY)
            spec, buffer = spec_of(payload), bytes(encode(payload))
            assert isinstance(spec, SparseSpec)
            assert places.CODINGS[buffer[-spec.place_nbytes]] == name
            fuzz_payload.check(spec, buffer)
            assert_same(decode(spec, buffer), payload)


def test_reading_many_places_takes_memory_of_the_buffer_and_not_of_what_it_claims() -> None:
    where, signs = np.arange(80_000) + 5, np.ones(80_000, np.float32)
    payload = Sparse(1 << 40, where, signs, "sign")  # eight entries a byte, in one run
    spec, buffer = spec_of(payload), bytes(encode(payload))
    assert fuzz_payload.check(spec, buffer) == "Sparse"
    for more in (80_001, 80_008, 1 << 30, 1 << 40):
        lie = msgspec.structs.replace(spec, count=more)
        assert fuzz_payload.check(lie, buffer).startswith("refused: ")


@pytest.mark.parametrize("where", [(3, 3), (4, 3), (0, 8), (-1, 3)])
def test_bad_places_are_our_own_mistake(where: tuple[int, int]) -> None:
    payload = Sparse(8, np.array(where), f32(1, 1))
    with pytest.raises(LocalProtocolError):
        spec_of(payload)
    with pytest.raises(LocalProtocolError):
        encode(payload)


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1, "count": 1},
        {"size": 1, "count": 1, "place_nbytes": -1},
        {"size": 1, "count": 1, "place_nbytes": "bitmap"},
        {"size": (1 << 40) + 1, "count": 1, "place_nbytes": 1},
        {"size": 1, "count": 1, "place_nbytes": 1, "coding": "u32"},
    ],
)
def test_a_sparse_spec_out_of_bounds_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "sparse", **spec}, Spec)
    fine = {"kind": "sparse", "size": 1, "count": 1, "place_nbytes": 1}
    assert msgspec.convert(fine, Spec) == SparseSpec(1, 1, 1, "f32")
    assert msgspec.to_builtins(SparseSpec(1, 1, 1)) == fine  # the usual coding goes unsaid
    assert msgspec.to_builtins(SparseSpec(1, 1, 1, "sign")) == {**fine, "coding": "sign"}


# --- blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("coding", "nbytes"), [("f32", 4 * 65_538), ("f16", 1 + 2 * 65_538)])
def test_blocks_take_two_bytes_for_each_length_beside_their_values(
    coding: Literal["f32", "f16"], nbytes: int
) -> None:
    spec = spec_of(Blocks.of(np.array([3, 0, 65_535]), np.ones(65_538, np.float32), coding))
    assert spec == BlocksSpec(3, 65_538, coding)
    assert spec.nbytes == 6 + nbytes


def test_blocks_round_as_sparse_vectors_do() -> None:
    x = np.random.default_rng(0).standard_normal(20).astype(np.float32) * np.float32(1e-3)
    made = Blocks.of(np.array([7, 0, 13]), x, "f16")
    assert made.values.tobytes() == Sparse.of(20, np.arange(20), x, "f16", KEY).values.tobytes()
    assert_same(decode(spec_of(made), encode(made)), made)
    assert_same(Blocks.of(made.counts, made.values, "f16"), made)


@pytest.mark.parametrize(("coding", "nbytes"), [("f32", 0), ("f16", 1)])
def test_blocks_of_zeros_keep_their_signs_and_no_blocks_are_no_bytes_but_the_exponent(
    coding: Literal["f32", "f16"], nbytes: int
) -> None:
    zeros = Blocks.of(np.array([2, 2]), f32(0, -0.0, 0, 0), coding)
    assert_same(decode(spec_of(zeros), encode(zeros)), zeros)
    assert np.signbit(zeros.values).tolist() == [False, True, False, False]
    none = Blocks.of(np.array([], np.int64), f32(), coding)
    assert (spec_of(none).nbytes, len(encode(none))) == (nbytes, nbytes)
    assert_same(decode(spec_of(none), encode(none)), none)


def test_full_precision_rounds_nothing() -> None:
    x = f32(1e-45, 3.4e38, 1 + 2**-23, -1e-30)
    made = Blocks.of(np.array([4]), x, "f32")
    assert made.values.tobytes() == x.tobytes()
    assert made.coding == "f32"


def test_rounding_does_not_touch_the_callers_values() -> None:
    x = f32(1, 0.1)
    x.flags.writeable = False
    made = Blocks.of(np.array([2]), x, "f16")
    assert made.values.dtype == np.float32
    assert not np.shares_memory(made.values, x)


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
        {"blocks": 1, "count": 1, "coding": "int8"},
        {"blocks": 1, "count": 1, "coding": "f64"},
        {"blocks": -1, "count": 1},
        {"blocks": 1},
    ],
)
def test_a_spec_of_blocks_out_of_bounds_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": "blocks", **spec}, Spec)
    fine = msgspec.convert({"kind": "blocks", "blocks": 1, "count": 1}, Spec)
    assert fine == BlocksSpec(1, 1, "f32")
