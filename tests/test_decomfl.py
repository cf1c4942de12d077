from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalgos.decomfl import DeComFL, decomfl
from fedalgos.method import Assignment, Method, Work
from fedalgos.registry import settings as decode_settings
from fedalgos.space import digest
from fedalgos.zeroth import Scheme
from protocol import noise
from protocol.errors import ExperimentError
from protocol.payload import Flat, Payload, Run, Scalars, spec_of
from tests.oracles import (
    Exact,
    Quadratic,
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
START = np.linspace(-1, 1, D).astype(np.float32)
EYE = np.eye(D, dtype=np.float32)
each_scheme = pytest.mark.parametrize("scheme", ["central", "forward"])


def made(**o: object) -> Method[None]:
    return decomfl(DeComFL(**o), SPACE, SEED)  # type: ignore[arg-type]


def z_of(round: int, k: int, p: int) -> Exact:
    """No client in the key: -1 is for all."""
    return noise.normals(noise.key("direction", SEED, round, -1, k, p), 0, D).astype(np.float64)


LINEAR = {c: np.random.default_rng(c).normal(size=D).astype(np.float32) for c in (0, 3, 4)}


@each_scheme
def test_with_linear_losses_the_server_descends_the_mean_gradient(scheme: Scheme) -> None:
    """f_i = x_i.w, mu 1e-3, eta 0.1: w <- w - eta (1 / P) sum_p (xbar.z_p) z_p, K times a round."""
    method = made(lr=0.1, eps=1e-3, steps=2, perturbations=3, scheme=scheme)
    oracles = {c: Quadratic(x) for c, x in LINEAR.items()}
    rounds = play(
        method,
        oracles,
        START,
        4,
        examples={0: 1, 3: 90, 4: 9},  # the mean is over clients
        batches=lambda client, round: [None] * 2,
    )
    mean = np.mean([x.astype(np.float64) for x in LINEAR.values()], axis=0)
    w = START.astype(np.float64)
    for r in rounds:
        for k in range(2):
            z = [z_of(r.round, k, p) for p in range(3)]
            w = w - 0.1 / 3 * sum((mean @ d) * d for d in z)
        np.testing.assert_allclose(r.x, w, atol=1e-4)
    assert np.abs(w - START).max() > 0.5


@each_scheme
def test_a_clients_second_step_starts_where_its_first_ended_a_pth_along_each_direction(
    scheme: Scheme,
) -> None:
    """f = 1.x + |x|^2 / 2: all P derivatives at one point, then x <- x - (eta / P) sum g z."""
    method = made(lr=0.06, eps=0.1, steps=3, perturbations=4, scheme=scheme)
    sent, _ = method.local(START, Quadratic(ONES, EYE), [None] * 3, Work(7, Assignment(2)))
    x, expected = START.astype(np.float64), []
    for k in range(3):
        z = [z_of(7, k, p) for p in range(4)]
        bias = 0.05 if scheme == "forward" else 0.0
        g = [float(d @ (ONES + x) + bias * d @ d) for d in z]
        x = x - 0.06 / 4 * sum(a * d for a, d in zip(g, z, strict=True))
        expected += g
    assert isinstance(sent, Scalars)
    assert sent.runs == (Run(2, 12),)
    np.testing.assert_allclose(sent.values, expected, rtol=1e-4, atol=1e-5)


def test_the_server_and_a_lone_client_end_at_the_same_bits() -> None:
    """So what a client saw in its second step is where the server's first step leads."""
    method = made(lr=0.06, steps=2, perturbations=3)
    bowl = Quadratic(ONES, EYE)
    sent, _ = method.local(START, bowl, [None] * 2, Work(1, Assignment(2)))
    _, step = method.aggregate(None, START, 1, [contribution(sent, 2)])
    w = START
    for j, g in enumerate(sent.values):
        z = z_of(1, *divmod(j, 3)).astype(np.float32)
        w = w + (-np.float32(0.06 / 3) * g) * z
    assert method.apply(START, 1, step).tobytes() == w.tobytes()


def test_the_directions_are_common_to_the_clients_and_new_in_every_round_step_and_p() -> None:
    method = made(lr=1e-6, steps=2, perturbations=3)

    def sent(round: int, client: int) -> list[float]:
        work = Work(round, Assignment(client))
        return scalars_of(method.local(START, Quadratic(ONES), [None] * 2, work)[0])

    assert sent(1, 0) == sent(1, 99)
    every = sent(1, 0) + sent(2, 0) + sent(3, 0)
    expected = [z_of(r, k, p).sum() for r in (1, 2, 3) for k in (0, 1) for p in range(3)]
    np.testing.assert_allclose(every, expected, rtol=1e-4, atol=1e-3)
    assert len(set(every)) == 18


def test_a_step_is_the_unweighted_mean_and_the_rate_travels_with_it() -> None:
    method = made(lr=0.5, steps=2, perturbations=2)
    one = contribution(Scalars((Run(1, 4),), f32(1, 2, 3, 4)), 1, 1)
    other = contribution(Scalars((Run(9, 4),), f32(3, 2, 1, -8)), 9, 99)
    s, step = method.aggregate(None, START, 1, [one, other])
    assert s is None
    assert isinstance(step, Scalars)
    assert step.runs == (Run(0, 4, 0.25),)
    assert step.values.tolist() == [2, 2, 2, -2]
    there = made(lr=77.0, steps=2, perturbations=2).apply(START, 1, step)
    assert there.tobytes() == method.apply(START, 1, step).tobytes()


def test_the_mean_is_taken_in_fp64_and_rounded_once() -> None:
    method = made()
    sent = [contribution(Scalars((Run(c, 1),), f32(g)), c) for c, g in enumerate([1e8, 1, -1e8])]
    _, step = method.aggregate(None, START, 1, sent)
    assert scalars_of(step) == [float(np.float32(1 / 3))]


def test_a_step_by_hand() -> None:
    """K = 2, P = 1, lr 0.5, scalars 2 and -3: x - z_0 + 1.5 z_1."""
    method = made(lr=0.5, steps=2)
    step = Scalars((Run(0, 2, 0.5),), f32(2, -3))
    expected = START - z_of(6, 0, 0) + 1.5 * z_of(6, 1, 0)
    np.testing.assert_allclose(method.apply(START, 6, step), expected, rtol=1e-5, atol=1e-6)


def test_bytes_both_ways_are_four_for_each_step_and_perturbation() -> None:
    method = made(steps=5, perturbations=3)
    sent, _ = method.local(START, Quadratic(ONES), [None] * 5, Work(1, Assignment(0)))
    _, step = method.aggregate(None, START, 1, [contribution(sent, c) for c in range(9)])
    assert (spec_of(sent).nbytes, spec_of(step).nbytes) == (60, 60)


def test_more_or_fewer_scalars_are_not_accepted() -> None:
    method = made(steps=5, perturbations=3)
    said = [
        method.accepts(Assignment(0), Scalars((Run(0, n),), f32(*range(n)))) for n in (15, 5, 3)
    ]
    assert said == [None, "another size: 5 scalars, want 15", "another size: 3 scalars, want 15"]


GOALS = {c: towards(f32(*np.roll(np.arange(D), c))) for c in range(4)}
patterns = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8)


