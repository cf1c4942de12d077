"""Robust rules: the papers' formulas by hand, what breaks the mean, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy import checked
from fedalgos import guard, registry, robust
from fedalgos.baffle import Baffle
from fedalgos.decomfl import DeComFL
from fedalgos.fedavg import FedAvg
from fedalgos.fedmezo import FedMezo
from fedalgos.ferret import Ferret
from fedalgos.flasc import Flasc
from fedalgos.method import Assignment, Contribution, Method
from fedalgos.optim import Sgd
from fedalgos.registry import AnySettings
from fedalgos.robust import Clip, Krum, Median, Rule, TrimmedMean
from protocol import experiment as experiments
from protocol.errors import ExperimentError
from protocol.payload import Blocks, Dense, Flat, Payload, Run, Scalars, Sparse
from tests.oracles import f32, space_of

SPACE = space_of(2, 1)
X = f32(10, 20, 30)
PLAIN = {"server": Sgd(lr=1.0), "local": Sgd(lr=0.1)}


def build(o: AnySettings) -> Method[Any]:
    return registry.build(o, SPACE, seed=1)


def sent(*payloads: Payload, examples: int = 1) -> list[Contribution]:
    return [Contribution(Assignment(c), examples, p) for c, p in enumerate(payloads)]


def dense(*rows: tuple[float, ...]) -> list[Contribution]:
    return sent(*(Dense(f32(*row)) for row in rows))


def after(o: AnySettings, got: list[Contribution], x: Flat = X) -> Flat:
    """The parameters that a round of these updates makes."""
    method = build(o)
    state, first = method.init(x)
    if first is not None:
        x = method.apply(x, 0, first)
    return method.apply(x, 1, method.aggregate(state, x, 1, got)[1])


def avg(rule: Rule | None) -> FedAvg:
    return FedAvg(robust=rule, server=Sgd(lr=1.0))


# --- by hand ---------------------------------------------------------------------


def test_median_of_an_odd_and_of_an_even_number_by_coordinate() -> None:
    odd = dense((1, 9, 5), (2, 8, 5), (600, -700, 6))
    np.testing.assert_array_equal(after(avg(Median()), odd), f32(2, 8, 5))
    even = [*odd, *dense((4, 8.5, 7))]
    np.testing.assert_array_equal(after(avg(Median()), even), f32(3, 8.25, 5.5))


def test_trimmed_mean_leaves_out_the_f_largest_and_smallest_of_each_coordinate() -> None:
    got = dense((1, 0, 0), (2, 100, 0), (3, 1, 0), (6, 2, 0), (1000, -9, 0))
    expected = f32((2 + 3 + 6) / 3, 1, 0)
    np.testing.assert_allclose(after(avg(TrimmedMean(byzantine=1)), got), expected, rtol=1e-7)
    np.testing.assert_array_equal(after(avg(TrimmedMean(byzantine=2)), got), f32(3, 1, 0))


def test_krum_takes_the_update_with_the_smallest_sum_of_nearest_distances() -> None:
    # n = 5, f = 1: the n - f - 2 = 2 nearest count.  On a line at 0, 1, 3, 7, 50:
    # 0: 1 + 9 = 10;  1: 1 + 4 = 5;  3: 4 + 9 = 13;  7: 16 + 36 = 52;  50: far
    got = dense(*((v, 0, 0) for v in (3, 50, 1, 7, 0)))
    np.testing.assert_array_equal(after(avg(Krum(byzantine=1)), got), f32(1, 0, 0))
    # Multi-Krum averages the two of smallest score: 1 and 0
    np.testing.assert_array_equal(after(avg(Krum(byzantine=1, keep=2)), got), f32(0.5, 0, 0))


def test_krum_takes_the_first_of_equal_scores() -> None:
    got = dense((1, 0, 0), (0, 1, 0), (0, 0, 1))
    np.testing.assert_array_equal(after(avg(Krum(byzantine=0)), got), f32(1, 0, 0))


def test_clip_shortens_the_change_not_the_parameters() -> None:
    # changes (3, 4, 0), norm 5, to norm 1; and (0, 0, 0.5), short enough
    got = dense((13, 24, 30), (10, 20, 30.5))
    np.testing.assert_allclose(after(avg(Clip(norm=1)), got), f32(10.3, 20.4, 30.25), rtol=1e-6)


def test_clip_without_a_norm_takes_the_median_of_the_round() -> None:
    got = dense((11, 20, 30), (10, 22, 30), (10, 20, 330), (10, 20, 1030))  # 1, 2, 300, 1000
    expected = f32(10 + 1 / 4, 20 + 2 / 4, 30 + 4 / 4)  # the lower median is 2
    np.testing.assert_allclose(after(avg(Clip()), got), expected, rtol=1e-6)


def test_what_is_short_enough_keeps_its_bits() -> None:
    method = build(avg(Clip(norm=1e6)))
    plain = build(avg(None))
    got = dense((0.1, 0.2, 0.3), (0.7, 0.11, 0.13))
    first, second = (m.aggregate(m.init(X)[0], X, 1, got)[1] for m in (method, plain))
    assert first.values.tobytes() == second.values.tobytes()


def test_scalars_along_common_directions_are_ruled_on_one_by_one() -> None:
    def scalars(client: int, *g: float) -> Scalars:
        return Scalars((Run(client, len(g)),), f32(*g))

    got = sent(scalars(0, 1, -1), scalars(1, 2, -3), scalars(2, 1e6, -1e6))
    for o in (
        DeComFL(steps=2, robust=Median()),
        Baffle(perturbations=2, robust=Median()),
    ):
        method = build(o)
        _, step = method.aggregate(method.init(X)[0], X, 1, got)
        np.testing.assert_array_equal(step.values, f32(2, -3))


def test_a_place_that_a_sparse_update_leaves_out_is_a_zero() -> None:
    def change(*places: int) -> Sparse:
        return Sparse(3, np.array(places), f32(*([-2.0] * len(places))))

    o = Flasc(density_down=1.0, density_up=0.4, robust=Median(), **PLAIN)  # type: ignore[arg-type]
    got = sent(change(0, 1), change(0, 2), change(0, 1))
    np.testing.assert_array_equal(after(o, got), X + f32(2, 2, 0))


def test_krum_compares_sparse_updates_and_blocks_as_vectors() -> None:
    def sparse(place: int, value: float) -> Sparse:
        return Sparse(3, np.array([place]), f32(value))

    o = Flasc(density_down=1.0, density_up=0.1, robust=Krum(byzantine=0), **PLAIN)  # type: ignore[arg-type]
    got = sent(sparse(0, 1), sparse(1, 900), sparse(0, 1.5))
    np.testing.assert_array_equal(after(o, got), X - f32(1, 0, 0))

    def blocks(counts: tuple[int, int], *v: float) -> Blocks:
        return Blocks(np.array(counts), f32(*v))

    ferret = build(Ferret(projections=3, robust=Krum(byzantine=0)))
    table = sent(
        blocks((3, 2), 1, 1, 1, 5, 5), blocks((2, 3), 1, 1, 5, 5, 5), blocks((3, 2), *[9] * 5)
    )
    rows, size = guard._table([c.payload for c in table])
    np.testing.assert_array_equal(rows(0, size)[:2], [[1, 1, 1, 5, 5, 0], [1, 1, 0, 5, 5, 5]])
    np.testing.assert_array_equal(rows(2, 5)[0], [1, 5, 5])
    _, step = ferret.aggregate(None, X, 1, table)
    np.testing.assert_array_equal(step.values, [1, 1, 1, 5, 5])


def test_no_rule_counts_the_examples_that_a_client_claims() -> None:
    got = [*dense((1, 1, 1), (2, 2, 2)), *sent(Dense(f32(3, 3, 3)), examples=1 << 39)]
    for rule in (Clip(norm=1e6), TrimmedMean(byzantine=0)):
        np.testing.assert_array_equal(after(avg(rule), got), f32(2, 2, 2), err_msg=str(rule))
    got += dense((50, 50, 50), (-50, -50, -50))
    np.testing.assert_array_equal(after(avg(Krum(byzantine=0, keep=3)), got), f32(2, 2, 2))


def test_personal_rates_still_learn_every_client_s_loss() -> None:
    o = FedMezo(wire="weights", signal="round-wise", robust=Median())
    method = build(o)
    got = [Contribution(Assignment(c), 1, Dense(f32(c, c, c)), loss=float(c)) for c in (0, 4, 7)]
    state, _ = method.aggregate(method.init(X)[0], X, 1, got)
    assert state.losses == {0: (0.0,), 4: (4.0,), 7: (7.0,)}


# --- what they promise -----------------------------------------------------------

HONEST = np.random.default_rng(3).normal(1.0, 0.1, size=(7, 3)).astype(np.float32)
ATTACKS = {
    "huge": np.full((2, 3), 1e6, np.float32),
    "sign flipped and larger": -20 * HONEST[:2],
    "the largest that there is": np.full((2, 3), 3e38, np.float32),
}
RULES: dict[str, Rule] = {
    "median": Median(),
    "trimmed mean": TrimmedMean(byzantine=2),
    "krum": Krum(byzantine=2),
    "multi-krum": Krum(byzantine=2, keep=5),
    "clip": Clip(),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_two_hostile_clients_of_nine_break_the_mean_and_not_the_rule(
    rule: str, attack: str
) -> None:
    x = np.zeros(3, np.float32)
    rows = [*ATTACKS[attack], *HONEST]
    got = [Contribution(Assignment(c), 1, Dense(row)) for c, row in enumerate(rows)]
    goal = HONEST.mean(axis=0)
    spoiled = after(avg(None), got, x).astype(np.float64)
    assert np.linalg.norm(spoiled - goal) > 2.5 * np.linalg.norm(goal)
    kept = after(avg(RULES[rule]), got, x)
    reach = 0.5 if rule == "clip" else 0.25  # clipped ones still pull, as one client can
    assert np.linalg.norm(kept - goal) < reach * np.linalg.norm(goal)


def test_the_check_above_can_fail_one_more_than_the_rule_is_told_breaks_it() -> None:
    rows = [*np.full((3, 3), 1e6, np.float32), *HONEST[:4]]
    got = [Contribution(Assignment(c), 1, Dense(row)) for c, row in enumerate(rows)]
    assert abs(after(avg(TrimmedMean(byzantine=2)), got)).max() > 1e5
    assert abs(after(avg(TrimmedMean(byzantine=3)), got)).max() < 2


rows_of = st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 3), min_size=5, max_size=9)


@pytest.mark.parametrize("rule", RULES)
@given(rows=rows_of)
def test_equal_updates_come_out_as_they_are(rule: str, rows: list[tuple[float, ...]]) -> None:
    got = dense(*[rows[0]] * 9)
    np.testing.assert_array_equal(after(avg(RULES[rule]), got, 0 * X), f32(*rows[0]))


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(byzantine=2)])
@given(rows=rows_of, shift=st.integers(1, 8))
def test_the_order_of_updates_makes_no_difference_and_the_answer_is_within_them(
    rule: Rule, rows: list[tuple[float, ...]], shift: int
) -> None:
    first = after(avg(rule), dense(*rows), 0 * X)
    turned = rows[shift % len(rows) :] + rows[: shift % len(rows)]
    assert first.tobytes() == after(avg(rule), dense(*turned), 0 * X).tobytes()
    table = np.array(rows, np.float32)
    assert (table.min(axis=0) <= first).all()
    assert (first <= table.max(axis=0)).all()


@given(rows=rows_of)
def test_pieces_make_no_difference(rows: list[tuple[float, ...]]) -> None:
    table = np.array(rows, np.float64)

    def piece(start: int, stop: int) -> Any:
        return table[:, start:stop]

    n = len(rows)
    whole = [robust.combine(Median(), piece, n, 3), robust.nearest(Krum(byzantine=1), piece, n, 3)]
    before, robust.PIECE = robust.PIECE, n  # one coordinate at a time
    try:
        np.testing.assert_array_equal(robust.combine(Median(), piece, n, 3), whole[0])
        assert robust.nearest(Krum(byzantine=1), piece, n, 3) == whole[1]
    finally:
        robust.PIECE = before


# --- what they refuse ------------------------------------------------------------

MEDIAN = {"kind": "median"}
KRUM = {"kind": "krum", "byzantine": 1}


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"name": "fedmezo", "robust": MEDIAN}, "directions of its own"),
        ({"name": "fedmezo", "robust": KRUM}, "directions of its own"),
        ({"name": "fedkseed", "robust": KRUM}, "directions of its own"),
        ({"name": "fwdllm", "robust": MEDIAN}, "directions of its own"),
        ({"name": "ferret", "robust": MEDIAN}, 'take "krum" or "clip"'),
        ({"name": "spry", "robust": KRUM}, "few clients"),
        ({"name": "fedavg", "split": True, "robust": MEDIAN}, "few clients"),
        ({"name": "hetlora", "ranks": [1, 2], "robust": MEDIAN}, "different ranks"),
        (
            {
                "name": "flasc",
                "dp": {"clip": 1.0, "noise_multiplier": 1.0},
                "robust": {"kind": "clip"},
            },
            "plain sum",
        ),
        ({"name": "fedavg", "robust": {"kind": "mode"}}, "Invalid value 'mode'"),
        ({"name": "fedavg", "robust": {"kind": "krum"}}, "byzantine"),
    ],
)
def test_a_rule_is_refused_where_it_means_nothing(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ExperimentError, match=why):
        registry.settings(table)


@pytest.mark.parametrize("name", ["fedmezo", "fedkseed", "fwdllm", "ferret", "spry", "fedfgd"])
def test_clipping_is_defined_for_updates_that_cannot_be_compared(name: str) -> None:
    assert registry.settings({"name": name, "robust": {"kind": "clip"}}).robust == Clip()


def experiment(quorum: int, rule: dict[str, Any]) -> experiments.Experiment:
    table = {
        "run": {"name": "test"},
        "model": {"id": "random:x"},
        "data": {"id": "x.csv"},
        "partition": {"clients": 9},
        "rounds": {"count": 1, "quorum": quorum},
        "method": {"name": "fedavg", "robust": rule},
    }
    return experiments.convert(table, "test")


def test_a_quorum_below_what_the_rule_needs_is_refused_before_the_run() -> None:
    rule = {"kind": "krum", "byzantine": 2}  # 2 f + 3
    checked(experiment(7, rule))
    with pytest.raises(ExperimentError, match="needs 7 updates in each round: the quorum is 6"):
        checked(experiment(6, rule))
    checked(experiment(9, rule | {"keep": 5}))  # n - f - 2 = 5
    with pytest.raises(ExperimentError, match="needs 9"):
        checked(experiment(8, rule | {"keep": 5}))
    with pytest.raises(ExperimentError, match="needs 5"):
        checked(experiment(4, {"kind": "trimmed-mean", "byzantine": 2}))


def test_a_round_of_too_few_updates_is_not_committed() -> None:
    with pytest.raises(ArithmeticError, match="needs 5 updates: there are 3"):
        after(avg(Krum(byzantine=1)), dense((1, 1, 1), (1, 1, 1), (2, 2, 2)))
