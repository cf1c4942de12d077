from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalgos import registry
from fedalgos.baffle import Baffle, baffle
from fedalgos.fwdllm import MOST, FwdLLM, State, directions, fwdllm, rate
from fedalgos.method import Assignment, Contribution, Method, Work
from fedalgos.pacing import MOST_POOLED, Gauge, Pool
from fedalgos.space import digest
from protocol import noise
from protocol.channel import to_node
from protocol.errors import ExperimentError
from protocol.messages import Task
from protocol.payload import Dense, Flat, Run, Scalars, spec_of
from protocol.wire import MAX_BODY_BYTES
from tests.oracles import Exact, Quadratic, f32, over_the_wire, play, space_of, towards

SEED, D = 5, 16
SPACE = space_of(10, 6)
ONES = np.ones(D, np.float32)
START = np.linspace(-1, 1, D).astype(np.float32)
EYE = np.eye(D, dtype=np.float32)


def made(**o: Any) -> Method[State]:
    return fwdllm(FwdLLM(**o), SPACE, SEED)


def z_of(pick: int, size: int = D) -> Exact:
    return noise.normals(noise.key("proposal", SEED, pick), 0, size).astype(np.float64)


def answers(
    method: Method[State], s: State, values: Mapping[int, Sequence[float]], examples: int = 1
) -> list[Contribution]:
    """What these clients, the whole cohort, would send: the scalars are given."""
    plan = {a.client: a for a in method.plan(s, 1, list(values))}
    return [
        Contribution(plan[c], examples, Scalars((Run(c, len(v)),), f32(*v)))
        for c, v in sorted(values.items())
    ]


# --- what a client does ----------------------------------------------------------------


def sent_by(method: Method[State], oracle: Quadratic, batches: list[Any], *picks: int) -> Scalars:
    asked = Assignment(2, picks=picks)
    sent, _ = method.local(START, oracle, batches, Work(3, asked))
    assert isinstance(sent, Scalars)
    assert method.accepts(asked, sent) is None
    return sent


@pytest.mark.parametrize("estimator", ["central", "jvp"])
def test_a_client_sends_the_derivative_along_each_of_its_picks(estimator: str) -> None:
    """On a quadratic both estimators are exact; picks 7, 9, 10 as protocol.md writes them."""
    slope = START.astype(np.float64) + 2
    sent = sent_by(made(estimator=estimator), towards(-2 * ONES), [None], 3, 7, 2)
    np.testing.assert_allclose(sent.values, [z_of(p) @ slope for p in (7, 9, 10)], rtol=1e-4)
    assert sent.runs == (Run(2, 3),)


@pytest.mark.parametrize("estimator", ["central", "jvp"])
def test_several_batches_are_averaged_at_one_point(estimator: str) -> None:
    method, bowl = made(estimator=estimator), Quadratic(0 * ONES, EYE)
    batches = [ONES, -3 * ONES, START]
    apart = [sent_by(method, bowl, [b], 4, 20).values for b in batches]
    together = sent_by(method, bowl, batches, 4, 20).values
    np.testing.assert_allclose(together, np.mean(apart, axis=0), rtol=1e-4, atol=1e-5)


def test_the_two_points_are_eps_away() -> None:
    class Spy(Quadratic):
        seen: list[float] = []  # noqa: RUF012

        def losses(self, x: Any, z: Any, offsets: Sequence[float], batch: Any) -> Any:
            self.seen.extend(offsets)
            return super().losses(x, z, offsets, batch)

    sent_by(made(), Spy(ONES), [None], 1, 4)
    sent_by(made(eps=0.5), Spy(ONES), [None], 1, 4)
    assert Spy.seen == [0.01, -0.01, 0.5, -0.5]


