"""However a job is split, threaded or compiled, its bits are those of ``protocol.noise``."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import kernels, noise
from protocol.noise import PIECE, Direction, Doubles, Flat, Keys, Kind

compiles = pytest.mark.skipif(not kernels.has_compiled(), reason="numba is not installed")
BOTH = [
    pytest.param(False, id="reference"),
    pytest.param(True, id="compiled", marks=compiles),
]
KINDS: tuple[Kind, ...] = get_args(Kind)
THREADS = (1, 2, 3, 5)

keys = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(KINDS)
scalars = st.floats(-10, 10, width=32)
seeds = st.integers(0, 2**32)
# Anywhere, around the carry into the second counter word, around where two pieces meet
starts = st.one_of(
    st.integers(0, 2**20),
    st.integers(2**35 - 700, 2**40),
    st.integers(2**35 - 700, 2**35 + 700),
    st.integers(3 * PIECE - 700, 3 * PIECE + 700),
)
sizes = st.integers(0, 700)  # groups of 128: several whole ones with their edges


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    before = kernels._num_threads
    yield
    kernels.use_threads(before)


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    module: ModuleType = pytest.importorskip(
        "protocol.kernels_numba", reason="numba is not installed"
    )
    return module


def use(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every job from now on run compiled, or none."""
    monkeypatch.setattr(kernels, "WORTH", 0)
    monkeypatch.setattr(kernels, "has_compiled", lambda: compiled)


def same(a: Flat | Doubles, b: Flat | Doubles) -> bool:
    """To the bit.  Not compared in an ``assert``, which would explain a megabyte for minutes."""
    return a.tobytes() == b.tobytes()


def draw(seed: int, size: int) -> Flat:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def keyed(values: list[int]) -> Keys:
    return np.array(values, np.uint64)


# --- compiled against the reference ----------------------------------------------


@given(st.lists(st.tuples(keys, scalars), max_size=4), starts, sizes, kinds, seeds)
@settings(deadline=None)  # the first call compiles
def test_compiled_add_is_the_reference_to_the_bit(
    compiled: ModuleType,
    terms: list[tuple[int, float]],
    start: int,
    size: int,
    kind: Kind,
    seed: int,
) -> None:
    ks, alphas = keyed([k for k, _ in terms]), np.array([a for _, a in terms], np.float32)
    x = draw(seed, size)
    expected = x.copy()
    noise.add(expected, start, ks, alphas, kind)
    compiled.add(x, start, ks, alphas, kind)
    assert same(x, expected)


@given(keys, st.lists(scalars, max_size=4), starts, sizes, kinds, seeds)
@settings(deadline=None)
def test_compiled_shifted_is_the_reference_to_the_bit(
    compiled: ModuleType,
    k: int,
    by: list[float],
    start: int,
    size: int,
    kind: Kind,
    seed: int,
) -> None:
    x, offsets = draw(seed, size), np.array(by, np.float32)
    before, expected = x.copy(), np.empty((len(by), size), np.float32)
    out = np.full((len(by), size), np.nan, np.float32)
    noise.shifted(x, start, k, offsets, expected, kind)
    compiled.shifted(x, start, k, offsets, out, kind)
    assert same(out, expected)
    assert same(x, before)


