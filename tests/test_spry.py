from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace as having

from fedalgos.method import Assignment, Work
from fedalgos.optim import AdamW, Moments, Sgd, Yogi
from fedalgos.space import ParamSpace, digest
from fedalgos.split import State
from fedalgos.spry import Spry, spry
from protocol import kernels, noise
from protocol.payload import Dense, Flat
from tests.oracles import (
    Product,
    Quadratic,
    all_at_once,
    contribution,
    f32,
    one_model,
    play,
    space_of,
)

A = np.array([[2, 0.5, 0], [0.5, 1, -0.25], [0, -0.25, 3]], np.float32)
TV1 = Quadratic(f32(1, -2, 0.5), A)
X1 = f32(0.3, -0.1, 0.2)
GRADIENT = np.array([1.55, -2.0, 1.125])
PLAIN = Spry(local=Sgd(lr=1.0), server=Sgd(lr=1.0))  # then x - w is the estimated gradient


def estimate(
    o: Spry, space: ParamSpace, oracle: Quadratic, x: Flat, client: int = 0, round: int = 1
) -> Flat:
    """The gradient that ``local`` stepped along, where lr is 1 and everything is assigned."""
    units = tuple(range(len(space.units)))
    sent, _ = spry(o, space, 0).local(x, oracle, [None], Work(round, Assignment(client, units)))
    g: Flat = x - sent.values
    return g


def given_direction(monkeypatch: pytest.MonkeyPatch, *v: float) -> None:
    monkeypatch.setattr(noise, "normals", lambda key, start, stop: f32(*v)[start:stop])
    monkeypatch.setattr(
        kernels, "choose", lambda num_draws: noise
    )  # the compiled ones see no patch


def test_forward_gradient_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """TV1: g = (1.55, -2, 1.125), v = (1, 2, -1), jvp = -3.575 (the constant .75 left out)."""
    given_direction(monkeypatch, 1, 2, -1)
    direction = noise.Direction(0, ((0, 3),))
    loss, (jvp,) = TV1.jvp(X1, [direction], None)
    assert [loss, jvp] == pytest.approx([1.495 - 0.75, -3.575])
    for h in (1e-2, 1.0):  # the central difference is exact on a quadratic
        plus, minus = TV1.losses(X1, [direction], (h, -h), None)[0]
        assert (plus - minus) / (2 * h) == pytest.approx(-3.575)
    np.testing.assert_allclose(
        estimate(PLAIN, space_of(3), TV1, X1), [-3.575, -7.15, 3.575], rtol=1e-6
    )


def test_the_estimate_has_the_moments_of_the_theory() -> None:
    """TV2, K = 1: E ghat = g, Cov ghat = |g|^2 I + g g', within 5 standard errors."""
    n = 2000
    draws = np.array([estimate(PLAIN, space_of(3), TV1, X1, client) for client in range(n)])
    error = draws - GRADIENT
    assert (np.abs(error.mean(0)) < 5 * error.std(0) / n**0.5).all()
    products = error[:, :, None] * error[:, None, :]
    covariance = GRADIENT @ GRADIENT * np.eye(3) + np.outer(GRADIENT, GRADIENT)
    assert (np.abs(products.mean(0) - covariance) < 5 * products.std(0) / n**0.5).all()


@pytest.mark.parametrize(("k", "mse"), [(1, 30.6725), (4, 7.668), (16, 1.917)])
def test_more_perturbations_divide_the_error(k: int, mse: float) -> None:
    """TV2: E|ghat_K - g|^2 = (d + 1)|g|^2 / K, within 5 standard errors."""
    o, n = Spry(perturbations=k, local=Sgd(lr=1.0)), 400
    squares = np.array(
        [((estimate(o, space_of(3), TV1, X1, 1, r) - GRADIENT) ** 2).sum() for r in range(1, n + 1)]
    )
    standard_error = squares.std() / n**0.5
    assert abs(squares.mean() - mse) < 5 * standard_error
    assert 5 * standard_error < 0.75 * mse  # so that a wrong K would show


