from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedalgos import registry
from fedalgos.fedkseed import FedKSeed, State, fedkseed, tilt
from fedalgos.method import Assignment, Contribution, Method, Work
from fedalgos.space import digest
from protocol import noise, places
from protocol.errors import ExperimentError
from protocol.noise import Doubles
from protocol.payload import Flat, Payload, Run, Scalars, Sparse, spec_of
from tests.oracles import Quadratic, f32, over_the_wire, play, space_of, towards

SEED, D = 5, 16
SPACE = space_of(10, 6)
ONES = np.ones(D, np.float32)
BOWL = Quadratic(np.linspace(-1, 1, D).astype(np.float32), np.eye(D, dtype=np.float32))


def z_of(candidate: int) -> Flat:
    return noise.normals(noise.key("pool", SEED, candidate), 0, D)


def picks_of(round: int, client: int, count: int, k: int) -> list[int]:
    """32 bits of the stream for each step, low lane first, times K, over 2^32."""
    lanes = noise.bits(noise.key("pick", SEED, round, client), 0, 2 * count).tolist()
    return [(lanes[2 * i] + 65536 * lanes[2 * i + 1]) * k >> 32 for i in range(count)]


def made(k: int = 8, steps: int = 1, **more: object) -> Method[State]:
    return fedkseed(FedKSeed(candidates=k, steps=steps, **more), SPACE, SEED)  # type: ignore[arg-type]


def run_of(client: int, *g: float) -> Scalars:
    return Scalars((Run(client, len(g)),), f32(*g))


def dense(step: Payload) -> Flat:
    return step.dense() if isinstance(step, Sparse) else step.values


def counted(method: Method[State], round: int, client: int, count: int) -> list[int]:
    """How often the server takes each candidate to have been picked: lr 1 and all g are 1."""
    c = Contribution(Assignment(client), 1, run_of(client, *[1.0] * count))
    _, step = method.aggregate(method.init(ONES)[0], ONES, round, [c])
    return [int(g) for g in dense(step)]


# --- the local run and the accumulators --------------------------------------------


