from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol.payload import (
    Dense,
    DenseSpec,
    Flat,
    Payload,
    Run,
    Scalars,
    ScalarsSpec,
    Sparse,
    SparseSpec,
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
    runs = tuple(Run(i, n, draw(st.floats(-1e30, 1e30))) for i, n in enumerate(counts))
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
payloads: st.SearchStrategy[Payload] = st.one_of(scalars(), sparses(), denses)


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
@pytest.mark.parametrize("kind", ["scalars", "sparse bitmap", "sparse u32", "dense"])
def test_a_value_that_is_not_finite_is_refused(kind: str, at: int, bad: float) -> None:
    values = f32(1, 1)
    values[at] = bad
    by_kind: dict[str, Payload] = {
        "scalars": Scalars((Run(0, 2),), values),
        "sparse bitmap": Sparse(8, np.array([1, 5]), values),
        "sparse u32": Sparse(800, np.array([1, 5]), values),
        "dense": Dense(values),
    }
    payload = by_kind[kind]
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(spec_of(payload), encode(payload))


def indices(*places: int) -> bytes:
    return np.ones(len(places), "<f4").tobytes() + np.array(places, "<u4").tobytes()


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
    ],
)
def test_a_buffer_that_encode_could_not_have_made_is_refused(
    spec: SparseSpec | DenseSpec | ScalarsSpec, buffer: bytes, why: str
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