@pytest.mark.parametrize("k", [10, 100])
def test_the_direction_is_as_good_as_the_theory_says(k: int) -> None:
    """TV3: E cos(ghat, g) is about sqrt(K / (K + d + 1)); .0995 and .301 for d = 1000."""
    g, o = np.resize(f32(1, -2, 0.5, 3), 1000), having(PLAIN, perturbations=k)
    seen = [estimate(o, space_of(1000), Quadratic(g), 0 * g, round=r) for r in range(1, 13)]
    cosines = [float(e @ g / np.linalg.norm(e) / np.linalg.norm(g)) for e in seen]
    assert np.mean(cosines) == pytest.approx((k / (k + 1001)) ** 0.5, rel=0.2)


def test_blocks_of_their_own_divide_the_error_by_their_number() -> None:
    """TV4: sum_b (d_b + 1)|g_b|^2 for 8 blocks of 64, against (d + 1)|g|^2 for one of 512."""
    g, n = np.resize(f32(1, -1, 1), 512), 60
    x, method = 0 * g, spry(PLAIN, space_of(*[64] * 8), 0)
    clients = {c: Quadratic(g) for c in range(8)}
    xs = [x, *(r.x for r in play(method, clients, x, n))]
    split = ((np.array(xs[:-1]) - xs[1:] - g) ** 2).sum(1)
    seen = [estimate(PLAIN, space_of(512), clients[0], x, round=r) for r in range(1, n + 1)]
    whole = ((np.array(seen) - g) ** 2).sum(1)
    for errors, theory in ((split, 65 * 512), (whole, 513 * 512)):
        standard_error = errors.std() / n**0.5
        assert abs(errors.mean() - theory) < 5 * standard_error < theory


TV5 = [((0,), 0.5 - 7.68), ((1,), 2.0 - 6.75)]


