from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest

from fedalgos.method import Assignment, Vector, Work
from fedalgos.registry import build, settings
from fedalgos.zeroth import Scheme, Walk, differences, walk, wants_scalars
from protocol import noise
from protocol.noise import Direction
from protocol.payload import Dense, Flat, Payload, Run, Scalars, Sparse, encode, spec_of
from protocol.wire import RemoteProtocolError
from tests.oracles import Exact, Quadratic, f32, over_the_wire, play, space_of, towards

D = 16
ONES, EYE = np.ones(D, np.float32), np.eye(D, dtype=np.float32)
LINEAR, BOWL = Quadratic(ONES), Quadratic(ONES, EYE)
each_scheme = pytest.mark.parametrize("scheme", get_args(Scheme))


def along(key: int) -> Direction:
    return Direction(key, ((0, D),))


def z_of(key: int) -> Exact:
    return noise.normals(key, 0, D).astype(np.float64)


def estimate(oracle: Quadratic, x: Flat, eps: float, scheme: Scheme, key: int = 42) -> float:
    (g,), _ = differences(oracle, x, [along(key)], eps, None, scheme)
    return float(g)


# --- differences ------------------------------------------------------------------


@each_scheme
@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_a_linear_loss_gives_c_dot_z_for_both_schemes_and_any_eps(
    scheme: Scheme, eps: float
) -> None:
    """c = 1 and z the stream of key 42: c.z = 5.611686, |z|^2 = 20.775982."""
    assert z_of(42).sum() == pytest.approx(5.611686, abs=1e-6)
    assert z_of(42) @ z_of(42) == pytest.approx(20.775982, abs=1e-6)
    assert estimate(LINEAR, 0 * ONES, eps, scheme) == pytest.approx(5.611686, rel=1e-6)
    assert estimate(LINEAR, 3 * ONES, eps, scheme) == pytest.approx(5.611686, rel=1e-6)


@each_scheme
def test_one_step_of_0_1_from_0_on_the_linear_loss(scheme: Scheme) -> None:
    """x = -0.1 x 5.611686 z, z starting with -1.544580, -0.287027, 0.792847, 1.860479."""
    end = walk(LINEAR, 0 * ONES, [None], lambda _: [along(42)], 0.1, 1e-3, scheme, to_the_end=True)
    np.testing.assert_allclose(end.w[:4], [0.8667696, 0.1610707, -0.4449208, -1.0440425], rtol=1e-5)


def test_on_a_quadratic_central_is_exact_and_forward_adds_half_mu_z_a_z() -> None:
    """A = I, mu = 1e-3: the bias is 20.775982 / 2000 = 0.010388."""
    x = np.linspace(-1, 2, D).astype(np.float32)
    exact = float(z_of(42) @ (ONES + x))
    assert estimate(BOWL, x, 1e-3, "central") == pytest.approx(exact, abs=1e-6)
    assert estimate(BOWL, x, 1e-3, "forward") - exact == pytest.approx(0.010388, abs=2e-6)


@pytest.mark.parametrize("mu", [1e-3, 0.5, 4.0])
def test_with_any_symmetric_a_and_any_mu_too(mu: float) -> None:
    root = np.random.default_rng(0).normal(size=(D, D))
    a = (root + root.T).astype(np.float32)
    x, z = np.linspace(-1, 2, D).astype(np.float32), z_of(7)
    exact = float(z @ (ONES + a @ x))
    oracle = Quadratic(ONES, a)
    assert estimate(oracle, x, mu, "central", 7) == pytest.approx(exact, rel=1e-5)
    biased = exact + mu / 2 * float(z @ a @ z)
    assert estimate(oracle, x, mu, "forward", 7) == pytest.approx(biased, rel=1e-5)


@dataclass(frozen=True)
class Counted(Quadratic):
    """Notes the points it was asked about, as (key of the direction, offset)."""

    asked: list[tuple[int, float]] = field(default_factory=list)

    def loss(self, x: Vector, batch: Any) -> float:
        self.asked.append((0, 0.0))
        return super().loss(x, batch)

    def losses(
        self, x: Vector, directions: Sequence[Direction], offsets: Sequence[float], batch: Any
    ) -> list[tuple[float, ...]]:
        self.asked.extend((z.key, s) for z in directions for s in offsets)
        return super().losses(x, directions, offsets, batch)