@pytest.mark.parametrize(
    ("estimator", "loss"), [("jvp", 40.0), ("central", pytest.approx(40.0, rel=1e-5))]
)
def test_the_reported_loss_is_the_mean_over_batches(estimator: str, loss: object) -> None:
    method, work = made(estimator=estimator), Work(1, Assignment(0, picks=(2,)))
    assert method.local(ONES, Quadratic(ONES), [0 * ONES, 3 * ONES], work)[1] == loss


@pytest.mark.parametrize("picks", [(MOST + 1,), (2, 5, -2), (1, -1), (3, 1 << 62)])
def test_impossible_picks_fail_the_task_before_any_work(picks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"directions|picks|limit"):
        made().local(START, Quadratic(ONES), iter([]), Work(1, Assignment(2, picks=picks)))


def test_another_number_of_scalars_is_not_accepted() -> None:
    accepts, asked = made(perturbations=7).accepts, Assignment(2, picks=(2, 50))
    assert accepts(asked, Scalars((Run(2, 2),), f32(1, 2))) is None
    assert accepts(asked, Scalars((Run(2, 7),), f32(*range(7)))) is not None
    assert accepts(asked, Scalars((Run(2, 2, picks=(50,)),), f32(1, 2))) is not None
    assert accepts(asked, Dense(f32(1, 2))) is not None


# --- what the server does --------------------------------------------------------------


def test_a_commit_after_two_attempts_by_hand() -> None:
    """K = 2, clients 8 and 3, then 8 alone: three contributions along picks 0 to 5."""
    method = made(lr=0.6, perturbations=2, threshold=1e-6, max_attempts=2, smoothing=0.25)
    s, _ = method.init(START)
    s, nothing = method.aggregate(s, START, 1, answers(method, s, {8: [3, 4], 3: [1, 2]}, 7))
    assert nothing == Scalars((), nothing.values)
    assert (len(nothing.values), spec_of(nothing).nbytes) == (0, 0)
    assert method.apply(START, 1, over_the_wire(nothing)).tobytes() == START.tobytes()
    assert (s.pool.values.tolist(), s.pool.picks.tolist(), s.next) == (
        [1, 2, 3, 4],
        [0, 1, 2, 3],
        4,
    )
    apart = (z_of(0) + 2 * z_of(1) - 3 * z_of(2) - 4 * z_of(3)) / 2
    assert method.metrics(s) == {
        "variance": pytest.approx((apart**2).mean() / 2, rel=1e-5),
        "smoothed_variance": s.gauge.variance,
        "pooled": 2,
        "commits": 0,
        "last_attempts": 0,
        "last_pooled": 0,
    }
    s, step = method.aggregate(s, START, 2, answers(method, s, {8: [5, 6]}))
    assert isinstance(step, Scalars)
    assert step.runs == (Run(0, 6, 0.6 / 3 / 2),)
    assert step.values.tolist() == [1, 2, 3, 4, 5, 6]
    expected = START - 0.6 / 6 * sum((k + 1) * z_of(k) for k in range(6))
    np.testing.assert_allclose(
        method.apply(START, 2, over_the_wire(step)), expected, rtol=1e-5, atol=1e-6
    )
    assert (len(s.pool), s.attempts, s.next, s.commits, s.last, s.pooled) == (0, 0, 6, 1, 2, 3)
    later = (z_of(0) + 2 * z_of(1)) / 2 - (
        3 * z_of(2) + 4 * z_of(3) + 5 * z_of(4) + 6 * z_of(5)
    ) / 4
    single = [(apart**2).mean() / 2, (later**2).mean() / 2 / 0.75]  # c_2 = 1, c_3 = 3/4
    assert s.gauge.single == pytest.approx(0.25 * single[0] + 0.75 * single[1], rel=1e-5)
    s, _ = method.aggregate(s, START, 3, answers(method, s, {8: [1, 2]}))
    assert s.gauge == Gauge(single=s.gauge.single)  # nothing to measure, nothing forgotten
    s, _ = method.aggregate(s, START, 4, answers(method, s, {8: [3, 4]}))
    third = float(s.gauge.variance or 0)
    assert s.gauge.single == pytest.approx(
        0.25 * (0.25 * single[0] + 0.75 * single[1]) + 0.75 * third, rel=1e-5
    )


