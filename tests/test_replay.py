from __future__ import annotations

import importlib
import tracemalloc
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalgos.method import mean_of
from fedalgos.replay import Path, alphas, replay
from protocol import kernels, noise
from protocol.noise import PIECE, Flat
from protocol.payload import Dense
from tests.oracles import contribution, f32

compiles = pytest.mark.skipif(not kernels.has_compiled(), reason="numba is not installed")
BOTH = [
    pytest.param("protocol.noise", id="reference"),
    pytest.param("protocol.kernels_numba", id="compiled", marks=compiles),
]
# weights whose mean is rounded, of magnitudes that absorb each other
WALKS = [
    Path([11, 12, 13], f32(0.3, -1e3, 7e-5), 3),
    Path([21], f32(-0.7), 1 / 3),
    Path([], f32(), 5),
    Path([31, 11], f32(1e-6, 0.1), 1e7),
]


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    before = kernels._num_threads
    yield
    kernels.use_threads(before)


def draw(size: int) -> Flat:
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    x.flags.writeable = False  # any write in place now raises
    return x


def walked(x: Flat, path: Path, kind: noise.Kind = "normal") -> Flat:
    """Each product, then each sum, rounded to fp32."""
    w = x.copy()
    for key, alpha in zip(path.keys, path.alphas, strict=True):
        w = w + alpha * noise.stream(kind, key, 0, len(x))
    return w


def averaged(x: Flat, paths: list[Path]) -> Flat:
    """Summed in fp64 in order, divided, rounded once."""
    ends = [(path.weight, walked(x, path).astype(np.float64)) for path in paths]
    total, wide = 0.0, np.zeros(len(x))
    for weight, end in ends:
        wide, total = wide + weight * end, total + weight
    return (wide / total).astype(np.float32)


def test_a_path_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """x = (1, 2), z = (1, -1) then (2, 0.5), alphas 0.5 and -2: x + 0.5 z - 2 z'."""
    given_streams(monkeypatch, {1: f32(1, -1), 2: f32(2, 0.5)})
    assert replay(f32(1, 2), [Path([1, 2], f32(0.5, -2))]).tolist() == [-2.5, 0.5]


def test_paths_of_several_clients_end_at_their_weighted_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ends (3, 2) and (1, 6) with weights 1 and 3: (1.5, 5)."""
    given_streams(monkeypatch, {1: f32(1, 0), 2: f32(0, 2)})
    paths = [Path([1], f32(2), 1), Path([2], f32(2), 3)]
    assert replay(f32(1, 2), paths).tolist() == [1.5, 5]


def test_the_mean_is_summed_in_the_order_of_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """1e20 - 1e20 + 1 is 1, and 1 - 1e20 + 1e20 is 0 in fp64."""
    given_streams(monkeypatch, {1: f32(1)})
    paths = [Path([1], f32(alpha)) for alpha in (1e20, -1e20, 1)]
    assert replay(f32(0), paths).tolist() == [float(np.float32(1 / 3))]
    assert replay(f32(0), paths[::-1]).tolist() == [0]


def given_streams(monkeypatch: pytest.MonkeyPatch, by_key: dict[int, Flat]) -> None:
    monkeypatch.setattr(kernels, "choose", lambda num_draws: noise)
    monkeypatch.setattr(noise, "stream", lambda kind, key, i, j: by_key[key][i:j])


def test_products_and_sums_are_rounded_one_after_the_other() -> None:
    x = draw(999)
    assert replay(x, WALKS[:1]).tobytes() == walked(x, WALKS[0]).tobytes()
    at_once = x.astype(np.float64)
    for key, alpha in zip(WALKS[0].keys, WALKS[0].alphas, strict=True):
        at_once += np.float64(alpha) * noise.normals(key, 0, 999)
    assert replay(x, WALKS[:1]).tobytes() != at_once.astype(np.float32).tobytes()


def test_the_order_of_a_path_is_part_of_it() -> None:
    x, (a, b, c) = draw(999), WALKS[0].keys
    turned = Path([c, b, a], WALKS[0].alphas[::-1], 3)
    assert replay(x, [turned]).tobytes() == walked(x, turned).tobytes()
    assert replay(x, [turned]).tobytes() != replay(x, WALKS[:1]).tobytes()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("size", [1, 700, PIECE, 3 * PIECE + 5])
def test_neither_pieces_nor_threads_nor_compilation_change_a_bit(
    size: int, module: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: ModuleType = importlib.import_module(module)
    monkeypatch.setattr(kernels, "choose", lambda num_draws: chosen)
    kernels.use_threads(threads)
    x = draw(size)
    assert replay(x, WALKS).tobytes() == averaged(x, WALKS).tobytes()
    assert replay(x, WALKS[:1]).tobytes() == walked(x, WALKS[0]).tobytes()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.integers(0, 2**64 - 1), st.floats(-10, 10, width=32)), max_size=3
            ),
            st.integers(1, 10**9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_replay_is_the_mean_of_the_clients_dense_weights_to_the_bit(
    clients: list[tuple[list[tuple[int, float]], int]],
) -> None:
    x = draw(100)
    paths = [Path([k for k, _ in walk], f32(*(a for _, a in walk)), n) for walk, n in clients]
    dense = [
        contribution(Dense(walked(x, path)), i, n)
        for i, (path, (_, n)) in enumerate(zip(paths, clients, strict=True))
    ]
    assert replay(x, paths).tobytes() == mean_of(dense, 100).astype(np.float32).tobytes()


@pytest.mark.parametrize("kind", ["uniform", "sign"])
@pytest.mark.parametrize("paths", [WALKS[:1], WALKS[:1] * 2], ids=["one path", "two"])
def test_the_kind_of_stream_is_the_one_asked_for(kind: noise.Kind, paths: list[Path]) -> None:
    x = draw(300)
    end = walked(x, paths[0], kind)  # of two equal paths the mean is each
    assert replay(x, paths, kind).tobytes() == end.tobytes() != walked(x, paths[0]).tobytes()


def test_the_result_is_float32_of_its_own_and_x_may_be_read_only() -> None:
    x = draw(300)
    before = x.tobytes()
    for paths in (WALKS, WALKS[:1], WALKS[2:3]):
        new = replay(x, paths)
        assert new.dtype == np.float32
        assert new.flags.writeable
        assert not np.shares_memory(new, x)
    assert x.tobytes() == before


def test_a_path_of_no_steps_stays_where_it_is() -> None:
    assert replay(draw(300), WALKS[2:3]).tobytes() == draw(300).tobytes()


def test_no_paths_are_an_error_and_not_a_step_of_zero() -> None:
    with pytest.raises(ValueError, match="no paths"):
        replay(draw(3), [])


def test_a_replay_of_many_clients_needs_no_memory_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result and some pieces, where the clients' weights are twelve results."""
    monkeypatch.setattr(kernels, "choose", lambda num_draws: noise)
    kernels.use_threads(1)
    x = draw(8 * PIECE)
    paths = [Path([i], f32(0.1)) for i in range(12)]
    tracemalloc.start()
    try:
        replay(x, paths)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert x.nbytes < peak < 3 * x.nbytes


def test_alphas_are_minus_scale_times_scalar_with_the_scale_in_fp32_already() -> None:
    """fp32(0.1) = 13421773 / 2^27; nine times that is 15099494.625 / 2^24, but 0.9 ends in .4."""
    got = alphas(0.1, f32(9, -2, 0))
    assert got.dtype == np.float32
    assert got.tolist() == [-15099495 / 2**24, 2 * 13421773 / 2**27, 0]
    assert got[0] != np.float32(-0.1 * 9)
