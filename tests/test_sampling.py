from __future__ import annotations

import numpy as np
import pytest

from fedalgos.sampling import best, num_candidates
from protocol import noise
from tests.oracles import f32

D = 8
U = np.arange(1, D + 1, dtype=np.float32)


def key(pick: int) -> int:
    return noise.key("test", 4, pick)


def dot(pick: int) -> float:
    return float(U.astype(np.float64) @ noise.normals(key(pick), 0, D))


@pytest.mark.parametrize(
    ("count", "keep", "drawn"),
    [(1, 0.1, 10), (1, 1.0, 1), (3, 0.2, 15), (7, 0.07, 100), (2, 0.3, 7), (5, 0.999, 6)],
)
def test_enough_candidates_are_drawn(count: int, keep: float, drawn: int) -> None:
    assert num_candidates(count, keep) == drawn


def test_each_client_gets_the_largest_of_its_own_in_ascending_order() -> None:
    got = best(U, 100, 3, 10, 4, key)
    for i, picks in enumerate(got):
        block = range(100 + 10 * i, 110 + 10 * i)
        assert picks == sorted(sorted(block, key=dot, reverse=True)[:4])
    assert min(dot(p) for p in range(100, 110)) < -U.max()  # there was one to leave out


def test_the_sign_counts_and_so_does_not_the_length_of_the_reference() -> None:
    ahead, behind = best(U, 0, 1, 50, 5, key), best(-U, 0, 1, 50, 5, key)
    assert not set(ahead[0]) & set(behind[0])
    assert best(1e-6 * U, 0, 1, 50, 5, key) == best(U, 0, 1, 50, 5, key) == ahead


def test_of_equal_candidates_the_lower_is_kept() -> None:
    assert best(0 * U, 30, 2, 5, 2, key) == [[30, 31], [35, 36]]
    same = best(U, 0, 1, 6, 3, lambda pick: key(pick % 2))  # two directions, three times each
    assert same in ([[0, 2, 4]], [[1, 3, 5]])
    four = best(U, 0, 1, 6, 4, lambda pick: key(pick % 2))
    assert four in ([[0, 1, 2, 4]], [[0, 1, 3, 5]])


def test_test_vector_12() -> None:
    """The top 10 % of 80,000: E z, E z^2 along u, and E (g.z) z, within 5 deviations."""
    n, g = 8000, np.linspace(-0.5, 1, D)
    (picks,) = best(U, 0, 1, 10 * n, n, key)
    z = np.array([noise.normals(key(pick), 0, D) for pick in picks], np.float64)
    u = U.astype(np.float64) / np.linalg.norm(U)
    along = z @ u
    assert along.mean() == pytest.approx(1.75498, abs=5 * along.std() / n**0.5)
    assert (along**2).mean() == pytest.approx(3.2491, abs=5 * (along**2).std() / n**0.5)
    estimates = (z @ g)[:, None] * z
    expected = g + 2.2491 * (u @ g) * u
    off = np.abs(estimates.mean(axis=0) - expected)
    assert (off < 5 * estimates.std(axis=0) / n**0.5).all()
    assert (5 * estimates.std(axis=0) / n**0.5).max() < 0.2  # and that means something
    assert np.abs(expected - g).max() > 1


def test_scalar_products_rank_not_cosines() -> None:
    """A long candidate that points less well beats a short one, as (g.z) z does."""
    u = f32(1, 0)
    found = False
    for start in range(0, 400, 2):
        a, b = (noise.normals(key(start + i), 0, 2).astype(np.float64) for i in (0, 1))
        if a[0] > b[0] > 0 and a[0] / np.linalg.norm(a) < b[0] / np.linalg.norm(b):
            found = True
            assert best(u, start, 1, 2, 1, key) == [[start]]
    assert found
