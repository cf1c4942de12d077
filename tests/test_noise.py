"""The stream against docs/noise.md, which carries the same golden vectors."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol import noise
from protocol.noise import Direction, key, permutation, philox, rademachers, uniforms
from protocol.payload import Flat

# --- Philox itself ---------------------------------------------------------------

ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_random123s_known_answers() -> None:
    for counter, k, answer in KNOWN:
        got = philox(np.array(counter, np.uint32).reshape(4, 1), k)
        assert tuple(got[:, 0].tolist()) == answer


def test_philox_treats_the_columns_apart() -> None:
    counters = np.array([c for c, _, _ in KNOWN], np.uint32).T
    for i, (_, k, answer) in enumerate(KNOWN):
        assert tuple(philox(counters, k)[:, i].tolist()) == answer


# --- golden vectors, the same as in docs/noise.md --------------------------------

KEYS = {
    ("direction",): 0x524366C1D0D27844,
    ("direction", 0): 0xA5F144F931892B7F,
    ("direction", 1, 2, 3, 4, 5): 0x62BFCDA757B438C0,
    ("cohort", -1, 2**63 - 1): 0x9F3B3F0E74B17722,
}
KEY = 0x62BFCDA757B438C0
BITS = "2251 c5ab 540b 2559 8bb4 3eee d9e4 67c2 bde2 5de5"
FAR_BITS = "8880 076e d677 5bc2"
NORMALS = "be6baf3e69f63ebf108e723f56a0bf3eaa3debbde652293f3a4b85bff9fda73f"
UNIFORMS = "005d3bbf00570b3f00d2afbe004d35bf"
SIGNS = "+ - + + - + - + - +"
PERMUTATION = "0 2 1 3 4 7 8 9 5 6"


def hexed(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> str:
    return " ".join(f"{b:04x}" for b in bits.tolist())


def test_golden_vectors() -> None:
    assert {k: key(str(k[0]), *(int(f) for f in k[1:])) for k in KEYS} == KEYS
    assert hexed(noise.bits(KEY, 0, 10)) == BITS
    assert hexed(noise.bits(KEY, 1 << 35, (1 << 35) + 4)) == FAR_BITS
    assert noise.normals(KEY, 0, 8).tobytes().hex() == NORMALS
    assert uniforms(KEY, 0, 4).tobytes().hex() == UNIFORMS
    assert " ".join("+" if s == 1 else "-" for s in rademachers(KEY, 0, 10).tolist()) == SIGNS
    assert " ".join(map(str, permutation(KEY, 10).tolist())) == PERMUTATION


def test_the_specification_states_the_same_vectors() -> None:
    page = Path("docs/noise.md").read_text()
    stated = set(re.findall(r"`([^`]+)`", page))
    assert {BITS, FAR_BITS, NORMALS, UNIFORMS, SIGNS, PERMUTATION, noise.STREAM} <= stated
    assert {f"0x{value:016x}" for value in KEYS.values()} <= stated
    words = [" ".join(f"{w:08x}" for w in part) for row in KNOWN for part in row]
    assert all(w in page for w in words)
    assert noise._TABLE_SHA256 in page


def test_the_name_of_the_stream_is_the_one_that_these_vectors_belong_to() -> None:
    assert noise.STREAM == "philox4x32-10/normal16/1"


def test_blocks_past_two_to_the_32_carry_into_the_second_counter_word() -> None:
    k, block = 0x0123456789ABCDEF, (1 << 32) + 5
    counter = np.array([5, 1, 0, 0], np.uint32).reshape(4, 1)
    words = philox(counter, (0x89ABCDEF, 0x01234567))[:, 0]
    lanes = [int(w) >> shift & 0xFFFF for w in words for shift in (0, 16)]
    assert noise.bits(k, block * 8, block * 8 + 8).tolist() == lanes
    across = noise.bits(k, (1 << 35) - 3, (1 << 35) + 3)
    assert across[:3].tolist() == noise.bits(k, (1 << 35) - 8, 1 << 35)[5:].tolist()
    assert across[3:].tolist() == noise.bits(k, 1 << 35, (1 << 35) + 3).tolist()
    assert across[3:].tolist() != noise.bits(k, 0, 3).tolist()  # the stream does not wrap here


def element(k: int, i: int) -> int:
    """16 bits from docs/noise.md alone, one Python integer at a time."""
    block, lane = divmod(i, 8)
    c, k0, k1 = [block % 2**32, block >> 32, 0, 0], k % 2**32, k >> 32
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    word, high = divmod(lane, 2)
    return c[word] >> 16 if high else c[word] % 2**16


keys = st.integers(0, 2**64 - 1)


@given(keys, st.integers(0, 2**60))
def test_the_specification_read_literally_gives_the_same_bits(k: int, i: int) -> None:
    assert noise.bits(k, i, i + 3).tolist() == [element(k, j) for j in range(i, i + 3)]


@given(keys, st.integers(0, 2**40), st.lists(st.integers(0, 40), max_size=5))
def test_any_split_equals_the_whole(k: int, start: int, lengths: list[int]) -> None:
    cuts = list(itertools.accumulate(lengths, initial=start))
    for stream in (noise.bits, noise.normals, uniforms, rademachers):
        whole = stream(k, start, cuts[-1])
        parts = [stream(k, a, b) for a, b in itertools.pairwise(cuts)]
        assert b"".join(p.tobytes() for p in parts) == whole.tobytes()
        assert len(whole) == cuts[-1] - start


# --- the table and the maps ------------------------------------------------------


def table() -> Flat:
    path = Path(str(protocol.__path__[0])) / "normals.f32"
    return np.frombuffer(path.read_bytes(), "<f4")


def test_the_table_has_variance_one_and_the_quantiles_of_the_normal() -> None:
    upper = table().astype(np.float64)
    assert len(upper) == 1 << 15
    assert abs(np.mean(upper**2) - 1) < 1e-6
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((65536 + 2 * j + 1) / 131072) for j in range(1 << 15)])
    quantiles /= math.sqrt(np.mean(quantiles**2))
    np.testing.assert_allclose(upper, quantiles, rtol=1e-6)


@given(keys)
def test_each_map_reads_the_same_bits_and_is_symmetric(k: int) -> None:
    b = noise.bits(k, 0, 64).astype(np.int64)
    t = table()[b % 2**15]
    assert noise.normals(k, 0, 64).tobytes() == np.where(b < 2**15, t, -t).tobytes()
    exact = (2 * b + 1 - 65536) / 65536
    assert uniforms(k, 0, 64).dtype == np.float32
    assert uniforms(k, 0, 64).tolist() == exact.tolist()
    assert rademachers(k, 0, 64).dtype == np.float32
    assert rademachers(k, 0, 64).tolist() == [1.0 if x < 2**15 else -1.0 for x in b.tolist()]


@given(keys, st.integers(0, 50))
def test_permutation_sorts_by_64_bit_words(k: int, n: int) -> None:
    words = [sum(element(k, 4 * i + j) << 16 * j for j in range(4)) for i in range(n)]
    assert permutation(k, n).tolist() == sorted(range(n), key=lambda i: words[i])


def test_a_damaged_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_TABLE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="damaged"):
        noise._load_table()


# --- statistics: a wrong stream would be off by many standard errors -------------

N = 1 << 18
Wide = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def sample(*fields: int) -> Wide:
    return noise.normals(key("direction", *fields), 0, N).astype(np.float64)


def within(estimate: float, truth: float, standard_error: float) -> None:
    """Four standard errors: by chance 1 in 16,000, and the keys here never change."""
    assert abs(estimate - truth) < 4 * standard_error


def test_moments() -> None:
    z = sample(0)
    within(float(np.mean(z)), 0, N**-0.5)
    within(float(np.mean(z**2)), 1, (2 / N) ** 0.5)
    within(float(np.mean(z**3)), 0, (15 / N) ** 0.5)
    within(float(np.mean(z**4)), float(np.mean(table().astype(np.float64) ** 4)), (96 / N) ** 0.5)
    for i in range(8):  # each lane of a block by itself
        within(float(np.mean(z[i::8])), 0, (8 / N) ** 0.5)
        within(float(np.mean(z[i::8] ** 2)), 1, (16 / N) ** 0.5)


def test_every_bit_is_fair() -> None:
    b = noise.bits(key("direction", 1), 0, N)
    for bit in range(16):
        within(float(np.mean(b >> bit & 1)), 0.5, 0.5 * N**-0.5)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16])
def test_elements_do_not_correlate_with_their_neighbours(lag: int) -> None:
    z = sample(2)
    within(float(np.mean(z[lag:] * z[:-lag])), 0, N**-0.5)


def test_neighbouring_keys_do_not_correlate() -> None:
    """Not for hashed keys, nor for raw ones that differ in one bit."""
    streams = [sample(7, 3), sample(7, 4), sample(8, 3), sample(3, 7)]
    streams += [noise.normals(k, 0, N).astype(np.float64) for k in (0, 1, 1 << 32, 1 << 63)]
    for a, b in itertools.combinations(streams, 2):
        within(float(np.mean(a * b)), 0, N**-0.5)
        within(float(np.mean((a**2 - 1) * (b**2 - 1))), 0, 2 * N**-0.5)


fields = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6).map(tuple)
purposes = st.text("abcdefgh-", min_size=1, max_size=16)


@given(st.sets(st.tuples(purposes, fields), min_size=2, max_size=8))
def test_distinct_purposes_or_fields_give_distinct_keys(
    names: set[tuple[str, tuple[int, ...]]],
) -> None:
    made = {key(purpose, *f) for purpose, f in names}
    assert len(made) == len(names)
    assert all(0 <= k < 2**64 for k in made)


def test_keys_are_not_sums_of_their_fields() -> None:
    """DeComFL's seeds clash: (17, 0) and (16, 1) give one stream there."""
    made = {
        key("direction", 0, r, c, t, k)
        for r in range(8)
        for c in range(8)
        for t in range(8)
        for k in range(2)
    }
    assert len(made) == 1024