@pytest.mark.parametrize("gate", ["compat", "all"])
def test_test_vector_11(gate: str) -> None:
    """s = 0.7, 4 clients, threshold 0.0258: ceil(2 s^2 / (4 x 0.0258)) = 10 attempts.

    Until then the parameters keep every bit; then the step is the mean over all 40.
    """
    size, x = 1 << 15, np.ones(1 << 15, np.float32)
    o = FwdLLM(lr=1.0, gate=gate, threshold=0.0258, max_attempts=0)  # type: ignore[arg-type]
    method = fwdllm(o, space_of(size), SEED)
    s, moved = method.init(x)[0], x
    values = {c: [0.7 * (-1) ** c] for c in range(4)}
    for attempt in range(1, 11):
        assert (s.attempts, len(s.pool)) == (attempt - 1, 4 * (attempt - 1))
        s, step = method.aggregate(s, x, attempt, answers(method, s, values))
        moved = method.apply(x, attempt, step)
        assert (moved.tobytes() == x.tobytes()) == (attempt < 10)
    assert (s.commits, s.last) == (1, 10)
    mean = sum(float(np.float32(values[i % 4][0])) * z_of(i, size) for i in range(40)) / 40
    np.testing.assert_allclose(moved, x - mean, rtol=1e-5, atol=1e-5)


def test_a_lone_client_waits_for_its_second_contribution() -> None:
    method = made(threshold=1e6)
    s, _ = method.init(START)
    s, step = method.aggregate(s, START, 1, answers(method, s, {0: [1]}))
    assert (s.commits, "variance" in method.metrics(s), len(step.values)) == (0, False, 0)
    s, step = method.aggregate(s, START, 2, answers(method, s, {0: [1]}))
    assert (s.commits, len(step.values)) == (1, 2)


def test_attempts_grow_by_clients_or_by_perturbations() -> None:
    for grow, counts in [("clients", [3, 3, 3]), ("perturbations", [3, 6, 9])]:
        method = made(perturbations=3, grow=grow, min_attempts=3, max_attempts=3)
        s, step, asked = method.init(START)[0], None, []
        for r in range(1, 4):
            (a, _) = method.plan(s, r, [0, 1])
            asked.append(len(directions(a)))
            s, step = method.aggregate(
                s, START, r, answers(method, s, {c: [1] * asked[-1] for c in (0, 1)})
            )
        assert asked == counts
        assert isinstance(step, Scalars)
        shares = [run.scale * run.count for run in step.runs]  # the same for each client
        assert shares == pytest.approx([0.01 / len(step.runs)] * len(set(counts)))
        assert (s.attempts, len(directions(method.plan(s, 4, [0])[0]))) == (0, 3)
    most = made(perturbations=MOST, grow="perturbations")
    assert most.plan(State(attempts=5), 6, [0])[0].picks == (MOST,)


def test_without_a_gate_a_round_is_that_of_baffle_along_other_directions() -> None:
    """One client: x - (lr / K) sum g z, whatever its examples; BAFFLE's z come by round."""
    ours = made(lr=0.3, eps=0.1, perturbations=3, gate="none")
    theirs = baffle(Baffle(lr=0.3, eps=0.1, perturbations=3), SPACE, SEED)
    goal = {4: towards(-2 * ONES)}
    rows: list[tuple[Method[Any], list[int]]] = [
        (ours, [noise.key("proposal", SEED, k) for k in range(3)]),
        (theirs, [noise.key("direction", SEED, 1, -1, 0, k) for k in range(3)]),
    ]
    for method, keys in rows:
        (only,) = play(method, goal, START, 1)
        z = [noise.normals(k, 0, D).astype(np.float64) for k in keys]
        expected = START - 0.1 * sum((START + 2.0) @ v * v for v in z)
        np.testing.assert_allclose(only.x, expected, rtol=1e-4, atol=1e-5)


