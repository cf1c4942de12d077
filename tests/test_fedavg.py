from __future__ import annotations

import numpy as np
import pytest

from fedalgos.fedavg import FedAvg, fedavg, wants_dense
from fedalgos.method import Assignment, Mean, Work
from fedalgos.optim import AdamW, Moments, Sgd, Yogi
from protocol.payload import Dense, Run, Scalars
from tests.oracles import Quadratic, contribution, f32, play, space_of, towards

SPACE = space_of(2)
WORK = Work(1, Assignment(0))


def test_parameters_are_averaged_by_examples() -> None:
    """TV8."""
    method = fedavg(FedAvg(), SPACE)
    contributions = [contribution(Dense(f32(1, 2)), 0, 3), contribution(Dense(f32(5, -2)), 1, 1)]
    _, step = method.aggregate(Moments(), f32(7, 7), 1, contributions)
    assert step.values.tolist() == [2, 1]
    assert method.apply(f32(9, 9), 1, step).tolist() == [2, 1]


def test_local_is_a_gradient_step_per_batch_and_reports_the_mean_loss() -> None:
    method = fedavg(FedAvg(local=Sgd(lr=0.5)), SPACE)
    x = f32(1, 2)
    sent, loss = method.local(x, towards(f32(0, 0)), [None] * 3, WORK)
    assert sent.values.tolist() == [0.125, 0.25]
    assert loss == pytest.approx(2.5 * (1 + 1 / 4 + 1 / 16) / 3)
    assert x.tolist() == [1, 2]


def test_each_batch_is_used_in_its_turn() -> None:
    method = fedavg(FedAvg(local=Sgd(lr=1.0, momentum=0.5)), SPACE)
    linear = Quadratic(f32(0, 0))
    sent, _ = method.local(f32(0, 0), linear, [f32(1, 0), f32(0, 1)], WORK)
    assert sent.values.tolist() == [-1.5, -1]  # u = (1, 0), then (.5, 1)


def test_a_round_by_hand() -> None:
    """x = 1; the clients pull to 0 and 4 with lr 1/4; weights 1 and 3."""
    method = fedavg(FedAvg(local=Sgd(lr=0.25)), space_of(1))
    oracles = {0: towards(f32(0)), 1: towards(f32(4))}
    (last,) = play(method, oracles, f32(1), 1, examples={0: 1, 1: 3})
    assert last.x.tolist() == [0.25 * 0.75 + 0.75 * 1.75]


def test_server_momentum_carries_over_rounds() -> None:
    method = fedavg(FedAvg(server=Sgd(lr=1.0, momentum=0.5)), space_of(1))
    s, x = Moments(), f32(0)
    for mean, after in [(1.0, 1.0), (1.0, 1.5), (1.5, 1.75)]:
        s, step = method.aggregate(s, x, 1, [contribution(Dense(f32(mean)))])
        x = method.apply(x, 1, step)
        assert x.tolist() == [after]


def test_the_servers_step_follows_the_pseudo_gradient() -> None:
    method = fedavg(FedAvg(server=Yogi()), space_of(1))
    s, step = method.aggregate(Moments(), f32(1), 1, [contribution(Dense(f32(1.1)))])
    np.testing.assert_allclose(step.values, [1.0090909091], rtol=1e-6)
    assert s.steps == 1


def test_the_mean_is_summed_in_float64() -> None:
    mean = Mean(1)
    for value in (1e8, 1.0, -1e8):
        mean.add(1, f32(value))
    assert mean.value().tolist() == [1 / 3]


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mean of no updates"):
        Mean(2).value()
    with pytest.raises(ValueError, match="mean of no updates"):
        fedavg(FedAvg(), SPACE).aggregate(Moments(), f32(0, 0), 1, [])


def test_local_adamw_is_the_one_asked_for() -> None:
    method = fedavg(FedAvg(local=AdamW(lr=0.01)), space_of(1))
    sent, _ = method.local(f32(1), towards(f32(0)), [None], WORK)
    np.testing.assert_allclose(sent.values, [0.99], rtol=1e-6)


def test_wants_dense_says_why_not() -> None:
    space = space_of(2, 3)
    assert wants_dense(space, (1,), Dense(f32(1, 2, 3), (1,))) is None
    assert wants_dense(space, (), Dense(f32(1, 2, 3, 4, 5))) is None
    assert wants_dense(space, (1,), Dense(f32(1, 2), (1,))) == "another size: 2 values, want 3"
    for other in (Dense(f32(1, 2, 3)), Dense(f32(1, 2), (0,)), Scalars((Run(0, 1),), f32(1))):
        assert wants_dense(space, (1,), other) == "want a dense payload of the assigned units"