def test_forward_shares_one_base_among_its_directions_and_central_takes_pairs() -> None:
    forward, central = Counted(ONES), Counted(ONES)
    differences(forward, ONES, [along(1), along(2), along(3)], 0.1, None, "forward")
    differences(central, ONES, [along(1), along(2)], 0.1, None, "central")
    assert forward.asked == [(0, 0.0), (1, 0.1), (2, 0.1), (3, 0.1)]
    assert central.asked == [(1, 0.1), (1, -0.1), (2, 0.1), (2, -0.1)]


def test_the_reported_loss_is_the_mean_over_the_points_or_that_of_the_base() -> None:
    """f = |x|^2 / 2 at 1: (16 + eps^2 |z|^2) / 2, averaged over the z; forward 8."""
    bowl, two = Quadratic(0 * ONES, EYE), [along(1), along(2)]
    squares = [z_of(key) @ z_of(key) for key in (1, 2)]
    _, central = differences(bowl, ONES, two, 0.5, None, "central")
    assert central == pytest.approx((16 + 0.25 * sum(squares) / 2) / 2)
    assert differences(bowl, ONES, two, 0.5, None, "forward")[1] == 8


@each_scheme
def test_derivatives_are_rounded_to_what_is_sent(scheme: Scheme) -> None:
    g, _ = differences(LINEAR, ONES, [along(1)], 0.1, None, scheme)
    assert isinstance(g[0], np.float32)


# --- walk -------------------------------------------------------------------------


def walked(
    oracle: Quadratic, rate: float, batches: list[Any], scheme: Scheme = "central", **more: Any
) -> Walk:
    """Steps along z(10 step) and z(10 step + 1) from 1."""
    return walk(
        oracle,
        ONES,
        batches,
        lambda step: [along(10 * step), along(10 * step + 1)],
        rate,
        0.1,
        scheme,
        **more,
    )


@each_scheme
def test_all_derivatives_of_a_step_are_of_one_point_and_then_all_moves_are_made(
    scheme: Scheme,
) -> None:
    end = walked(BOWL, 0.01, [None] * 3, scheme, to_the_end=True)
    x, expected = ONES.astype(np.float64), []
    for step in range(3):
        z = [z_of(10 * step), z_of(10 * step + 1)]
        bias = 0.05 if scheme == "forward" else 0.0
        g = [float(d @ (ONES + x) + bias * d @ d) for d in z]
        x = x - 0.01 * (g[0] * z[0] + g[1] * z[1])
        expected += g
    np.testing.assert_allclose(end.scalars, expected, rtol=1e-5)
    assert end.scalars.dtype == np.float32
    np.testing.assert_allclose(end.w, x, rtol=1e-5, atol=1e-6)