@pytest.mark.parametrize(("units", "after"), TV5)
def test_a_split_keeps_the_units_from_talking(
    units: tuple[int, ...], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TV5: f = (w2 w1 x - y)^2 / 2 at w = (.5, 2), x = 3, y = 1; v = (.8, -1.5)."""
    given_direction(monkeypatch, 0.8, -1.5)
    method = spry(PLAIN, space_of(1, 1), 0)
    work = Work(1, Assignment(0, units))
    sent, loss = method.local(f32(0.5, 2), Product(), [(3.0, 1.0)], work)
    assert isinstance(sent, Dense)
    assert sent.units == units
    np.testing.assert_allclose(sent.values, [after], rtol=1e-6)
    assert loss == 2.0


def test_unsplit_the_other_weight_decides_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    given_direction(monkeypatch, 0.8, -1.5)
    sent, _ = spry(PLAIN, space_of(2), 0).local(
        f32(0.5, 2), Product(), [(3.0, 1.0)], Work(1, Assignment(0, (0,)))
    )
    np.testing.assert_allclose(f32(0.5, 2) - sent.values, [4.08, -7.65], rtol=1e-6)


def test_local_trains_its_units_alone_with_the_optimiser_asked_for() -> None:
    x = np.linspace(1, 2, 6).astype(np.float32)
    before = digest(x)
    o = Spry(local=AdamW(lr=1e-2, weight_decay=0.5))
    sent, loss = spry(o, space_of(2, 3, 1), 0).local(
        x, Quadratic(np.ones(6, np.float32)), [None], Work(1, Assignment(4, (1, 2)))
    )
    v = noise.normals(noise.key("direction", 0, 1, 4, 0, 0), 0, 6)[2:]
    expected = x[2:] * (1 - 5e-3) - 1e-2 * np.sign(v.sum() * v)  # Adam's first step is lr
    np.testing.assert_allclose(sent.values, expected, rtol=1e-5)
    assert loss == pytest.approx(float(x.sum()), rel=1e-6)
    assert digest(x) == before


def test_the_loss_reported_is_the_mean_over_the_steps() -> None:
    batches = [f32(1), f32(2), f32(6)]  # the weight does not move: lr is next to nothing
    o = Spry(local=Sgd(lr=1e-9), perturbations=2)
    work = Work(1, Assignment(0, (0,)))
    _, loss = spry(o, space_of(1), 0).local(f32(1), Quadratic(f32(0)), batches, work)
    assert loss == pytest.approx(3, rel=1e-5)


def test_every_step_perturbation_client_and_round_has_its_own_direction() -> None:
    seen: list[noise.Direction] = []
    oracle = Quadratic(f32(1, 1, 1))

    class Watching(Quadratic):
        def jvp(
            self, x: Flat, directions: Sequence[noise.Direction], batch: object
        ) -> tuple[float, list[float]]:
            seen.extend(directions)
            return super().jvp(x, directions, batch)

    o, space = Spry(perturbations=2), space_of(1, 2)
    for round, client in itertools.product((1, 2), (0, 1)):
        work = Work(round, Assignment(client, (1,)))
        spry(o, space, 9).local(f32(0, 0, 0), Watching(oracle.c), [None, None], work)
    keys = [
        noise.key("direction", 9, round, client, step, k)
        for round, client, step, k in itertools.product((1, 2), (0, 1), (0, 1), (0, 1))
    ]
    assert seen == [noise.Direction(key, ((1, 3),)) for key in keys]


def test_slots_follow_the_cohorts_order() -> None:
    plan = spry(Spry(), space_of(1, 1, 1), 0).plan(State({}), 3, [8, 2])
    assert plan == (
        Assignment(8, (0, 2), slot=0, num_slots=2),
        Assignment(2, (1,), slot=1, num_slots=2),
    )


# --- server ----------------------------------------------------------------------


def test_a_lost_client_leaves_its_units_and_their_moments_alone() -> None:
    space = space_of(2, 1, 1)
    method = spry(Spry(server=Yogi()), space, 0)
    x = f32(1, 2, 3, 4)
    both = [
        contribution(Dense(f32(2, 3, 5), (0, 2)), 0, units=(0, 2)),
        contribution(Dense(f32(4), (1,)), 1, units=(1,)),
    ]
    s, step = method.aggregate(State({}), x, 1, both)
    assert isinstance(step, Dense)
    assert step.units == ()  # all of them
    x = method.apply(x, 1, step)
    after, step = method.aggregate(s, x, 2, both[:1])
    assert isinstance(step, Dense)
    assert step.units == (0, 2)
    y = method.apply(x, 2, step)
    assert y[2].tobytes() == x[2].tobytes()
    assert (y[[0, 1, 3]] != x[[0, 1, 3]]).all()
    assert after.moments[1] is s.moments[1]
    assert [after.moments[u].steps for u in range(3)] == [2, 1, 2]


def test_each_unit_takes_its_own_yogi_step() -> None:
    method = spry(Spry(server=Yogi()), space_of(1, 1), 0)
    s, step = method.aggregate(
        State({}), f32(1, 5), 1, [contribution(Dense(f32(1.1, 4.8), (0, 1)), units=(0, 1))]
    )
    expected = [1.0090909091, 5 - 0.01 * 0.02 / (0.0004**0.5 + 1e-3)]
    np.testing.assert_allclose(step.values, expected, rtol=1e-6)
    assert s.moments[1].m == pytest.approx(-0.02)


def test_a_unit_is_averaged_over_those_who_hold_it_by_examples() -> None:
    method = spry(PLAIN, space_of(2, 1), 0)
    contributions = [
        contribution(Dense(f32(1, 2), (0,)), 0, 3, (0,)),
        contribution(Dense(f32(10), (1,)), 1, 1000, (1,)),
        contribution(Dense(f32(5, -2), (0,)), 2, 1, (0,)),
    ]
    _, step = method.aggregate(State({}), f32(0, 0, 0), 1, contributions)
    assert method.apply(f32(7, 7, 7), 1, step).tolist() == [2, 1, 10]


def test_values_are_read_in_the_order_of_the_assigned_units() -> None:
    method = spry(PLAIN, space_of(2, 1), 0)
    mixed = contribution(Dense(f32(9, 1, 2), (1, 0)), units=(1, 0))
    _, step = method.aggregate(State({}), f32(0, 0, 0), 1, [mixed])
    assert method.apply(f32(0, 0, 0), 1, step).tolist() == [1, 2, 9]


def test_no_moments_before_the_first_step() -> None:
    assert spry(Spry(), space_of(1), 0).init(f32(1)) == (State({}), None)
    assert Moments() == Moments(None, None, 0)


@pytest.mark.parametrize("wire", ["weights", "scalars"])
def test_clients_on_one_model_do_not_get_into_each_others_updates(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TV18: gradients 1, 10 and 100 of three clients on one node sum to 111, not to 244."""
    given_direction(monkeypatch, 1)
    o = having(PLAIN, wire=wire)
    after = all_at_once(spry(o, space_of(1), 0), one_model(1, 10, 100), f32(0))
    assert after.tolist() == [-111 / 3]