@settings(deadline=None)
@given(patterns, st.sampled_from(["central", "forward"]), st.integers(1, 3))
def test_a_client_that_was_away_replays_the_history_to_the_servers_bits(
    present: list[set[int]], scheme: Scheme, perturbations: int
) -> None:
    """Whoever takes part first replays the rounds it missed; at the end all do."""
    method = made(lr=0.02, steps=2, perturbations=perturbations, scheme=scheme)
    history: list[Payload] = []
    clients = dict.fromkeys(GOALS, (START, 0))  # where each is, and the rounds it knows
    server = START

    def caught_up(client: int) -> Flat:
        x, known = clients[client]
        for round, step in enumerate(history[known:], known + 1):
            x = method.apply(x, round, over_the_wire(step))
        clients[client] = (x, len(history))
        return x

    for round, cohort in enumerate(present, 1):
        got = []
        for client in sorted(cohort):
            x = caught_up(client)
            assert digest(x) == digest(server)
            work = Work(round, Assignment(client))
            sent, _ = method.local(x, GOALS[client], [None] * 2, work)
            assert x.tobytes() == server.tobytes()  # the local run is thrown away
            got.append(contribution(over_the_wire(sent), client))
        _, step = method.aggregate(None, server, round, got)
        history.append(step)
        server = method.apply(server, round, over_the_wire(step))
    assert {digest(caught_up(client)) for client in GOALS} == {digest(server)}
    assert digest(server) != digest(START)


def test_a_number_of_steps_must_be_the_same_for_all() -> None:
    with pytest.raises(ExperimentError, match="decomfl needs steps >= 1"):
        decode_settings({"name": "decomfl", "steps": 0})
