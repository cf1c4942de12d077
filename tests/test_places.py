"""The codings of places: sizes, layouts by hand, and that nothing else is read."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import places as module
from protocol.places import CODINGS, MAX_SIZE, Coding, Places, decode, encode, nbytes
from protocol.wire import LocalProtocolError, RemoteProtocolError

REAL: tuple[Coding, ...] = CODINGS[1:]  # those with something to say
rng = np.random.default_rng


def at(*indices: int) -> Places:
    return np.array(indices, np.int64)


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, Places]:
    """Neither empty nor full: single places, runs of them, or what runs leave out."""
    n = draw(st.integers(2, 300))
    mask = np.zeros(n, bool)
    for first in draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=30)):
        mask[first : first + draw(st.sampled_from([1, 1, 2, 9]))] = True
    if draw(st.booleans()):
        mask = ~mask
    if mask.all() or not mask.any():
        mask[draw(st.integers(0, n - 1))] ^= True
    return n, np.flatnonzero(mask).astype(np.int64)


def random_mask(n: int, k: int, seed: int = 0) -> Places:
    return np.sort(rng(seed).choice(n, k, replace=False))


def assert_only_encode_makes(n: int, k: int, buffer: bytes) -> None:
    """Refused, or what these places are in this coding."""
    try:
        found = decode(n, k, buffer)
    except RemoteProtocolError:
        return
    assert found.dtype == np.int64
    assert found.shape == (k,)
    assert encode(n, found, [CODINGS[buffer[0]]]) == buffer


# --- there and back ----------------------------------------------------------------------


@given(masks(), st.sampled_from([*REAL, None]))
def test_decode_inverts_encode_and_the_size_was_known(
    mask: tuple[int, Places], coding: Coding | None
) -> None:
    n, places = mask
    among = CODINGS if coding is None else [coding]
    chosen, declared = nbytes(n, places, among)
    buffer = encode(n, places, among)
    assert len(buffer) == declared
    assert CODINGS[buffer[0]] == chosen
    assert coding in (chosen, None)
    for raw in (buffer, memoryview(buffer), memoryview(b"x" + buffer)[1:]):
        found = decode(n, len(places), raw)
        assert found.dtype == np.int64
        assert found.tolist() == places.tolist()


@pytest.mark.parametrize("n", range(9))
def test_every_mask_of_a_few_bits_comes_back_in_every_coding(n: int) -> None:
    seen: dict[tuple[int, bytes], list[int]] = {}
    for k in range(n + 1):
        for chosen in itertools.combinations(range(n), k):
            for coding in REAL:
                buffer = encode(n, at(*chosen), [coding])
                assert decode(n, k, buffer).tolist() == list(chosen)
                assert seen.setdefault((k, buffer), list(chosen)) == list(chosen)


@given(masks())
def test_the_shortest_is_chosen_and_of_equals_the_first(mask: tuple[int, Places]) -> None:
    n, places = mask
    k, m = len(places), 1 + int((np.diff(places) > 1).sum())
    tried = REAL if 10 * m * n <= 9 * k * (n - k) or 3 * m <= k else REAL[:-1]
    sizes = [len(encode(n, places, [coding])) for coding in tried]
    assert nbytes(n, places) == (tried[sizes.index(min(sizes))], min(sizes))
    assert encode(n, places) == encode(n, places, [tried[sizes.index(min(sizes))]])


@pytest.mark.parametrize("one_in", [2, 3, 6, 50])
@pytest.mark.parametrize("width", [1, 2, 3, 30])
def test_runs_are_tried_wherever_they_save_bytes(one_in: int, width: int) -> None:
    n, starts = 30_000, random_mask(30_000 // width, 30_000 // width // one_in)
    places = (width * starts[:, None] + np.arange(width)).ravel()
    assert nbytes(n, places)[1] == min(len(encode(n, places, [coding])) for coding in REAL)
    assert (nbytes(n, places)[0] == "runs") == (width > 1)
    absent = np.setdiff1d(np.arange(n), places)
    assert nbytes(n, absent)[1] == min(len(encode(n, absent, [coding])) for coding in REAL)


@pytest.mark.parametrize("n", [0, 1, 2, 1000, MAX_SIZE])
def test_no_places_are_one_byte_and_so_are_all(n: int) -> None:
    assert encode(n, at()) == b"\0"
    assert nbytes(n, at()) == ("only", 1)
    assert decode(n, 0, b"\0").tolist() == []
    if n <= 1000:
        assert encode(n, np.arange(n)) == encode(n, np.arange(n), ["bitmap"]) == b"\0"
        assert decode(n, n, b"\0").tolist() == list(range(n))


@pytest.mark.parametrize("coding", ["elias-fano", "golomb-rice", "runs"])
@pytest.mark.parametrize(
    "places",
    [(0,), (MAX_SIZE - 1,), (0, MAX_SIZE - 1), (1, 2, 3, MAX_SIZE // 2), (7, MAX_SIZE - 2)],
)
def test_the_largest_vector_needs_no_memory_of_its_size(
    coding: Coding, places: tuple[int, ...]
) -> None:
    buffer = encode(MAX_SIZE, at(*places), [coding])
    assert len(buffer) < 50
    assert decode(MAX_SIZE, len(places), buffer).tolist() == list(places)
    assert len(encode(MAX_SIZE, at(*places))) <= len(buffer)


@pytest.mark.parametrize("coding", REAL)
@pytest.mark.parametrize("seed", range(3))
def test_more_than_one_piece_at_a_time(coding: Coding, seed: int) -> None:
    n, k = 3_000_000, (3 * module.PIECE, 2 * module.PIECE + 5, 1_400_000)[seed]
    places = random_mask(n, k, seed)
    buffer = encode(n, places, [coding])
    assert np.array_equal(decode(n, k, buffer), places)


# --- sizes -------------------------------------------------------------------------------


def bound(n: int, k: int) -> float:
    """The bytes that a uniformly random choice of k among n takes on average, at least."""
    log2 = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    return math.ceil(log2) / 8


@pytest.mark.parametrize(
    "density", [*(2.0**-j for j in range(1, 11)), 0.45, 0.42, 0.38, 0.35, 0.3, 0.2, 0.01]
)
def test_random_places_take_at_most_5_percent_more_than_they_must(density: float) -> None:
    for n, seed in ((200_000, 0), (20_000, 1)):
        k = int(n * density)
        coding, size = nbytes(n, random_mask(n, k, seed))
        assert size <= 1.05 * bound(n, k) + 8
        assert k < 200 or coding == ("bitmap" if density > 0.4 else "golomb-rice")


def test_whole_rows_take_far_less_than_random_places() -> None:
    rows, width = random_mask(25_000, 1000), 8
    places = (width * rows[:, None] + np.arange(width)).ravel()
    coding, size = nbytes(200_000, places)
    assert coding == "runs"
    assert size < 0.3 * bound(200_000, len(places))
    assert size < 2.3 * bound(25_000, 1000)  # nothing says that rows are equal and in line


@given(masks())
def test_elias_fano_saves_two_bytes_at_most(mask: tuple[int, Places]) -> None:
    """One is the parameter; no bits, as gaps cut at the same bit add up to no more, but one may
    be lost where the bits are filled up to bytes."""
    n, places = mask
    assert len(encode(n, places, ["elias-fano"])) >= len(encode(n, places, ["golomb-rice"])) - 2


@given(st.lists(st.integers(0, 400), max_size=40), st.integers(0, 31))
def test_the_width_is_the_smallest_of_the_best(gaps: list[int], zeros: int) -> None:
    numbers = at(*gaps, *[0] * zeros)
    sizes = [len(numbers) * r + int((numbers >> r).sum()) for r in range(12)]
    assert module._golomb_rice_width(numbers) == sizes.index(min(sizes))


# --- layouts by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "n", "places", "written"),
    [
        ("only", 20, (), "00"),
        ("bitmap", 20, (0, 9), "010102"),
        ("bitmap", 20, (0, 9, 19), "01010208"),
        # l = 2, low bits 0 1 3, the others 0 2 4: ones at 0, 3 and 6
        ("elias-fano", 20, (0, 9, 19), "023449"),
        ("elias-fano", 1 << 40, (1 << 39,), "02" + "0000000080" + "01"),
        # gaps 0 8 9 with r = 2: low bits 0 0 1, the others 0 2 2
        ("golomb-rice", 20, (0, 9, 19), "03021049"),
        ("golomb-rice", 20, (0, 1, 3), "03000b"),
        # lengths less one 2 1 with r = 0; before the runs 1, 4 - 1 and 17 - 1 with s = 2: low bits
        # 1 3 0, the others 0 0 4; in unary 2 1 0 0 4, ones at 2, 4, 5, 6 and 11
        ("runs", 30, (1, 2, 3, 8, 9, 27), "04" + "0300000000" + "0002" + "0d" + "7408"),
        # one run, so no lengths; before it 4 with s = 1: low bit 0, the others 2
        ("runs", 20, (4, 5, 6), "04" + "0100000000" + "0001" + "00" + "04"),
    ],
)
def test_golden_bytes(coding: Coding, n: int, places: tuple[int, ...], written: str) -> None:
    assert encode(n, at(*places), [coding]).hex() == written
    assert decode(n, len(places), bytes.fromhex(written)).tolist() == list(places)


def test_the_numbers_of_the_codings_stay() -> None:
    assert get_args(Coding) == CODINGS
    assert CODINGS == ("only", "bitmap", "elias-fano", "golomb-rice", "runs")


# --- what is refused ---------------------------------------------------------------------


RUNS = "04" + "0300000000" + "0002" + "0d" + "7408"  # see above: 6 places below 30


@pytest.mark.parametrize(
    ("n", "k", "buffer"),
    [
        (8, 1, ""),
        (8, 0, ""),
        (8, 1, "05"),  # no such coding
        (8, 1, "ff01"),
        (8, 9, "01ff01"),
        (8, -1, "00"),
        (-1, -1, "00"),
        (MAX_SIZE + 1, 0, "00"),
        (8, 3, "00"),  # neither none nor all
        (8, 0, "01"),  # none, all: have a coding of their own
        (8, 8, "01ff"),
        (8, 0, "0000"),
        (8, 2, "0101"),  # one place, three places
        (8, 2, "0107"),
        (8, 2, "010300"),  # trailing byte
        (8, 2, "01"),
        (9, 2, "010104"),  # 0 10: beyond the size
        (20, 3, "02"),
        (20, 3, "0234"),
        (20, 3, "02344900"),  # trailing byte
        (20, 3, "027449"),  # spare bit of the field
        (20, 3, "023448"),  # two ones, four ones
        (20, 3, "0234c9"),
        (20, 3, "023489"),  # 0 9 23: beyond the size
        (20, 3, "020489"),  # 0 9 20
        (20, 2, "020003"),  # 0 0: does not increase
        (20, 2, "020103"),  # 1 0
        (MAX_SIZE, 1, "02000000000002"),  # 2^40
        (MAX_SIZE, 1, "02000000000000000001"),  # more than int64 could hold
        (20, 3, "03"),
        (20, 3, "0302"),
        (20, 3, "030210"),
        (20, 3, "0302104900"),  # trailing byte
        (20, 3, "03025049"),  # spare bit of the field
        (20, 3, "03021048"),  # two ones, four ones
        (20, 3, "030210c9"),
        (19, 3, "03021049"),  # beyond the size
        (20, 3, "0302100980"),
        (20, 3, "0300010208"),  # 0 9 19 with r = 0, 1, 3: longer or not the smallest r
        (20, 3, "0301042104"),
        (20, 3, "0303400015"),
        (MAX_SIZE, 1, "033f" + "00" * 8 + "01"),  # r past 40, past int64, past all
        (MAX_SIZE, 1, "03ff" + "00" * 32 + "01"),
        (30, 6, "04"),
        (30, 6, RUNS[:12]),
        (30, 6, RUNS[:16]),
        (30, 6, RUNS[:-2]),
        (30, 6, RUNS + "00"),  # trailing byte
        (30, 6, RUNS.replace("0d", "4d")),  # spare bit of the field
        (30, 6, RUNS.replace("7408", "7418")),  # another one
        (30, 6, RUNS.replace("7408", "f4")),  # before the runs 1 3 0: not with this s
        (30, 6, RUNS.replace("0300000000", "0000000000")),  # m is not 3
        (30, 6, RUNS.replace("0300000000", "0200000000")),
        (30, 6, RUNS.replace("0300000000", "0400000000")),
        (30, 6, RUNS.replace("0300000000", "0700000000")),
        (30, 6, RUNS.replace("0300000000", "ffffffffff")),
        (30, 6, "04" + "0300000000" + "0102" + "020d" + "1e02"),  # r = 1 is no better than 0
        (27, 6, RUNS),  # beyond the size
        (30, 5, RUNS),  # nothing is left for the last run
        (30, 4, RUNS),
    ],
)
def test_what_encode_does_not_make_is_refused(n: int, k: int, buffer: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(n, k, bytes.fromhex(buffer))


def test_numbers_that_would_wrap_around_to_good_ones_are_refused() -> None:
    """2^24 2^40 and 2^26 2^38 are 2^64, in int64 0."""
    high = 1 << (1 << 24)
    buffer = b"\2" + bytes(5) + high.to_bytes((1 << 21) + 1, "little")
    with pytest.raises(RemoteProtocolError):
        decode(MAX_SIZE, 1, buffer)
    low = 1 << 37 | 1 << 37 + 38  # gaps 3 x 2^37 and, as it should be, 2^37; r is the best
    good = b"\3\x26" + low.to_bytes(10, "little")
    assert decode(MAX_SIZE, 2, good + b"\6").tolist() == [3 << 37, (1 << 39) + 1]
    high = 1 << 1 | 1 << (1 << 26) + 2
    with pytest.raises(RemoteProtocolError):
        decode(MAX_SIZE, 2, good + high.to_bytes((1 << 23) + 1, "little"))


def test_the_buffers_that_are_refused_are_near_misses() -> None:
    assert decode(28, 6, bytes.fromhex(RUNS)).tolist() == [1, 2, 3, 8, 9, 27]
    assert decode(30, 7, bytes.fromhex(RUNS)).tolist() == [1, 2, 3, 8, 9, 27, 28]
    assert decode(20, 3, bytes.fromhex("023449")).tolist() == [0, 9, 19]
    assert decode(20, 3, bytes.fromhex("03021049")).tolist() == [0, 9, 19]


ANY = [bytes([b]) for b in range(256)]
FEW = [*ANY[:32], *ANY[32::32]]
R = [bytes([r]) for r in range(4)]
M = [m.to_bytes(5, "little") for m in range(4)]


@pytest.mark.parametrize(
    ("coding", "n", "k", "parameters"),
    [
        ("bitmap", 9, 3, [[b""]]),
        ("bitmap", 14, 1, [[b""]]),
        ("elias-fano", 6, 3, [[b""]]),
        ("elias-fano", 7, 5, [[b""]]),
        ("golomb-rice", 6, 3, [R]),
        ("golomb-rice", 12, 2, [R]),
        ("runs", 7, 4, [M, R[:2], R[:2]]),
        ("runs", 9, 7, [M, R[:2], R[:2]]),
    ],
)
def test_of_many_buffers_exactly_those_are_read_that_encode_makes(
    coding: Coding, n: int, k: int, parameters: list[list[bytes]]
) -> None:
    made = {encode(n, at(*chosen), [coding]) for chosen in itertools.combinations(range(n), k)}
    read, tried, start = set(), set(), bytes([CODINGS.index(coding)])
    for num_free in range(3):
        for parts in itertools.product(*parameters, *[ANY, FEW][:num_free]):
            buffer = start + b"".join(parts)
            tried.add(buffer)
            try:
                decode(n, k, buffer)
            except RemoteProtocolError:
                continue
            read.add(buffer)
    assert len(made) == math.comb(n, k)
    assert read == made & tried
    assert len(read) > len(made) / 2


@given(masks(), st.sampled_from(REAL), st.data())
def test_a_damaged_buffer_is_refused_or_another_message(
    mask: tuple[int, Places], coding: Coding, data: st.DataObject
) -> None:
    n, places = mask
    k, buffer = len(places), encode(n, places, [coding])
    for end in range(len(buffer)):
        assert_only_encode_makes(n, k, buffer[:end])
    for extra in (b"\0", b"\1", b"\x80", data.draw(st.binary(min_size=1, max_size=3))):
        with pytest.raises(RemoteProtocolError):
            decode(n, k, buffer + extra)
    for bit in range(8 * len(buffer)):
        flipped = bytearray(buffer)
        flipped[bit // 8] ^= 1 << bit % 8
        assert_only_encode_makes(n, k, bytes(flipped))
    for other in (k - 1, k + 1):
        assert_only_encode_makes(n, other, buffer)
    assert_only_encode_makes(n + 1, k, buffer)
    assert_only_encode_makes(n - 1, k, buffer)


@given(
    st.sampled_from([0, 1, 5, 8, 9, 64, 1000, 1 << 20, MAX_SIZE]),
    st.one_of(st.integers(-1, 70), st.integers(0, MAX_SIZE)),
    st.sampled_from(["only", *REAL, None]),
    st.binary(max_size=40),
)
def test_garbage_is_refused_without_memory_for_what_it_claims(
    n: int, k: int, coding: Coding | None, data: bytes
) -> None:
    if k == n:
        k -= k > 1000  # all of many is legal and large
    if coding == "runs":
        k = min(k, 1000)  # and so is one run of many
    buffer = data if coding is None else bytes([CODINGS.index(coding)]) + data
    tracemalloc.start()
    assert_only_encode_makes(n, k, buffer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("coding", REAL)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.9])
def test_reading_takes_some_arrays_of_the_places_and_nothing_of_the_size(
    coding: Coding, density: float
) -> None:
    n = 400_000
    k = int(density * n)
    buffer = encode(n, random_mask(n, k), [coding])
    tracemalloc.start()
    decode(n, k, buffer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * 8 * k + 20 * module.PIECE


@pytest.mark.parametrize(
    ("n", "places"),
    [
        (8, (3, 3)),
        (8, (4, 3)),
        (8, (0, 8)),
        (8, (8,)),
        (8, (-1, 3)),
        (2, (0, 0)),
        (0, (0,)),
        (MAX_SIZE + 1, (0,)),
    ],
)
def test_bad_places_are_our_own_mistake(n: int, places: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        encode(n, at(*places))
    with pytest.raises(LocalProtocolError):
        nbytes(n, at(*places))


@given(masks())
def test_the_places_given_are_not_changed(mask: tuple[int, Places]) -> None:
    n, places = mask
    before = places.copy()
    places.flags.writeable = False
    for coding in REAL:
        encode(n, places, [coding])
    assert np.array_equal(places, before)
