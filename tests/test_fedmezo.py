from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from fedalgos.fedmezo import FedMezo, fedmezo
from fedalgos.method import Assignment, Method, Work
from fedalgos.space import digest
from protocol import noise
from protocol.payload import Dense, Flat, Payload, Run, Scalars
from tests.oracles import (
    Quadratic,
    contribution,
    f32,
    over_the_wire,
    play,
    space_of,
    towards,
)

SEED, D = 5, 16
SPACE = space_of(10, 6)
ONES = np.ones(D, np.float32)


def z_of(round: int, client: int, step: int) -> Flat:
    return noise.normals(noise.key("direction", SEED, round, client, step, 0), 0, D)


def scalars_of(payload: Payload) -> list[float]:
    assert isinstance(payload, Scalars)
    values: list[float] = payload.values.tolist()
    return values


@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_a_linear_loss_gives_c_dot_z_for_any_eps(eps: float) -> None:
    """Vector 2, with our own stream: f = c.x, one step with lr 0.1 from 0."""
    method = fedmezo(FedMezo(lr=0.1, eps=eps), SPACE, SEED)
    x, z = np.zeros(D, np.float32), z_of(1, 3, 0)
    work = Work(1, Assignment(3))
    sent, loss = method.local(x, Quadratic(ONES), [None], work)
    g = float(ONES @ z.astype(np.float64))
    assert scalars_of(sent) == [pytest.approx(g, rel=1e-6)]
    assert loss == pytest.approx(0, abs=1e-6)
    _, step = method.aggregate(None, x, 1, [contribution(sent, 3, 7)])
    np.testing.assert_allclose(method.apply(x, 1, step), -0.1 * g * z, rtol=1e-5)
    assert not x.any()