@given(st.lists(keys, max_size=4), starts, sizes.filter(bool), kinds, seeds)
@settings(deadline=None)
def test_compiled_dots_are_the_reference_to_the_bit(
    compiled: ModuleType, ks: list[int], start: int, size: int, kind: Kind, seed: int
) -> None:
    x = draw(seed, size) ** 9  # of many magnitudes, so that each order has its own rounding
    expected: Doubles = noise.dots(x, start, keyed(ks), kind)
    sums: Doubles = compiled.dots(x, start, keyed(ks), kind)
    assert sums.shape == expected.shape
    assert same(sums, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_take_what_is_not_finite_and_not_normal(
    compiled: ModuleType, kind: Kind
) -> None:
    values = [0.0, -0.0, 1e-45, -1e-39, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
    x, ks = np.tile(np.array(values, np.float32), 64), keyed([5, 6])
    for alpha in (0.0, -0.0, 1e-45, 1e-39, 3e38, np.inf):
        expected, got = x.copy(), x.copy()
        alphas = np.array([alpha, -alpha], np.float32)
        with np.errstate(all="ignore"):
            noise.add(expected, 3, ks, alphas, kind)
        compiled.add(got, 3, ks, alphas, kind)
        np.testing.assert_array_equal(got, expected)  # a NaN equals a NaN here
        number = ~np.isnan(expected)
        assert same(got[number], expected[number])  # zeros keep their signs


@pytest.mark.parametrize("is_compiled", BOTH)
def test_product_and_sum_are_never_fused(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is minus the rounded product: nothing is left, but a fused sum leaves the rounding."""
    use(is_compiled, monkeypatch)
    alpha = np.float32(1 + 2**-23)  # times a uniform of 17 bits: 41 bits, too many for fp32
    u = noise.uniforms(9, 0, 1000)
    x, out = -(alpha * u), np.ones((1, 1000), np.float32)
    exact = float(alpha) * u.astype(np.float64) + x  # what a fused multiply-add returns
    assert np.mean(exact != 0) > 0.4
    kernels.shifted(x, 9, np.array([alpha]), out, kind="uniform")
    kernels.add_(x, [9], [float(alpha)], kind="uniform")
    assert not x.any()
    assert not out.any()


# --- splits and threads ----------------------------------------------------------

START = 2 * PIECE - 1003
SIZE = 4 * PIECE + 77  # it touches six pieces, the first and the last in part
TWO = [0x62BFCDA757B438C0, 2**64 - 1]
ALPHAS = [0.1, -3.0]


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest) -> tuple[Kind, Flat, Flat, Flat, Doubles]:
    """x and what the reference makes of it at once: sum, shifts, scalar products."""
    kind: Kind = request.param
    x, out = draw(0, SIZE), np.empty((2, SIZE), np.float32)
    added, by = x.copy(), np.array(ALPHAS, np.float32)
    noise.add(added, START, keyed(TWO), by, kind)
    noise.shifted(x, START, TWO[0], by, out, kind)
    return kind, x, added, out, noise.total(noise.dots(x, START, keyed(TWO), kind))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("is_compiled", BOTH)
def test_the_number_of_threads_changes_no_bit(
    is_compiled: bool,
    threads: int,
    whole: tuple[Kind, Flat, Flat, Flat, Doubles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(is_compiled, monkeypatch)
    kernels.use_threads(threads)
    assert kernels.num_threads() == threads
    kind, x, added, shifts, products = whole
    got, out = x.copy(), np.empty_like(shifts)
    kernels.add_(got, TWO, ALPHAS, start=START, kind=kind)
    assert same(got, added)
    kernels.shifted(x, TWO[0], np.array(ALPHAS, np.float32), out, start=START, kind=kind)
    assert same(out, shifts)
    assert same(kernels.dots(x, TWO, start=START, kind=kind), products)


@compiles
@given(st.lists(st.integers(0, SIZE), max_size=5), st.sampled_from(THREADS))
@settings(deadline=None)
def test_any_split_of_a_job_changes_no_bit(
    whole: tuple[Kind, Flat, Flat, Flat, Doubles], cuts: list[int], threads: int
) -> None:
    kind, x, added, shifts, _ = whole
    got, out, by = x.copy(), np.empty_like(shifts), np.array(ALPHAS, np.float32)
    kernels.use_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        use(True, patch)
        for i, j in itertools.pairwise(sorted({0, *cuts, SIZE})):
            kernels.add_(got[i:j], TWO, ALPHAS, start=START + i, kind=kind)
            kernels.shifted(x[i:j], TWO[0], by, out[:, i:j], start=START + i, kind=kind)
    assert same(got, added)
    assert same(out, shifts)


@given(st.integers(0, 2**40), st.integers(0, 40 * PIECE), st.integers(1, 12))
@example(PIECE - 1, 2, 2)
@example(0, 0, 3)
@example(5 * PIECE, 3 * PIECE, 3)
@settings(deadline=None)  # it waits for threads, which a busy machine starts late
def test_spread_covers_each_element_once_and_meets_between_pieces(
    start: int, size: int, threads: int
) -> None:
    parts: list[tuple[int, int]] = []
    kernels.use_threads(threads)
    kernels.spread(lambda i, j: parts.append((i, j)), size, start)
    parts.sort()
    assert parts[0][0] == 0
    assert parts[-1][1] == size
    for (_, stop), (following, _) in itertools.pairwise(parts):
        assert stop == following
        assert (start + stop) % PIECE == 0
    # the work is shared: every thread has a part, and none two pieces more than another
    pieces = noise.num_pieces(start, size)
    assert len(parts) == max(1, min(threads, pieces))
    shares = [noise.num_pieces(start + i, j - i) for i, j in parts]
    assert sum(shares) == pieces
    assert max(shares) - min(shares) <= 1


def test_spread_uses_threads_at_the_same_time_and_waits_for_them() -> None:
    together = threading.Barrier(3, timeout=10)
    names: list[str] = []

    def work(i: int, j: int) -> None:
        together.wait()  # breaks unless three parts run at once
        names.append(threading.current_thread().name)

    kernels.use_threads(3)
    kernels.spread(work, 3 * PIECE)
    assert len(set(names)) == 3


def test_spread_raises_what_a_thread_raised() -> None:
    def work(i: int, j: int) -> None:
        if i:
            raise ZeroDivisionError

    kernels.use_threads(2)
    with pytest.raises(ZeroDivisionError):
        kernels.spread(work, 2 * PIECE)


def test_zero_threads_means_one_per_processor() -> None:
    kernels.use_threads(0)
    assert kernels.num_threads() == kernels._processors() >= 1


# --- what callers see ------------------------------------------------------------


@pytest.mark.parametrize("is_compiled", BOTH)
def test_a_direction_is_added_on_its_ranges_and_nowhere_else(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(is_compiled, monkeypatch)
    for kind in KINDS:
        direction = Direction(7, ((3, 40), (61, 900)), kind)
        x = draw(1, 1000)
        expected = x + np.float32(-0.3) * direction.dense(1000)
        kernels.add_direction_(x, -0.3, direction)
        assert same(x, expected)


@pytest.mark.parametrize("is_compiled", BOTH)
@pytest.mark.parametrize(
    "alphas",
    [[0.1, 1e-3], [np.float64(0.1), np.float64(1e-3)], np.array([0.1, 1e-3])],
    ids=["floats", "numpy scalars", "numpy array"],
)
def test_alphas_of_64_bits_are_rounded_before_the_product(
    alphas: Any, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(is_compiled, monkeypatch)
    x = draw(2, 3000)
    expected, wide = x.copy(), x.copy()
    noise.add(expected, 0, keyed([1, 2]), np.array([0.1, 1e-3], np.float32), "normal")
    for k, alpha in ((1, 0.1), (2, 1e-3)):
        wide = (wide + alpha * noise.normals(k, 0, 3000).astype(np.float64)).astype(np.float32)
    kernels.add_(x, [1, 2], alphas)
    assert same(x, expected)
    assert not same(x, wide)


@pytest.mark.parametrize("is_compiled", BOTH)
def test_a_job_of_nothing_does_nothing(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(is_compiled, monkeypatch)
    none, x = np.empty(0, np.float32), draw(3, 300)
    before = x.copy()
    kernels.add_(none, [1], [0.1], start=5)
    kernels.add_(x, [], [])
    kernels.shifted(none, 1, np.ones(2, np.float32), np.empty((2, 0), np.float32), start=5)
    assert same(x, before)
    assert kernels.dots(x, []).shape == (0,)


# --- which implementation runs ---------------------------------------------------


@compiles
def test_what_counts_for_the_first_compiled_job_is_how_many_numbers_it_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []

    def load() -> ModuleType:
        loaded.append("compiled")
        return noise  # so that the next job is again the first

    monkeypatch.delitem(sys.modules, "protocol.kernels_numba", raising=False)
    monkeypatch.setattr(kernels, "_compiled", load)
    monkeypatch.setattr(kernels, "WORTH", 1000)
    x, out = draw(4, 500), np.empty((3, 500), np.float32)
    kernels.add_(x, [1], [0.1])
    kernels.dots(x, [1])
    kernels.shifted(x, 1, np.ones(3, np.float32), out)  # draws once for three results
    assert not loaded
    kernels.add_(x, [1, 2], [0.1, 0.2])
    kernels.dots(x, [1, 2])
    kernels.shifted(np.ones(1000, np.float32), 1, out[:0, 0], np.empty((0, 1000), np.float32))
    assert len(loaded) == 3


def test_without_numba_the_reference_runs_and_gives_the_same_bits(
    whole: tuple[Kind, Flat, Flat, Flat, Doubles], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> ModuleType:
        raise AssertionError("numba is not installed")

    use(False, monkeypatch)
    monkeypatch.setattr(kernels, "_compiled", load)
    kind, x, added, shifts, products = whole
    got, out = x.copy(), np.empty_like(shifts)
    kernels.add_(got, TWO, ALPHAS, start=START, kind=kind)
    assert same(got, added)
    kernels.shifted(x, TWO[0], np.array(ALPHAS, np.float32), out, start=START, kind=kind)
    assert same(out, shifts)
    assert same(kernels.dots(x, TWO, start=START, kind=kind), products)
    assert kernels.choose(1 << 40) is noise


FIRST_SMALL_THEN_LARGE = """
import sys
import numpy as np
from protocol import kernels
x, out = np.zeros(2000, np.float32), np.zeros((1, 2000), np.float32)
kernels.add_(x, [1], [0.1])
kernels.dots(x, [1, 2])
kernels.shifted(x, 1, np.ones(1, np.float32), out)
print("numba" in sys.modules)
kernels.add_(np.zeros(kernels.WORTH, np.float32), [1], [0.1])
print("numba" in sys.modules)
print(kernels.choose(1).__name__)
"""


@compiles
def test_the_first_large_job_loads_numba_and_then_all_jobs_are_compiled() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", FIRST_SMALL_THEN_LARGE]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "protocol.kernels_numba"]


@pytest.mark.parametrize("is_compiled", BOTH)
def test_arguments_that_do_not_fit_are_refused_before_memory_is_touched(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(is_compiled, monkeypatch)
    x = np.zeros(10, np.float32)
    with pytest.raises(ValueError, match="2 keys, 1 alphas"):
        kernels.add_(x, [1, 2], [0.5])
    offsets = np.ones(3, np.float32)
    for shape in ((2, 10), (3, 9), (3, 11)):
        with pytest.raises(ValueError, match="out is"):
            kernels.shifted(x, 1, offsets, np.zeros(shape, np.float32))
    assert not x.any()


@pytest.mark.parametrize("is_compiled", BOTH)
def test_offsets_of_64_bits_are_rounded_before_the_product(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(is_compiled, monkeypatch)
    x, out, exact = np.ones(500, np.float32), *np.empty((2, 1, 500), np.float32)
    kernels.shifted(x, 3, np.array([0.1]), out)
    kernels.shifted(x, 3, np.array([0.1], np.float32), exact)
    assert out.tobytes() == exact.tobytes()


@compiles
def test_the_scalar_products_of_nothing_are_zero_wherever_it_starts(compiled: ModuleType) -> None:
    nothing = compiled.dots(np.zeros(0, np.float32), 5, np.array([1, 2], np.uint64), "normal")
    assert noise.total(nothing).tolist() == [0.0, 0.0]


def test_where_nothing_can_be_compiled_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError(f"cannot cache {name}")

    kernels._compiled.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    assert kernels._compiled() is noise
    assert "slow reference: cannot cache" in caplog.text
    kernels._compiled.cache_clear()