def test_a_local_run_steps_along_the_picked_candidates_from_the_moved_point() -> None:
    method = made(k=4, steps=9, lr=0.01, eps=0.1)
    sent, loss = method.local(ONES, BOWL, [None] * 9, Work(3, Assignment(2)))
    x, expected, losses = ONES.astype(np.float64), [], []
    for pick in picks_of(3, 2, 9, 4):
        z = z_of(pick).astype(np.float64)
        losses.append(BOWL.value(x, None) + 0.005 * z @ z)
        expected.append(float(z @ BOWL.gradient(x, None)))
        x = x - 0.01 * expected[-1] * z
    assert isinstance(sent, Scalars)
    assert sent.runs == (Run(2, 9),)
    np.testing.assert_allclose(sent.values, expected, rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("k", [1, 4, 4096])
def test_replaying_the_accumulators_gives_the_local_model(k: int) -> None:
    """60 steps on a quadratic; with 1 and 4 candidates most come back."""
    method = made(k=k, steps=60, lr=0.002)
    sent, _ = method.local(ONES, BOWL, [None] * 60, Work(1, Assignment(2)))
    w = ONES
    for g, pick in zip(sent.values, picks_of(1, 2, 60, k), strict=True):
        w = w + (-np.float32(0.002) * g) * z_of(pick)
    c = Contribution(Assignment(2), 480, over_the_wire(sent))
    _, step = method.aggregate(method.init(ONES)[0], ONES, 1, [c])
    rebuilt = method.apply(ONES, 1, over_the_wire(step))
    assert np.abs(rebuilt - w).max() <= 1e-5
    assert np.abs(rebuilt - ONES).max() > 0.04
    assert np.count_nonzero(dense(step)) <= min(k, 60)


def test_two_clients_of_weights_a_quarter_and_three_quarters_by_hand() -> None:
    """One candidate: G = eta (g_1 / 4 + 3 g_2 / 4), x = x_0 - G z."""
    method = made(k=1, lr=0.5)
    got = [
        Contribution(Assignment(0), 10, run_of(0, 2.0)),
        Contribution(Assignment(6), 30, run_of(6, -4.0)),
    ]
    s, step = method.aggregate(method.init(ONES)[0], ONES, 1, got)
    assert dense(step).tolist() == [0.5 * (0.25 * 2 + 0.75 * -4)] == [-1.25]
    assert s.g.tolist() == [-1.25]
    expected = (ONES + np.float32(1.25) * z_of(0)).astype(np.float32)
    assert method.apply(ONES, 1, step).tobytes() == expected.tobytes()


def test_accumulators_add_up_over_the_rounds_and_within_a_run() -> None:
    method = made(k=1, steps=2, lr=0.5)
    s, _ = method.init(ONES)
    sums = []
    for round in (1, 2, 3):
        c = Contribution(Assignment(0), 3, run_of(0, 1.0, 3.0))
        s, step = method.aggregate(s, 7 * ONES, round, [c])  # whatever the parameters are
        sums.append(dense(step).tolist())
    assert sums == [[2], [4], [6]]


def test_everyone_rebuilds_in_the_candidates_order_each_product_and_sum_rounded() -> None:
    x, g = np.linspace(-1, 1, D).astype(np.float32), f32(0.3, 0, -1e3, 7e-5)
    expected = x
    for j in (0, 2, 3):
        expected = expected + -g[j] * z_of(j)
    for step in (Scalars((Run(0, 4),), g), Sparse(4, np.array([0, 2, 3]), g[[0, 2, 3]])):
        assert made(k=4).apply(x, 9, step).tobytes() == expected.tobytes()


def test_untouched_accumulators_leave_the_start_as_it_is() -> None:
    assert made(k=4).apply(ONES, 1, Scalars((Run(0, 4),), f32(0, 0, -0.0, 0))).tolist() == [1] * D


@pytest.mark.parametrize("size", [3, 5, 1 << 40])
def test_accumulators_of_another_pool_are_an_error_and_take_no_memory(size: int) -> None:
    steps: list[Payload] = [Sparse(size, np.array([1]), f32(1))]
    if size < 9:
        steps.append(Scalars((Run(0, size),), f32(*[1] * size)))
    for step in steps:
        with pytest.raises(ValueError, match=f"{size} accumulators for 4 candidates"):
            made(k=4).apply(ONES, 1, step)


GOALS = {0: towards(0 * ONES), 4: towards(-2 * ONES), 9: BOWL}


@pytest.mark.parametrize("pro", [False, True])
@pytest.mark.parametrize("k", [8, 512])  # soon all are touched, or only some for long
def test_a_node_that_missed_all_rounds_but_the_last_rebuilds_from_the_start(
    k: int, pro: bool
) -> None:
    method = made(k=k, steps=5, lr=0.01, pro=pro)
    assert method.onto == "initial"
    rounds = list(
        play(method, GOALS, ONES, 6, examples={0: 1, 4: 7, 9: 3}, batches=lambda c, r: [None] * 5)
    )
    assert isinstance(rounds[-1].step, Scalars if k == 8 else Sparse)
    for r in rounds:
        fresh = made(k=k, steps=5, lr=0.01, pro=pro)
        assert digest(fresh.apply(ONES, r.round, over_the_wire(r.step))) == digest(r.x)
    assert len({digest(r.x) for r in rounds}) == 6


# --- traffic -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 20, 200])
def test_an_update_is_four_bytes_a_step_and_a_step_never_over_four_a_candidate(steps: int) -> None:
    k = 64
    method = made(k=k, steps=steps, lr=1e-4)
    (only,) = play(method, {0: BOWL}, ONES, 1, batches=lambda c, r: [None] * steps)
    sent, _ = method.local(ONES, BOWL, [None] * steps, Work(1, Assignment(0)))
    assert spec_of(sent).nbytes == 4 * steps
    touched = len(set(picks_of(1, 0, steps, k)))
    (where,) = np.nonzero(dense(only.step))
    assert len(where) == touched
    assert spec_of(only.step).nbytes == min(4 * k, 4 * touched + places.nbytes(k, where)[1])


@pytest.mark.parametrize(
    ("k", "touched", "nbytes"),
    [
        (64, 1, 4 + 2),
        (64, 61, 4 * 61 + 9),
        (64, 62, 4 * 64),
        (58, 56, 4 * 58),
        (64, 64, 4 * 64),
        (4096, 4000, 4 * 4000 + 9),
        (4096, 4096, 4 * 4096),
    ],
)
def test_the_step_is_sparse_only_where_that_is_shorter(k: int, touched: int, nbytes: int) -> None:
    """A run takes 9 bytes, or fewer as a bitmap; with 8 of them 56 of 58 are a draw, all go."""
    g = np.zeros(k, np.float32)
    g[:touched] = 1
    method = made(k=k)
    s = State(g, np.zeros(k), np.ones(k, np.int64))
    nothing = Contribution(Assignment(0), 1, run_of(0, 0.0))
    _, step = method.aggregate(s, ONES, 1, [nothing])
    assert isinstance(step, Scalars) == (nbytes == 4 * k)
    assert spec_of(step).nbytes == nbytes
    assert dense(step).tolist() == g.tolist()


# --- picks ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 4096])
def test_the_server_knows_which_candidates_a_client_picked(k: int) -> None:
    for round, client in [(1, 0), (2, 0), (1, 3)]:
        expected = Counter(picks_of(round, client, 50, k))
        got = counted(made(k=k, steps=50, lr=1.0), round, client, 50)
        assert {j: n for j, n in enumerate(got) if n} == expected


def test_picks_do_not_depend_on_how_many_steps_follow() -> None:
    assert picks_of(1, 3, 50, 64)[:9] == picks_of(1, 3, 9, 64)
    few, many = (counted(made(k=64, steps=0, lr=1.0), 1, 3, n) for n in (9, 50))
    assert all(a <= b for a, b in zip(few, many, strict=True))


def chi_square(counts: list[int], p: list[float]) -> float:
    n = sum(counts)
    return sum((c - n * q) ** 2 / (n * q) for c, q in zip(counts, p, strict=True))


def test_picks_are_uniform_over_the_candidates_and_over_what_follows_what() -> None:
    """chi^2 with 9 and with 99 degrees of freedom, 5 deviations above its mean at most."""
    k, steps, rounds = 10, 200, 50
    method = made(k=k, steps=steps, lr=1.0)
    counts = np.sum([counted(method, r, 0, steps) for r in range(rounds)], axis=0).tolist()
    assert chi_square(counts, [1 / k] * k) < 9 + 5 * math.sqrt(18)
    pairs = Counter(
        10 * a + b
        for r in range(rounds)
        for a, b in zip(*[iter(picks_of(r, 0, steps, k))] * 2, strict=True)
    )
    assert chi_square([pairs[i] for i in range(100)], [0.01] * 100) < 99 + 5 * math.sqrt(198)


# --- Pro -----------------------------------------------------------------------------


def test_pro_by_hand() -> None:
    """Histories {0}, {0, 2}, {0, -4}: a = 0, 1, 2."""
    p = tilt(np.array([0.0, 2, 4]), np.array([1, 2, 2]))
    assert p.tolist() == pytest.approx([0.18632372, 0.30719589, 0.50648039], abs=1e-8)


def test_pro_is_uniform_where_nothing_was_seen() -> None:
    assert tilt(np.zeros(5), np.array([1, 2, 1, 9, 1])).tolist() == [0.2] * 5


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, 6, elements=st.floats(0, 1000)),
    hnp.arrays(np.int64, 6, elements=st.integers(1, 1000)),
)
def test_pro_favours_none_over_another_by_more_than_e(
    means: Doubles, counts: npt.NDArray[np.int64]
) -> None:
    p = tilt(means * counts, counts)
    assert p.sum() == pytest.approx(1)
    assert p.max() / p.min() <= math.e * (1 + 1e-12)
    order = np.argsort(means * counts / counts, kind="stable")
    assert (np.diff(p[order]) >= 0).all()