def test_the_central_difference_of_a_quadratic_has_no_bias() -> None:
    """Vector 3: g = z.(c + A x), where a forward difference would add (eps/2) z'Az."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(D, D))
    a, x = (root @ root.T / D).astype(np.float32), rng.normal(size=D).astype(np.float32)
    method = fedmezo(FedMezo(eps=0.5), SPACE, SEED)
    sent, _ = method.local(x, Quadratic(ONES, a), [None], Work(1, Assignment(0)))
    z = z_of(1, 0, 0).astype(np.float64)
    assert scalars_of(sent) == [pytest.approx(float(z @ (ONES + a @ x)), rel=1e-5)]
    assert 0.25 * z @ a @ z > 1  # so a one-sided difference would be far off


def test_every_step_of_every_client_and_round_has_its_own_direction_from_the_moved_point() -> None:
    c = np.arange(D, dtype=np.float32)
    method = fedmezo(FedMezo(lr=0.01, eps=0.1), SPACE, SEED)
    oracle = Quadratic(c, np.eye(D, dtype=np.float32))
    for round, client in [(1, 0), (2, 0), (1, 1)]:
        sent, _ = method.local(ONES, oracle, [None] * 3, Work(round, Assignment(client)))
        x, expected = ONES.astype(np.float64), []
        for h in range(3):
            z = z_of(round, client, h)
            expected.append(float(z @ (c + x)))
            x = x - 0.01 * expected[-1] * z
        np.testing.assert_allclose(scalars_of(sent), expected, rtol=1e-5)


def test_each_batch_is_used_in_its_turn_and_the_loss_is_their_mean() -> None:
    method = fedmezo(FedMezo(lr=1e-6), SPACE, SEED)
    batches = [ONES, -2 * ONES]
    sent, loss = method.local(ONES, Quadratic(0 * ONES), batches, Work(1, Assignment(0)))
    expected = [z_of(1, 0, 0).sum(), -2 * z_of(1, 0, 1).sum()]
    np.testing.assert_allclose(scalars_of(sent), expected, rtol=1e-4)
    assert loss == pytest.approx((16 - 32) / 2, rel=1e-3)


EXAMPLES = {0: 1, 4: 5, 9: 10}
ORACLES = {
    0: towards(ONES),
    4: towards(-2 * ONES),
    9: Quadratic(np.linspace(-1, 1, D).astype(np.float32)),
}


def federate(wire: Literal["scalars", "weights"], rounds: int = 5) -> list[Flat]:
    method = fedmezo(FedMezo(lr=0.02, eps=1e-3, steps=3, wire=wire), SPACE, SEED)
    start = np.linspace(0, 1, D).astype(np.float32)
    rounds_ = play(
        method, ORACLES, start, rounds, examples=EXAMPLES, batches=lambda client, round: [None] * 3
    )
    return [r.x for r in rounds_]


def test_scalars_and_weights_follow_the_same_trajectory() -> None:
    by_scalars, by_weights = federate("scalars"), federate("weights")
    for left, right in zip(by_scalars, by_weights, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    start = np.linspace(0, 1, D)
    assert np.abs(by_scalars[-1] - start).max() > 0.1  # and it leads somewhere


def test_a_replica_that_applies_the_steps_equals_the_coordinator_to_the_bit() -> None:
    method = fedmezo(FedMezo(lr=0.02), SPACE, SEED)
    rounds = list(play(method, ORACLES, ONES, 4, examples=EXAMPLES))
    replica = fedmezo(FedMezo(lr=0.02), SPACE, SEED)
    x = ONES
    for r in rounds:
        x = replica.apply(x, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)


def test_a_step_is_the_clients_runs_scaled_by_rate_and_weight() -> None:
    method = fedmezo(FedMezo(lr=0.5), SPACE, SEED)
    one = contribution(Scalars((Run(2, 2),), f32(1, 2)), 2, 1)
    three = contribution(Scalars((Run(7, 1),), f32(3)), 7, 3)
    _, step = method.aggregate(None, ONES, 4, [one, three])
    assert isinstance(step, Scalars)
    assert step.runs == (Run(2, 2, 0.125), Run(7, 1, 0.375))
    assert step.values.tolist() == [1, 2, 3]


def test_apply_is_one_fp32_product_and_sum_after_the_other_in_wire_order() -> None:
    method: Method[None] = fedmezo(FedMezo(), SPACE, SEED)
    runs = (Run(2, 2, 0.1), Run(7, 1, 0.3))
    x = f32(*np.linspace(-1, 1, D))
    expected = x.copy()
    for scale, g, z in [
        (0.1, 1.1, z_of(4, 2, 0)),
        (0.1, 2.2, z_of(4, 2, 1)),
        (0.3, 3.3, z_of(4, 7, 0)),
    ]:
        expected = expected + (-np.float32(scale) * np.float32(g)) * z
    got = method.apply(x, 4, Scalars(runs, f32(1.1, 2.2, 3.3)))
    assert got.tobytes() == expected.tobytes()


def test_the_rounds_number_is_part_of_the_direction() -> None:
    method = fedmezo(FedMezo(), SPACE, SEED)
    step = Scalars((Run(0, 1),), f32(1))
    assert digest(method.apply(ONES, 1, step)) != digest(method.apply(ONES, 2, step))


@pytest.mark.parametrize(
    ("steps", "payload", "why"),
    [
        (2, Scalars((Run(3, 2),), f32(1, 2)), None),
        (0, Scalars((Run(3, 9),), f32(*range(9))), None),  # one pass: as many as there were
        (2, Scalars((Run(3, 1),), f32(1)), "another size: 1 scalars, want 2"),
        (2, Scalars((Run(4, 2),), f32(1, 2)), "a run of another client or scale"),
        (2, Scalars((Run(3, 2, 0.5),), f32(1, 2)), "a run of another client or scale"),
        (2, Scalars((Run(3, 1), Run(3, 1)), f32(1, 2)), "want one run of scalars"),
        (2, Scalars((), f32()), "want one run of scalars"),
        (2, Dense(ONES), "want one run of scalars"),
    ],
)
def test_accepts(steps: int, payload: Payload, why: str | None) -> None:
    method = fedmezo(FedMezo(steps=steps), SPACE, SEED)
    assert method.accepts(Assignment(3), payload) == why


def test_with_weights_a_step_is_absolute_and_dense() -> None:
    method = fedmezo(FedMezo(wire="weights"), SPACE, SEED)
    assert method.absolute
    assert not fedmezo(FedMezo(), SPACE, SEED).absolute
    contributions = [contribution(Dense(ONES), 0, 3), contribution(Dense(5 * ONES), 1, 1)]
    _, step = method.aggregate(None, ONES, 1, contributions)
    assert isinstance(step, Dense)
    assert step.values.tolist() == [2] * D
    assert method.accepts(Assignment(0), Scalars((Run(0, 1),), f32(1))) is not None