def test_each_move_is_one_fp32_product_and_sum_as_in_a_replay() -> None:
    end, w = walked(BOWL, 0.013, [None] * 3, to_the_end=True), ONES
    for j, g in enumerate(end.scalars):
        z = noise.normals(10 * (j // 2) + j % 2, 0, D)
        w = w + (-np.float32(0.013) * g) * z
    assert end.w.tobytes() == w.tobytes()


def test_the_last_move_is_left_out_unless_it_is_asked_for() -> None:
    short, long = walked(BOWL, 0.01, [None]), walked(BOWL, 0.01, [None], to_the_end=True)
    assert short.w.tobytes() == ONES.tobytes() != long.w.tobytes()
    assert short.scalars.tobytes() == long.scalars.tobytes()


def test_each_batch_has_its_turn_and_the_loss_is_the_mean_of_the_steps() -> None:
    end = walked(Quadratic(0 * ONES), 1e-9, [ONES, -3 * ONES])
    by_z = [z_of(0), z_of(1), -3 * z_of(10), -3 * z_of(11)]
    np.testing.assert_allclose(end.scalars, [z.sum() for z in by_z], rtol=1e-4)
    assert end.loss == pytest.approx((16 - 48) / 2, rel=1e-6)


@pytest.mark.parametrize(("scheme", "reach"), [("central", 0.2), ("forward", 0.1)])
def test_a_difference_of_losses_above_the_bar_moves_nothing_and_one_below_does(
    scheme: Scheme, reach: float
) -> None:
    first, second = (float(abs(z_of(key).sum())) for key in (0, 1))
    small, large = sorted((first, second))
    assert small < 0.99 * large

    def kept(bar: float) -> list[bool]:
        end = walked(LINEAR, 0.1, [None], scheme, skip_above=bar, to_the_end=True)
        x = ONES.astype(np.float64)
        for g, key in zip(end.scalars, (0, 1), strict=True):
            x = x - 0.1 * g * z_of(key)
        np.testing.assert_allclose(end.w, x, rtol=1e-5)
        return [bool(g) for g in end.scalars]

    assert kept(1.01 * reach * large) == [True, True]
    assert kept(0.99 * reach * large) == [first == small, second == small]
    assert kept(0.99 * reach * small) == [False, False]
    assert kept(0.0) == [True, True]  # no bar


def test_the_payload_of_a_walk_is_one_run_of_the_client() -> None:
    sent = Walk(None, f32(1, 2, 3), 0.0).payload(7)
    assert sent.runs == (Run(7, 3),)
    assert sent.values.tolist() == [1, 2, 3]


# --- what is accepted --------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "count", "why"),
    [
        (Scalars((Run(3, 2),), f32(1, 2)), 2, None),
        (Scalars((Run(3, 2),), f32(1, 2)), 0, None),
        (Scalars((Run(3, 2),), f32(1, 2)), 3, "another size: 2 scalars, want 3"),
        (Scalars((Run(3, 2),), f32(1, 2)), 1, "another size: 2 scalars, want 1"),
        (Scalars((Run(4, 2),), f32(1, 2)), 2, "another client"),
        (Scalars((Run(3, 2, -1.0),), f32(1, 2)), 2, "scale"),
        (Scalars((Run(3, 2, 1.0, 2.0),), f32(1, 2)), 2, "weight"),
        (Scalars((Run(3, 1), Run(3, 1)), f32(1, 2)), 2, "one run"),
        (Scalars((), f32()), 0, "one run"),
        (Dense(f32(1, 2)), 2, "one run"),
        (Sparse(2, np.arange(2), f32(1, 2)), 2, "one run"),
    ],
)
def test_wants_scalars_says_why_not(payload: Payload, count: int, why: str | None) -> None:
    said = wants_scalars(Assignment(3), payload, count)
    assert said is None if why is None else why in str(said)


@dataclass(frozen=True)
class Broken(Quadratic):
    """Its loss is ``at`` wherever it is asked about but at the start."""

    at: float = math.nan

    def value(self, x: Exact, batch: Any) -> float:
        return 0.0 if (x == 0).all() else self.at


ZEROTH = {
    "fedmezo": {"name": "fedmezo"},
    "fedkseed": {"name": "fedkseed"},
    "decomfl": {"name": "decomfl", "scheme": "forward"},
    "baffle": {"name": "baffle", "scheme": "forward"},
}


@pytest.mark.parametrize("table", ZEROTH.values(), ids=ZEROTH.keys())
@pytest.mark.parametrize("at", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loss_that_is_not_finite_makes_an_update_that_nobody_takes(
    table: dict[str, str], at: float
) -> None:
    method, x = build(settings(table), space_of(D), 5), np.zeros(D, np.float32)
    with pytest.raises(RemoteProtocolError, match="not finite"):
        list(play(method, {0: Broken(ONES, at=at)}, x, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_scalar_among_many_is_found(bad: float) -> None:
    values = np.ones(1000, np.float32)
    values[577] = bad
    sent = Scalars((Run(0, 1000),), values)
    assert spec_of(sent).nbytes == len(encode(sent)) == 4000
    with pytest.raises(RemoteProtocolError, match="not finite"):
        over_the_wire(sent)


@pytest.mark.parametrize("table", ZEROTH.values(), ids=ZEROTH.keys())
def test_what_a_zeroth_order_method_sends_does_not_grow_with_the_model(
    table: dict[str, str],
) -> None:
    sizes = set()
    for d in (3, 300):
        method, goal = build(settings(table), space_of(d), 5), towards(np.ones(d, np.float32))
        (only,) = play(method, {0: goal}, np.zeros(d, np.float32), 1)
        sent, _ = method.local(only.x, goal, [None], Work(2, method.plan(only.state, 2, [0])[0]))
        sizes.add((spec_of(sent).nbytes, spec_of(only.step).nbytes))
    assert len(sizes) == 1