def with_history(*histories: tuple[float, ...]) -> State:
    """Each starts with its 0."""
    sums = np.array([sum(abs(g) for g in h) for h in histories], np.float64)
    counts = np.array([len(h) for h in histories])
    return State(np.zeros(len(histories), np.float32), sums, counts)


def test_pro_picks_follow_the_probabilities() -> None:
    """Means 0, 1, 2 from sums 0, 4, 4; 8,000 picks; chi^2 with 2 degrees of freedom."""
    method = made(k=3, steps=200, pro=True)
    plan = method.plan(with_history((0,), (0, 2, -1, 1), (0, -4)), 4, list(range(40)))
    assert {len(a.picks) for a in plan} == {200}
    assert all(type(pick) is int for a in plan for pick in a.picks)
    counts = Counter(pick for a in plan for pick in a.picks)
    found = [counts[j] for j in range(3)]
    assert chi_square(found, [0.18632372, 0.30719589, 0.50648039]) < 2 + 5 * 2
    assert chi_square(found, [1 / 3] * 3) > 500  # so that another tilt would show


def test_pros_first_picks_are_uniform_and_differ_by_round_and_client() -> None:
    method = made(k=5, steps=400, pro=True)
    s, _ = method.init(ONES)
    plans = [a.picks for r in (1, 2, 3) for a in method.plan(s, r, [0, 6, 7])]
    assert len(set(plans)) == 9
    counts = Counter(pick for picks in plans for pick in picks)
    assert chi_square([counts[j] for j in range(5)], [0.2] * 5) < 4 + 5 * math.sqrt(8)
    assert plans == [a.picks for r in (1, 2, 3) for a in method.plan(s, r, [0, 6, 7])]


