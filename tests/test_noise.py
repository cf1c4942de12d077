"""The stream against docs/noise.md, which carries the same golden vectors."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol import noise
from protocol.noise import (
    PIECE,
    Direction,
    Doubles,
    Flat,
    Keys,
    Kind,
    key,
    permutation,
    philox,
    rademachers,
    uniforms,
)

KINDS: tuple[Kind, ...] = get_args(Kind)

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
OTHER = KEYS["direction", 0]  # x below is the uniform stream of this key
ADDED = "c3b014bfb2fc72bd8f25b33d8b0f263d301308bf7e4862bf59726a3fbd6893bf"
# Of these elements, as the sum in plain order, of lanes before pieces, and the exact one differ.
DOT = "-0x1.d6fafbf11025dp+7"


def hexed(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> str:
    return " ".join(f"{b:04x}" for b in bits.tolist())


def keyed(*values: int) -> Keys:
    return np.array(values, np.uint64)


def dot(x: Flat, start: int, k: int, kind: Kind) -> float:
    return float(noise.total(noise.dots(x, start, keyed(k), kind))[0])


def test_golden_vectors() -> None:
    assert {k: key(str(k[0]), *(int(f) for f in k[1:])) for k in KEYS} == KEYS
    assert hexed(noise.bits(KEY, 0, 10)) == BITS
    assert hexed(noise.bits(KEY, 1 << 35, (1 << 35) + 4)) == FAR_BITS
    assert noise.normals(KEY, 0, 8).tobytes().hex() == NORMALS
    assert uniforms(KEY, 0, 4).tobytes().hex() == UNIFORMS
    assert " ".join("+" if s == 1 else "-" for s in rademachers(KEY, 0, 10).tolist()) == SIGNS
    assert " ".join(map(str, permutation(KEY, 10).tolist())) == PERMUTATION
    x = uniforms(OTHER, 65530, 65538)
    noise.add(x, 65530, keyed(KEY, OTHER), np.array([0.1, -0.01], np.float32), "normal")
    assert x.tobytes().hex() == ADDED
    x = uniforms(OTHER, 64000, 132000)
    assert dot(x, 64000, KEY, "normal").hex() == DOT


def test_the_specification_states_the_same_vectors() -> None:
    page = Path("docs/noise.md").read_text()
    stated = set(re.findall(r"`([^`]+)`", page))
    assert {BITS, FAR_BITS, NORMALS, UNIFORMS, SIGNS, PERMUTATION, noise.STREAM} <= stated
    assert {ADDED, DOT} <= stated
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
kinds = st.sampled_from(KINDS)


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


VARIANCE: dict[Kind, float] = {"normal": 1, "uniform": 1 / 3, "sign": 1}


def sample(*fields: int, kind: Kind = "normal", size: int = N) -> Wide:
    return noise.stream(kind, key("direction", *fields), 0, size).astype(np.float64)


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


def test_moments_of_the_uniform() -> None:
    u = sample(0, kind="uniform")
    for part in (u, *(u[i::8] for i in range(8))):
        within(float(np.mean(part)), 0, (1 / 3 / len(part)) ** 0.5)
        within(float(np.mean(part**2)), 1 / 3, (4 / 45 / len(part)) ** 0.5)
    within(float(np.mean(u**3)), 0, (1 / 7 / N) ** 0.5)
    within(float(np.mean(u**4)), 1 / 5, (16 / 225 / N) ** 0.5)
    assert -1 < u.min() < -0.9999
    assert 0.9999 < u.max() < 1


def test_moments_of_the_sign() -> None:
    s = sample(0, kind="sign")
    assert set(s.tolist()) == {-1, 1}  # so the variance is 1
    for part in (s, *(s[i::8] for i in range(8))):
        within(float(np.mean(part)), 0, len(part) ** -0.5)


def test_the_tail_holds_as_many_normals_as_the_table_says() -> None:
    size = 1 << 20
    z, upper = sample(4, size=size), table().astype(np.float64)
    tails = {c: float(np.mean(upper > c)) / 2 for c in (2, 3, 4)}  # 0.0228, 0.00135, 0.00003
    for sigmas, p in tails.items():
        se = (p * (1 - p) / size) ** 0.5
        within(float(np.mean(z > sigmas)), p, se)
        within(float(np.mean(z < -sigmas)), p, se)
    assert tails[4] * size > 30  # of which a stream without a tail would have none


def test_the_uniform_fills_its_range_evenly() -> None:
    counts, _ = np.histogram(sample(5, kind="uniform"), 256, (-1, 1))
    chi2 = float(np.sum((counts - N / 256) ** 2 / (N / 256)))
    within(chi2, 255, (2 * 255) ** 0.5)


def test_every_bit_is_fair() -> None:
    b = noise.bits(key("direction", 1), 0, N)
    for bit in range(16):
        within(float(np.mean(b >> bit & 1)), 0.5, 0.5 * N**-0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16])
def test_elements_do_not_correlate_with_their_neighbours(lag: int, kind: Kind) -> None:
    z = sample(2, kind=kind)
    within(float(np.mean(z[lag:] * z[:-lag])), 0, VARIANCE[kind] * N**-0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_keys_do_not_correlate(kind: Kind) -> None:
    """Not for hashed keys, nor for raw ones that differ in one bit."""
    hashed = [(7, 3), (7, 4), (8, 3), (3, 7)]
    streams = [sample(*f, kind=kind) for f in hashed]
    streams += [noise.stream(kind, k, 0, N).astype(np.float64) for k in (0, 1, 1 << 32, 1 << 63)]
    variance = VARIANCE[kind]
    of_square = {"normal": 2.0, "uniform": 4 / 45, "sign": 0.0}[kind]  # its variance
    for a, b in itertools.combinations(streams, 2):
        within(float(np.mean(a * b)), 0, variance * N**-0.5)
        if of_square:
            squares = (a**2 - variance) * (b**2 - variance)
            within(float(np.mean(squares)), 0, of_square * N**-0.5)


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


@given(keys, st.lists(st.integers(0, 30), min_size=2, max_size=8), kinds)
def test_a_direction_is_the_stream_on_its_ranges_and_zero_elsewhere(
    k: int, lengths: list[int], kind: Kind
) -> None:
    cuts = list(itertools.accumulate(lengths))
    ranges = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    size = cuts[-1] + 3
    dense = Direction(k, ranges, kind).dense(size)
    expected = np.zeros(size, np.float32)
    whole = {"normal": noise.normals, "uniform": uniforms, "sign": rademachers}[kind](k, 0, size)
    for a, b in ranges:
        expected[a:b] = whole[a:b]
    assert dense.dtype == np.float32
    assert dense.tobytes() == expected.tobytes()


def test_a_direction_is_normal_unless_it_says_otherwise() -> None:
    assert Direction(KEY, ((0, 8),)).dense(8).tobytes().hex() == NORMALS


# --- adding, shifting, scalar products -------------------------------------------


def draw(seed: int, size: int) -> Flat:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


seeds = st.integers(0, 2**32)
starts = st.one_of(st.integers(0, 2**40), st.just(1 << 35), st.just(PIECE)).map(
    lambda middle: max(0, middle - 20)  # so that the elements cross it
)


@given(st.lists(st.tuples(keys, st.floats(-10, 10)), max_size=3), starts, seeds, kinds)
def test_add_is_one_product_and_sum_after_the_other(
    terms: list[tuple[int, float]], start: int, seed: int, kind: Kind
) -> None:
    x = draw(seed, 50)
    expected = x.copy()
    for k, alpha in terms:
        expected = expected + np.float32(alpha) * noise.stream(kind, k, start, start + 50)
    alphas = np.array([alpha for _, alpha in terms], np.float32)
    noise.add(x, start, keyed(*(k for k, _ in terms)), alphas, kind)
    assert x.tobytes() == expected.tobytes()


def test_add_rounds_the_product_and_then_the_sum() -> None:
    """A fused multiply-add, and one in float64, would differ in about every third element."""
    x, alpha = uniforms(1, 0, 4096), np.array([0.1], np.float32)
    z = noise.normals(2, 0, 4096).astype(np.float64)
    product = (float(alpha[0]) * z).astype(np.float32)  # 48 bits: exact before rounding
    expected = (x.astype(np.float64) + product).astype(np.float32)  # likewise
    fused = (x.astype(np.float64) + float(alpha[0]) * z).astype(np.float32)
    noise.add(x, 0, keyed(2), alpha, "normal")
    assert x.tobytes() == expected.tobytes()
    assert np.mean(expected != fused) > 0.05


@given(keys, starts, st.lists(st.floats(-10, 10), max_size=3), seeds, kinds)
def test_shifted_is_add_without_touching_x(
    k: int, start: int, offsets: list[float], seed: int, kind: Kind
) -> None:
    x, by = draw(seed, 50), np.array(offsets, np.float32)
    before, out = x.copy(), np.full((len(by), 50), np.nan, np.float32)
    noise.shifted(x, start, k, by, out, kind)
    assert x.tobytes() == before.tobytes()
    for i in range(len(by)):
        noise.add(x, start, keyed(k), by[i : i + 1], kind)
        assert out[i].tobytes() == x.tobytes()
        x[:] = before


@given(keys, st.integers(0, 100), st.integers(0, 100), st.integers(1, 40), seeds)
def test_pieces_bound_memory_and_change_no_bit_of_a_sum_or_a_shift(
    k: int, start: int, size: int, piece: int, seed: int
) -> None:
    x, by, drawn = draw(seed, size), np.array([0.3, -2], np.float32), []
    shifts, in_pieces = (np.empty((2, size), np.float32) for _ in range(2))
    noise.shifted(x, start, k, by, shifts, "normal")
    original = noise.stream

    def stream(kind: Kind, key: int, first: int, last: int) -> Flat:
        drawn.append((first, last))
        return original(kind, key, first, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "PIECE", piece)
        patch.setattr(noise, "stream", stream)
        noise.shifted(x, start, k, by, in_pieces, "normal")
        noise.add(x, start, keyed(k), by[:1], "normal")
        assert len(drawn) == 2 * noise.num_pieces(start, size)
    assert in_pieces.tobytes() == shifts.tobytes()
    assert x.tobytes() == shifts[0].tobytes()
    assert all(first // piece == (last - 1) // piece for first, last in drawn)


@given(keys, starts, seeds, kinds)
def test_the_specification_read_literally_gives_the_same_scalar_product(
    k: int, start: int, seed: int, kind: Kind
) -> None:
    x = draw(seed, 50) ** 9  # of many magnitudes, so that each order has its own rounding
    by_piece: dict[int, list[float]] = {}
    for i, value in enumerate(x.tolist(), start):
        lanes = by_piece.setdefault(i // 65536, [0.0] * 8)
        lanes[i % 8] += value * float(noise.stream(kind, k, i, i + 1)[0])
    expected = 0.0
    for lanes in by_piece.values():
        in_piece = 0.0
        for lane in lanes:
            in_piece += lane
        expected += in_piece
    assert dot(x, start, k, kind) == expected


@given(st.lists(keys, max_size=3), st.integers(0, 90), st.integers(0, 90), st.data())
def test_scalar_products_of_whole_pieces_follow_each_other(
    ks: list[int], start: int, size: int, data: st.DataObject
) -> None:
    """So threads may share them, and the sum is that of one thread."""
    x = draw(1, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "PIECE", 16)
        cut = 16 * data.draw(st.integers(-(-start // 16), (start + size) // 16 + 1)) - start
        whole: Doubles = noise.dots(x, start, keyed(*ks), "normal")
        parts = [
            noise.dots(x[:cut], start, keyed(*ks), "normal"),
            noise.dots(x[cut:], start + cut, keyed(*ks), "normal"),
        ]
    assert whole.shape == (len(whole), len(ks), 8)
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert noise.total(whole).shape == (len(ks),)
    by_hand = [np.dot(x.astype(np.float64), noise.normals(k, start, start + size)) for k in ks]
    np.testing.assert_allclose(noise.total(whole), by_hand, rtol=1e-9, atol=1e-9)
