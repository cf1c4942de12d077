from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from fedalgos.baffle import Baffle, baffle
from fedalgos.method import Assignment, Batch, Method, Vector, Work
from fedalgos.space import digest
from fedalgos.zeroth import Scheme
from protocol import noise
from protocol.payload import Dense, Run, Scalars, spec_of
from tests.oracles import (
    Exact,
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
START = np.linspace(-1, 1, D).astype(np.float32)
EYE = np.eye(D, dtype=np.float32)
each_scheme = pytest.mark.parametrize("scheme", ["central", "forward"])


def made(**o: object) -> Method[None]:
    return baffle(Baffle(**o), SPACE, SEED)  # type: ignore[arg-type]


def z_of(round: int, k: int) -> Exact:
    """Neither client nor step in the key: -1 and 0 are for all."""
    return noise.normals(noise.key("direction", SEED, round, -1, 0, k), 0, D).astype(np.float64)


def sent_by(
    method: Method[None], oracle: Quadratic, batches: list[object], client: int = 2
) -> Scalars:
    sent, _ = method.local(START, oracle, batches, Work(3, Assignment(client)))
    assert isinstance(sent, Scalars)
    assert method.accepts(Assignment(client), sent) is None
    return sent


@each_scheme
def test_a_round_by_hand(scheme: Scheme) -> None:
    """Two clients, f = |x - goal|^2 / 2, K = 3, weights 1 : 3, one step of eta / K along each z."""
    method = made(lr=0.3, eps=0.1, perturbations=3, scheme=scheme)
    goals = {2: -2 * ONES, 5: ONES}
    bias = 0.05 if scheme == "forward" else 0.0
    mean = np.zeros(3)
    for client, weight in [(2, 0.25), (5, 0.75)]:
        slope = START.astype(np.float64) - goals[client]
        mean += [weight * float(z @ slope + bias * z @ z) for z in (z_of(1, k) for k in range(3))]
    expected = START - 0.3 / 3 * sum(g * z_of(1, k) for k, g in enumerate(mean))
    (only,) = play(
        method, {c: towards(g) for c, g in goals.items()}, START, 1, examples={2: 8, 5: 24}
    )
    np.testing.assert_allclose(only.step.values, mean, rtol=1e-4)
    np.testing.assert_allclose(only.x, expected, rtol=1e-4, atol=1e-5)


@each_scheme
def test_several_batches_are_averaged_at_one_point(scheme: Scheme) -> None:
    """Linear in the batch, and x stays: the mean of batches b is the batch mean(b)."""
    method = made(eps=0.1, perturbations=4, scheme=scheme)
    bowl = Quadratic(0 * ONES, EYE)
    batches = [ONES, -3 * ONES, START]
    apart = [sent_by(method, bowl, [b]).values for b in batches]
    together = sent_by(method, bowl, [*batches]).values
    np.testing.assert_allclose(together, np.mean(apart, axis=0), rtol=1e-5)
    at_mean = sent_by(method, bowl, [(START - 2 * ONES) / 3]).values
    np.testing.assert_allclose(together, at_mean, rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_batches_is_taken_in_fp64_and_rounded_once() -> None:
    values = sent_by(made(perturbations=1), Quadratic(0 * ONES), [1e8 * ONES, ONES, -1e8 * ONES])
    assert values.values[0] == pytest.approx(z_of(3, 0).sum() / 3, rel=1e-3)


def test_the_reported_loss_is_the_mean_over_batches() -> None:
    method = made(perturbations=2, scheme="forward")
    _, loss = method.local(ONES, Quadratic(ONES), [0 * ONES, 3 * ONES], Work(1, Assignment(0)))
    assert loss == (16 + 64) / 2


def test_each_of_the_k_scalars_has_its_own_direction_common_to_the_clients() -> None:
    sent = sent_by(made(perturbations=20), Quadratic(ONES), [None])
    np.testing.assert_allclose(
        sent.values, [z_of(3, k).sum() for k in range(20)], rtol=1e-4, atol=1e-3
    )
    other = sent_by(made(perturbations=20), Quadratic(ONES), [None], client=9)
    assert other.values.tobytes() == sent.values.tobytes()
    assert (sent.runs, other.runs) == ((Run(2, 20),), (Run(9, 20),))


def test_a_step_is_the_mean_by_examples_and_its_rate_a_kth() -> None:
    method = made(lr=0.5, perturbations=2)
    one = contribution(Scalars((Run(1, 2),), f32(1, 2)), 1, 1)
    three = contribution(Scalars((Run(9, 2),), f32(3, -2)), 9, 3)
    s, step = method.aggregate(None, START, 1, [one, three])
    assert s is None
    assert isinstance(step, Scalars)
    assert step.runs == (Run(0, 2, 0.25),)
    assert step.values.tolist() == [2.5, -1]
    expected = START - 0.25 * (2.5 * z_of(1, 0) - z_of(1, 1))
    np.testing.assert_allclose(method.apply(START, 1, step), expected, rtol=1e-5, atol=1e-6)
    there = made(lr=77.0, perturbations=2).apply(START, 1, step)
    assert there.tobytes() == method.apply(START, 1, step).tobytes()


def test_with_many_perturbations_a_step_is_one_of_gradient_descent() -> None:
    """E (1/K) sum (z.g) z = g, with a deviation of |g| sqrt((D + 1) / K): 5 of them at most."""
    method = made(lr=1.0, perturbations=4000)
    (only,) = play(method, {0: Quadratic(ONES)}, START, 1)
    error = float(np.linalg.norm(START - only.x - ONES))
    assert error < 5 * (16 * 17 / 4000) ** 0.5
    assert error > 0.01


def test_a_round_is_replayed_to_the_bit_from_its_step() -> None:
    method = made(lr=0.1, perturbations=5)
    x = START
    for r in play(method, {0: towards(ONES), 4: towards(-ONES)}, START, 4, examples={4: 9}):
        x = made(lr=0.1, perturbations=5).apply(x, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)


def test_bytes_both_ways_are_four_a_perturbation_whatever_the_batches() -> None:
    method = made(perturbations=7, steps=0)
    sent = sent_by(method, Quadratic(ONES), [None] * 5)
    _, step = method.aggregate(None, START, 1, [contribution(sent, c) for c in range(9)])
    assert (spec_of(sent).nbytes, spec_of(step).nbytes) == (28, 28)


def test_anything_but_k_scalars_is_not_accepted() -> None:
    accepts = made(perturbations=2, steps=3).accepts
    assert accepts(Assignment(0), Scalars((Run(0, 2),), f32(1, 2))) is None
    assert accepts(Assignment(0), Scalars((Run(0, 6),), f32(*range(6)))) is not None
    assert accepts(Assignment(0), Dense(f32(1, 2))) is not None


@dataclass(frozen=True)
class Along(Quadratic):
    """A loss asked along given directions, in the order of asking."""

    directions: tuple[tuple[float, float], ...] = ()

    def losses(
        self,
        x: Vector,
        directions: Sequence[noise.Direction],
        offsets: Sequence[float],
        batch: Batch,
    ) -> list[tuple[float, ...]]:
        keys = [noise.key("direction", SEED, 1, -1, 0, k) for k in range(len(self.directions))]
        wide = np.asarray(x, np.float64)
        along = [np.array(self.directions[keys.index(z.key)]) for z in directions]
        return [tuple(self.value(wide + s * z, batch) for s in offsets) for z in along]


def test_published_vector_13() -> None:
    """TV13: g = (1, -2), sigma = 1e-4, K = 3.  The published port gives (0.33333, 0.08333)."""
    z = ((1.0, 0.25), (-0.5, 2.0), (0.25, -1.0))
    method = baffle(Baffle(perturbations=3, eps=1e-4, lr=1.0), space_of(2), SEED)
    oracle = Along(f32(1, -2), directions=z)
    sent, _ = method.local(f32(0, 0), oracle, [None], Work(1, Assignment(2)))
    assert sent.values == pytest.approx([0.5, -4.5, 2.25], rel=1e-5)
    _, step = method.aggregate(None, f32(0, 0), 1, [contribution(sent, client=2)])
    assert isinstance(step, Scalars)
    gradient = step.runs[0].scale * step.values @ np.array(z)
    assert gradient == pytest.approx([1.10417, -3.70833], abs=1e-5)