def test_pros_picks_travel_in_the_assignment_and_the_uniform_ones_do_not() -> None:
    assert made(k=9, steps=2).plan(with_history(*[(0.0,)] * 9), 1, [3]) == (Assignment(3),)
    method = made(k=9, steps=3, lr=0.5, pro=True)
    assignment = Assignment(3, picks=(8, 0, 8))
    sent, _ = method.local(ONES, Quadratic(ONES), [None] * 3, Work(1, assignment))
    expected = [z_of(8).sum(), z_of(0).sum(), z_of(8).sum()]
    np.testing.assert_allclose(sent.values, expected, rtol=1e-4, atol=1e-3)
    c = Contribution(assignment, 1, run_of(3, 1.0, 10.0, 100.0))
    s, step = method.aggregate(method.init(ONES)[0], ONES, 1, [c])
    assert dense(step).tolist() == [5, 0, 0, 0, 0, 0, 0, 0, 50.5]
    assert s.sums.tolist() == [10, 0, 0, 0, 0, 0, 0, 0, 101]
    assert s.counts.tolist() == [2, 1, 1, 1, 1, 1, 1, 1, 3]


def test_pro_weighs_clipped_sizes_of_all_clients_alike_but_accumulates_them_whole() -> None:
    method = made(k=2, steps=2, lr=1.0, pro=True)
    got = [
        Contribution(Assignment(0, picks=(0, 1)), 1, run_of(0, -4000.0, 3.0)),
        Contribution(Assignment(6, picks=(1, 1)), 3, run_of(6, -5.0, 1.0)),
    ]
    s, step = method.aggregate(with_history((0,), (0, 2)), ONES, 1, got)
    assert s.sums.tolist() == [1000, 2 + 3 + 5 + 1]
    assert s.counts.tolist() == [2, 5]
    assert dense(step).tolist() == [-1000, 0.75 - 3.75 + 0.75]


def test_an_aggregate_leaves_the_state_before_it_alone() -> None:
    method, s = made(k=2), with_history((0,), (0, 2))
    for a in (s.g, s.sums, s.counts):
        a.flags.writeable = False
    after, _ = method.aggregate(s, ONES, 1, [Contribution(Assignment(0), 1, run_of(0, 1.0))])
    assert after.counts.sum() == s.counts.sum() + 1


# --- settings ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 8193])
def test_pro_wants_a_number_of_steps_that_an_assignment_can_hold(steps: int) -> None:
    table = {"name": "fedkseed", "steps": steps}
    registry.settings(table)
    with pytest.raises(ExperimentError, match="pro needs steps from 1 to 8192"):
        registry.settings({**table, "pro": True})
    registry.settings({**table, "pro": True, "steps": 8192})


def test_steps_whose_losses_differ_too_much_are_left_out() -> None:
    """Batches 1, 1000, 1: the middle one moves nothing and sends nothing."""
    method = made(k=4, steps=3, lr=0.01, eps=0.1, skip_above=100.0)
    batches = [0 * ONES, 1000 * ONES, 0 * ONES]
    sent, _ = method.local(ONES, BOWL, batches, Work(1, Assignment(2)))
    first, _, last = (z_of(j).astype(np.float64) for j in picks_of(1, 2, 3, 4))
    g = float(first @ BOWL.gradient(ONES.astype(np.float64), None))
    moved = ONES - 0.01 * g * first
    expected = [g, 0, float(last @ BOWL.gradient(moved, None))]
    np.testing.assert_allclose(sent.values, expected, rtol=1e-4)


def test_one_pass_over_the_data_takes_as_many_steps_as_there_are_batches() -> None:
    method = made(k=4, steps=0)
    sent, _ = method.local(ONES, BOWL, iter([None] * 7), Work(1, Assignment(2)))
    assert len(sent.values) == 7
    assert method.accepts(Assignment(2), sent) is None
    assert made(k=4, steps=6).accepts(Assignment(2), sent) == "another size: 7 scalars, want 6"
