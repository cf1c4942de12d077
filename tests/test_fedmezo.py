from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pytest

from fedalgos.fedmezo import FedMezo, fedmezo
from fedalgos.method import Assignment, Contribution, Work
from fedalgos.rates import Rates, Signal
from fedalgos.space import digest
from protocol import noise
from protocol.payload import Dense, Flat, Payload, Run, Scalars
from tests.oracles import (
    Exact,
    Quadratic,
    Round,
    contribution,
    f32,
    over_the_wire,
    play,
    scalars_of,
    space_of,
    towards,
)

SEED, D = 5, 16
SPACE = space_of(10, 6)
ONES = np.ones(D, np.float32)


def z_of(round: int, client: int, step: int) -> Flat:
    return noise.normals(noise.key("direction", SEED, round, client, step, 0), 0, D)


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
    _, step = method.aggregate(Rates(), x, 1, [contribution(sent, 3, 7)])
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


@pytest.mark.parametrize("eps", [0.25, 2.0])
def test_the_reported_loss_is_the_mean_over_the_two_points(eps: float) -> None:
    """f = |x|^2 / 2 at 1: (16 + eps^2 |z|^2) / 2."""
    method = fedmezo(FedMezo(eps=eps), SPACE, SEED)
    _, loss = method.local(ONES, towards(0 * ONES), [None], Work(1, Assignment(0)))
    z = z_of(1, 0, 0).astype(np.float64)
    assert loss == pytest.approx((16 + eps**2 * z @ z) / 2, rel=1e-6)


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


def test_a_clients_own_rate_is_the_one_it_steps_with() -> None:
    """f = 1.x + |x|^2 / 2 from 0: g_1 = z_1.(1 - eta_i g_0 z_0)."""
    method = fedmezo(FedMezo(lr=0.5, eps=0.1), SPACE, SEED)
    oracle = Quadratic(ONES, np.eye(D, dtype=np.float32))
    sent, _ = method.local(0 * ONES, oracle, [None] * 2, Work(1, Assignment(0, lr=0.03)))
    z = [z_of(1, 0, h).astype(np.float64) for h in (0, 1)]
    g = z[0] @ ONES
    np.testing.assert_allclose(
        scalars_of(sent), [g, z[1] @ (ONES - 0.03 * g * z[0])], rtol=1e-5, atol=1e-5
    )


EXAMPLES = {0: 1, 4: 5, 9: 10}
ORACLES = {
    0: towards(ONES),
    4: towards(-2 * ONES),
    9: Quadratic(np.linspace(-1, 1, D).astype(np.float32)),
}
START = np.linspace(0, 1, D).astype(np.float32)
each_signal = pytest.mark.parametrize("signal", get_args(Signal))


def federate(
    wire: Literal["scalars", "weights"], signal: Signal = "frozen", rounds: int = 7
) -> list[Round]:
    o = FedMezo(lr=0.02, eps=1e-3, steps=3, wire=wire, signal=signal)
    return list(
        play(
            fedmezo(o, SPACE, SEED),
            ORACLES,
            START,
            rounds,
            examples=EXAMPLES,
            batches=lambda client, round: [None] * 3,
        )
    )


@each_signal
def test_scalars_and_weights_end_every_round_with_the_same_digest(signal: Signal) -> None:
    by_scalars, by_weights = federate("scalars", signal), federate("weights", signal)
    assert [digest(r.x) for r in by_scalars] == [digest(r.x) for r in by_weights]
    assert [r.state for r in by_scalars] == [r.state for r in by_weights]
    assert len({digest(r.x) for r in by_scalars}) == 7
    assert np.abs(by_scalars[-1].x - START).max() > 0.1  # and it leads somewhere


def test_every_signal_leads_elsewhere() -> None:
    assert len({digest(federate("scalars", s)[-1].x) for s in get_args(Signal)}) == 5


