from __future__ import annotations

import math

import numpy as np
import pytest

from fedalgos.privacy import Dp, asked, clipped, epsilon, figures, gaussian, noised
from tests.oracles import f32

SECRET = bytes(range(32))


def test_what_is_longer_than_the_clip_gets_its_length_and_the_rest_stays() -> None:
    np.testing.assert_allclose(clipped(f32(3, 4), 1.0), [0.6, 0.8], rtol=1e-12)
    assert clipped(f32(3, 4), 5.0).tolist() == [3, 4]
    assert clipped(f32(0, 0), 1.0).tolist() == [0, 0]
    assert clipped(f32(), 1.0).tolist() == []


def test_noise_is_normal_and_no_two_coordinates_share_it() -> None:
    z = gaussian(SECRET, 1, np.zeros(100_001))
    assert z.shape == (100_001,)
    assert len(set(z.tolist())) == len(z)
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))
    assert abs((np.abs(z) < 1).mean() - 0.682689) < 0.006
    assert abs(np.corrcoef(z[:50_000], z[50_001:])[0, 1]) < 0.02  # the two of a pair


def test_noise_repeats_for_the_same_sum_and_differs_by_secret_round_and_sum() -> None:
    total = np.array([1.0, -2.0, 0.5])
    z = gaussian(SECRET, 1, total)
    assert z.tobytes() == gaussian(SECRET, 1, total.copy()).tobytes()
    others = [
        gaussian(SECRET[:-1] + b"x", 1, total),
        gaussian(SECRET, 2, total),
        gaussian(SECRET, 1, total + np.array([0, 0, 1e-12])),
    ]
    assert all(not np.isclose(z, other).any() for other in others)


def test_noise_is_the_multiplier_times_the_clip() -> None:
    total = np.array([1.0, -2.0])
    z = gaussian(SECRET, 3, total)
    got = noised(Dp(clip=0.5, noise_multiplier=3.0), SECRET, 3, total)
    np.testing.assert_allclose(got, total + 1.5 * z, rtol=1e-12)
    assert noised(Dp(clip=0.5, noise_multiplier=0.0), SECRET, 3, total) is total


def test_rounds_are_counted_by_the_size_of_their_cohort() -> None:
    assert asked(asked(asked((), 5), 10), 5) == ((5, 2), (10, 1))


def test_without_noise_nothing_is_private_and_nothing_is_reported() -> None:
    assert epsilon(0.0, 1e-5, [(10, 1)]) == math.inf
    assert figures(Dp(clip=1.0, noise_multiplier=0.0), ((10, 1),)) == {}
    assert figures(None, ((10, 1),)) == figures(Dp(clip=1.0, noise_multiplier=1.0), ()) == {}


def by_renyi(sigma: float, delta: float, rounds: int) -> float:
    """The best order's bound, the Gaussian's Renyi divergence a / (2 sigma^2), converted as
    in Balle et al. (AISTATS 2020, Theorem 21)."""
    orders = np.concatenate([np.arange(1.01, 11, 0.01), np.arange(11, 2000)])
    bounds = rounds * orders / (2 * sigma**2) + np.log1p(-1 / orders)
    return float((bounds - np.log(delta * orders) / (orders - 1)).min())


def test_epsilon_without_sampling_is_the_gaussian_mechanisms_of_twice_the_clip() -> None:
    pytest.importorskip("dp_accounting")
    assert epsilon(8.0, 1e-5, [(10, 20)]) == pytest.approx(by_renyi(4.0, 1e-5, 20), rel=5e-3)
    assert epsilon(8.0, 1e-5, [(10, 20)], 10) == epsilon(8.0, 1e-5, [(10, 20)])


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_with_clients_to_draw_from() -> None:
    pytest.importorskip("dp_accounting")
    base = epsilon(2.0, 1e-5, [(10, 20)], 350)
    assert base < epsilon(2.0, 1e-5, [(10, 20)], 100) < epsilon(2.0, 1e-5, [(10, 20)])
    assert epsilon(4.0, 1e-5, [(10, 20)], 350) < base < epsilon(2.0, 1e-5, [(10, 40)], 350)
    mixed = epsilon(2.0, 1e-5, [(10, 10), (20, 10)], 350)
    assert base < mixed < epsilon(2.0, 1e-5, [(20, 20)], 350)


def test_figures_are_epsilon_and_its_delta() -> None:
    pytest.importorskip("dp_accounting")
    o = Dp(clip=1.0, noise_multiplier=2.0, delta=1e-4, clients=350)
    assert figures(o, ((10, 20),)) == {
        "epsilon": epsilon(2.0, 1e-4, [(10, 20)], 350),
        "delta": 1e-4,
    }