def test_test_vector_17() -> None:
    o = FwdLLM(decay_rounds=3000)
    assert [rate(o, t) for t in (0, 1500, 2999)] == pytest.approx([0.01, 0.005, 3.33e-6], rel=2e-3)
    assert rate(o, 2999) == pytest.approx(0.01 / 3000)
    assert rate(o, 3000) == rate(o, 4000) == 0
    assert rate(FwdLLM(), 10**6) == 0.01
    method = made(decay_rounds=4, gate="none", lr=1.0)
    for round, scale in [(1, 1.0), (2, 0.75), (4, 0.25), (5, 0.0)]:  # round 1 has all of it
        _, step = method.aggregate(State(), START, round, answers(method, State(), {0: [1]}))
        assert isinstance(step, Scalars)
        assert step.runs == (Run(0, 1, scale),)


# --- discriminative sampling -----------------------------------------------------------


def test_candidates_are_ranked_by_the_last_committed_gradient() -> None:
    method = made(perturbations=2, keep=0.25, gate="none")
    s, _ = method.init(START)
    assert [a.picks for a in method.plan(s, 1, [8, 3])] == [(2, 2), (2,)]  # no gradient: no choice
    s, _ = method.aggregate(s, START, 1, answers(method, s, {3: [1, -2], 8: [3, 1]}))
    gradient = (z_of(0) - 2 * z_of(1) + 3 * z_of(2) + z_of(3)) / 4
    assert s.reference is not None
    np.testing.assert_allclose(s.reference, gradient, rtol=1e-4, atol=1e-5)
    assert s.next == 4
    for a, block in zip(method.plan(s, 2, [8, 3]), (range(12, 20), range(4, 12)), strict=True):
        best = sorted(block, key=lambda p: float(z_of(p) @ gradient))[-2:]
        assert directions(a) == sorted(best)
    after, _ = method.aggregate(s, START, 2, answers(method, s, {3: [1, 1], 8: [1, 1]}))
    assert after.next == 20  # the candidates that were left out do not come again
    s, _ = made(gate="none").aggregate(State(), START, 1, answers(method, State(), {0: [1, 1]}))
    assert s.reference is None  # nobody asks for it


def test_a_closed_gate_keeps_the_reference() -> None:
    method = made(keep=0.5, threshold=1e-6)
    s = State(reference=ONES, next=100)
    after, _ = method.aggregate(s, START, 1, answers(method, s, {0: [1], 1: [2]}))
    assert after.reference is ONES


# --- over a run ------------------------------------------------------------------------

plans = st.fixed_dictionaries(
    {
        "perturbations": st.integers(1, 4),
        "keep": st.sampled_from([1.0, 0.3]),
        "grow": st.sampled_from(["clients", "perturbations"]),
        "threshold": st.sampled_from([1e-6, 0.5]),
        "max_attempts": st.integers(1, 4),
    }
)
# of each round: the cohort in the order drawn, and how many of it answer
cohorts = st.lists(
    st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).flatmap(
        lambda c: st.tuples(st.just(c), st.sets(st.sampled_from(c), min_size=1))
    ),
    max_size=8,
)