# --- directions ------------------------------------------------------------------


@given(keys, st.lists(st.integers(0, 30), min_size=2, max_size=8), st.integers(1, 16))
def test_a_direction_is_the_stream_on_its_ranges_and_zero_elsewhere(
    k: int, lengths: list[int], span: int
) -> None:
    cuts = list(itertools.accumulate(lengths))
    ranges = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    size = cuts[-1] + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "SPAN", span)  # it bounds memory and does not change a bit
        dense = Direction(k, ranges).dense(size)
    expected = np.zeros(size, np.float32)
    whole = noise.normals(k, 0, size)
    for a, b in ranges:
        expected[a:b] = whole[a:b]
    assert dense.dtype == np.float32
    assert dense.tobytes() == expected.tobytes()


def test_spans_are_bounded_and_in_order() -> None:
    size = noise.SPAN + 100
    spans = [s for s, z in Direction(0, ((5, size),)).spans() if len(z) == s.stop - s.start]
    assert spans == [slice(5, noise.SPAN + 5), slice(noise.SPAN + 5, size)]


@given(keys, st.floats(-10, 10), st.integers(0, 2**32))
def test_add_equals_dense_arithmetic_to_the_bit(k: int, alpha: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=100).astype(np.float32)
    direction = Direction(k, ((3, 40), (61, 100)))
    expected = x + np.float32(alpha) * direction.dense(100)
    y = x.copy()
    noise.add_(x, alpha, direction)
    noise.add_(y, np.float64(alpha), direction)  # a numpy scalar must not widen the product
    assert x.tobytes() == y.tobytes() == expected.tobytes()


def test_add_rounds_the_product_and_then_the_sum() -> None:
    """A fused multiply-add, and one in float64, would differ in about every third element."""
    x = uniforms(1, 0, 4096)
    direction, alpha = Direction(2, ((0, 4096),)), 0.1
    z = direction.dense(4096).astype(np.float64)
    product = (float(np.float32(alpha)) * z).astype(np.float32)  # 48 bits: exact before rounding
    expected = (x.astype(np.float64) + product).astype(np.float32)  # likewise
    fused = (x.astype(np.float64) + float(np.float32(alpha)) * z).astype(np.float32)
    noise.add_(x, alpha, direction)
    assert x.tobytes() == expected.tobytes()
    assert np.mean(expected != fused) > 0.05