@each_signal
def test_a_replica_needs_the_steps_alone_for_the_same_bits(signal: Signal) -> None:
    """Rates and weights travel with the round: other settings on the replica do not matter."""
    replica = fedmezo(FedMezo(lr=123.0, eps=4.0), SPACE, SEED)
    x = START
    for r in federate("scalars", signal):
        x = replica.apply(x, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)


def test_two_rounds_by_hand_in_plain_floats() -> None:
    """Everything in fp64: local runs of own rates, then the mean by examples."""
    first, second, *_ = federate("scalars", "round-wise")
    losses = {c: history[0] for c, history in first.state.losses.items()}
    mean = sum(losses.values()) / 3
    widest = max(abs(q - mean) for q in losses.values())
    rates = {c: 0.02 * (1 + 0.5 * (q - mean) / widest) for c, q in losses.items()}
    x = START.astype(np.float64)
    for round, eta, got in [(1, dict.fromkeys(ORACLES, 0.02), first.x), (2, rates, second.x)]:
        ends = {c: descended(x, round, c, eta[c]) for c in ORACLES}
        x = np.average([ends[c] for c in EXAMPLES], axis=0, weights=[1, 5, 10])
        np.testing.assert_allclose(got, x, atol=1e-5)
    assert max(rates.values()) / min(rates.values()) > 1.5


def descended(x: Exact, round: int, c: int, eta: float) -> Exact:
    for h in range(3):
        z = z_of(round, c, h).astype(np.float64)
        x = x - eta * float(z @ ORACLES[c].gradient(x, None)) * z
    return x


def test_a_step_carries_the_clients_own_runs_with_their_rates_and_examples() -> None:
    method = fedmezo(FedMezo(lr=0.5), SPACE, SEED)
    one = contribution(Scalars((Run(2, 2),), f32(1, 2)), 2, 1)
    three = Contribution(Assignment(7, lr=0.25), 3, Scalars((Run(7, 1),), f32(3)))
    _, step = method.aggregate(Rates(), ONES, 4, [one, three])
    assert isinstance(step, Scalars)
    assert step.runs == (Run(2, 2, 0.5, 1), Run(7, 1, 0.25, 3))
    assert step.values.tolist() == [1, 2, 3]


def test_apply_walks_each_run_from_x_and_ends_at_their_weighted_mean_to_the_bit() -> None:
    method = fedmezo(FedMezo(), SPACE, SEED)
    runs = (Run(2, 2, 0.1, 3), Run(7, 1, 0.3, 4))
    x = f32(*np.linspace(-1, 1, D))
    two, seven = x.copy(), x.copy()
    for g, h in [(1.1, 0), (2.2, 1)]:
        two = two + (-np.float32(0.1) * np.float32(g)) * z_of(4, 2, h)
    seven = seven + (-np.float32(0.3) * np.float32(3.3)) * z_of(4, 7, 0)
    expected = ((3 * two.astype(np.float64) + 4 * seven.astype(np.float64)) / 7).astype(np.float32)
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
        (
            2,
            Scalars((Run(4, 2),), f32(1, 2)),
            "a run of another client, scale or weight, or with picks",
        ),
        (
            2,
            Scalars((Run(3, 2, 0.5),), f32(1, 2)),
            "a run of another client, scale or weight, or with picks",
        ),
        (
            2,
            Scalars((Run(3, 2, 1.0, 9.0),), f32(1, 2)),
            "a run of another client, scale or weight, or with picks",
        ),
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
    assert method.onto == "nothing"
    assert fedmezo(FedMezo(), SPACE, SEED).onto == "previous"
    contributions = [contribution(Dense(ONES), 0, 3), contribution(Dense(5 * ONES), 1, 1)]
    _, step = method.aggregate(Rates(), ONES, 1, contributions)
    assert isinstance(step, Dense)
    assert step.values.tolist() == [2] * D
    assert method.accepts(Assignment(0), Scalars((Run(0, 1),), f32(1))) is not None