@given(plans, cohorts)
def test_no_two_contributions_share_a_pick_and_a_replica_needs_the_steps_alone(
    o: dict[str, Any], rounds: list[tuple[list[int], set[int]]]
) -> None:
    method, replica = made(**o), made(lr=9.0)
    s, x = method.init(START)[0], START
    y: Flat = START
    used: list[int] = []
    for r, (cohort, present) in enumerate(rounds, 1):
        plan = method.plan(s, r, cohort)
        assert method.plan(s, r, cohort) == plan
        assert [a.client for a in plan] == cohort
        asked = [p for a in plan for p in directions(a)]
        assert len(set(asked)) == len(asked)
        assert not set(asked) & set(used)
        got = []
        for a in sorted(plan, key=lambda a: a.client):
            if a.client in present:
                sent, _ = method.local(x, towards(ONES), [None], Work(r, a))
                got.append(Contribution(a, 1, over_the_wire(sent)))
                used += directions(a)
        waiting = len(s.pool.picks)
        s, step = method.aggregate(s, x, r, got)
        step = over_the_wire(step)
        assert isinstance(step, Scalars)
        taken = [p for run in step.runs for p in run.numbers()]
        assert taken == (used[len(used) - len(taken) :] if taken else [])
        assert len(taken) in (0, waiting + sum(len(c.payload.values) for c in got))
        x, y = method.apply(x, r, step), replica.apply(y, 99, step)
        assert digest(x) == digest(y)


def test_the_gate_passes_sooner_while_the_gradient_is_small() -> None:
    """On a bowl: far out attempts are needed, close to the goal one is enough."""
    method = made(lr=0.5, perturbations=4, threshold=2.0, max_attempts=0)
    clients = {c: towards(3 * ONES) for c in range(3)}
    last = [r.state.last for r in play(method, clients, -3 * ONES, 400)]
    assert max(last) > 3
    assert last[-1] == 1


def test_a_pool_that_is_not_finite_is_refused_as_a_whole() -> None:
    method = made()
    with (
        pytest.raises(ArithmeticError, match="not finite"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        method.aggregate(State(), START, 1, answers(method, State(), {0: [3e38], 1: [3e38]}))


# --- settings --------------------------------------------------------------------------


def test_the_tensor_of_the_gate_must_exist() -> None:
    made(gate="compat", tensor=1)
    with pytest.raises(ExperimentError, match=r"\[method\] tensor 2 of 2"):
        made(gate="compat", tensor=2)


def test_one_tensor_is_measured_where_one_is_named() -> None:
    values = {0: [1.0], 1: [-2.0]}
    rows: list[tuple[dict[str, Any], slice]] = [
        ({"gate": "compat", "tensor": 1}, slice(10, 16)),
        ({"gate": "compat", "tensor": 0}, slice(0, 10)),
        ({"gate": "all"}, slice(0, 16)),
    ]
    for o, part in rows:
        method = made(**o)
        s, _ = method.aggregate(State(), START, 1, answers(method, State(), values))
        expected = ((z_of(0) + 2 * z_of(1))[part] ** 2).mean() / 2
        assert s.gauge.variance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"keep": 0.0}, {"keep": 1.1}, {"perturbations": MOST + 1}, {"threshold": 0}]
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "fwdllm", **wrong}, FwdLLM)


IDLE: list[tuple[dict[str, Any], str]] = [
    ({"tensor": 1}, 'tensor has no effect with gate = "all"'),
    ({"gate": "compat", "smoothing": 0.4}, 'smoothing has no effect with gate = "compat"'),
    ({"gate": "none", "threshold": 0.2}, 'threshold has no effect with gate = "none"'),
    ({"gate": "none", "max_attempts": 4}, 'max_attempts has no effect with gate = "none"'),
    ({"gate": "none", "grow": "perturbations"}, 'grow has no effect with gate = "none"'),
    ({"estimator": "jvp", "eps": 0.1}, 'eps has no effect with estimator = "jvp"'),
    ({"min_attempts": 3, "max_attempts": 2}, "max_attempts is below min_attempts"),
]


@pytest.mark.parametrize(("table", "why"), IDLE)
def test_settings_without_effect_are_refused_in_one_line(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(why)) as caught:
        registry.settings({"name": "fwdllm", **table})
    assert str(caught.value).startswith("[method] ")
    assert "\n" not in str(caught.value)


def test_settings_at_their_defaults_may_be_written_out() -> None:
    registry.settings({"name": "fwdllm", "gate": "none", "tensor": 0, "threshold": 0.1})
    registry.settings({"name": "fwdllm", "gate": "compat", "tensor": 1, "threshold": 0.2})


# --- how far picks and steps may go ------------------------------------------------------


def test_candidates_do_not_run_out_within_any_run() -> None:
    """At 1 candidate in 1000 kept, 32 bits were used up after 2,000 rounds of 100 clients."""
    s = State(reference=ONES, next=1 << 33)
    method = made(keep=0.5, gate="none", perturbations=2)
    (a, b) = method.plan(s, 5000, [0, 1])
    assert min(directions(a)) >= 1 << 33
    asked = Task(round=5000, attempt=1, client=0, version=4999, picks=a.picks)
    assert to_node.unpack(to_node.pack(asked))[0] == asked
    new, step = method.aggregate(s, START, 5000, answers(method, s, {0: [1, 2], 1: [3, 4]}))
    assert new.next == (1 << 33) + 8
    assert isinstance(over_the_wire(step), Scalars)
    assert method.apply(START, 5000, over_the_wire(step)).tobytes() != START.tobytes()
    assert {*directions(a)}.isdisjoint(directions(b))


def test_an_attempt_that_no_step_can_carry_is_refused_before_any_work() -> None:
    method = made(perturbations=1000)
    clients = MOST_POOLED // 1000
    assert len(method.plan(State(), 1, range(clients))) == clients
    with pytest.raises(ExperimentError, match="perturbations 1000 with a cohort of 132: an") as e:
        method.plan(State(), 1, range(clients + 1))
    assert "\n" not in str(e.value)
    grown = made(perturbations=100, grow="perturbations").plan(State(attempts=9), 10, range(200))
    assert {a.picks[0] for a in grown} == {MOST_POOLED // 200}


def test_the_largest_step_of_scattered_picks_fits_a_message() -> None:
    """A pool just below its end, and one attempt more, one pick in 1000 candidates."""
    rng, n = np.random.default_rng(3), 2 * MOST_POOLED - 1
    chosen = np.arange(n, dtype=np.int64) * 1000 + rng.integers(0, 1000, n) + (1 << 40)
    pool = Pool(chosen, np.ones(n, np.float32), np.ones(n, np.int64))
    spec = msgpack.packb(msgspec.to_builtins(spec_of(Scalars(pool.runs(0.1), pool.values))))
    assert len(spec) < 0.9 * MAX_BODY_BYTES
    consecutive = replace(pool, picks=np.arange(n, dtype=np.int64))
    assert [run.count for run in consecutive.runs(0.1)] == [n]


def test_a_derivative_that_would_spoil_the_pool_is_not_accepted() -> None:
    """It would wait there for the next attempts, whose sums it makes infinite."""
    method = made(gate="all")
    s, _ = method.init(START)
    (a,) = method.plan(s, 1, [4])
    for value, why in [(9e14, None), (-2e15, "a derivative is beyond 1e15")]:
        assert method.accepts(a, Scalars((Run(4, 1),), np.array([value], np.float32))) == why
    worst = np.array([1e15], np.float32)
    for round in range(1, 4):
        (a,) = method.plan(s, round, [4])
        got = [Contribution(a, 1, Scalars((Run(4, 1),), worst))]
        s, step = method.aggregate(s, START, round, got)
        assert np.isfinite(method.apply(START, round, step)).all()


def test_a_step_of_many_small_terms_is_not_rounded_away_beside_the_weights() -> None:
    """One by one, 2,000 terms of 5e-7 are each below half an ulp of 1 and leave it as it is."""
    method, n = made(lr=1.0, gate="none"), 2000
    step = Scalars((Run(0, n, 1e-7),), np.full(n, 5.0, np.float32))
    x = np.ones(D, np.float32)
    want = 1 - 5e-7 * sum(z_of(k) for k in range(n))
    got = method.apply(x, 1, step).astype(np.float64)
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want - 1)
