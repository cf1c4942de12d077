from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalgos.fedmezo import FedMezo, fedmezo
from fedalgos.method import Contribution
from fedalgos.rates import Rates, Signal, distance, phi, remember
from protocol import noise
from protocol.payload import Dense, Run, Scalars
from tests.oracles import contribution, f32, space_of

SEED = 5
SPACE = space_of(2, 1)
LEARNED: tuple[Signal, ...] = ("round-wise", "five-round", "model-diff")


def rates_of(
    s: Rates, signal: Signal, cohort: list[int], round: int = 7, seed: int = SEED
) -> list[float | None]:
    """eta_0 = 1e-5 and alpha = 5e-6, as in the paper."""
    method = fedmezo(FedMezo(lr=1e-5, spread=0.5, signal=signal), SPACE, seed)
    plan = method.plan(s, round, cohort)
    assert [a.client for a in plan] == cohort
    return [a.lr for a in plan]


def losses(*by_client: float) -> Rates:
    return Rates({c: (loss,) * 5 for c, loss in enumerate(by_client)}, dict(enumerate(by_client)))


@pytest.mark.parametrize("signal", LEARNED)
def test_losses_2_2_5_and_3_give_5e_6_1e_5_and_15e_6(signal: Signal) -> None:
    assert rates_of(losses(2.0, 2.5, 3.0), signal, [0, 1, 2]) == pytest.approx([5e-6, 1e-5, 15e-6])
    assert rates_of(losses(2.0, 2.5, 3.0), signal, [2, 0, 1]) == pytest.approx([15e-6, 5e-6, 1e-5])


def test_the_spread_is_the_largest_part_of_eta_0_that_is_added_or_taken() -> None:
    method = fedmezo(FedMezo(lr=0.8, spread=0.25, signal="round-wise"), SPACE, SEED)
    plan = method.plan(losses(2.0, 2.5, 3.0), 7, [0, 1, 2])
    assert [a.lr for a in plan] == pytest.approx([0.6, 0.8, 1.0])


def test_the_widest_distance_from_the_mean_sets_the_scale_of_a_lopsided_cohort() -> None:
    """q = 0, 0, 0, 4, mean 1, widest 3: Phi = -1/3 and 1."""
    found = phi(losses(0, 0, 0, 4), "round-wise", SEED, 1, [0, 1, 2, 3])
    assert list(found.values()) == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1])


def test_close_losses_are_told_apart() -> None:
    """In half precision these are all 2.0."""
    got = rates_of(losses(2.0001, 2.0004, 2.0009), "round-wise", [0, 1, 2])
    assert got == pytest.approx([1e-5 - 5e-6 * 11 / 13, 1e-5 - 5e-6 * 2 / 13, 15e-6])


@pytest.mark.parametrize("signal", LEARNED)
@pytest.mark.parametrize("cohort", [[0], [0, 1, 2]])
def test_a_tie_gives_eta_0_exactly(signal: Signal, cohort: list[int]) -> None:
    assert rates_of(losses(2.7, 2.7, 2.7), signal, cohort) == [1e-5] * len(cohort)


@pytest.mark.parametrize("signal", LEARNED)
def test_before_any_signal_all_have_eta_0(signal: Signal) -> None:
    assert rates_of(Rates(), signal, [3, 1]) == [1e-5] * 2


@pytest.mark.parametrize("signal", LEARNED)
def test_a_newcomer_has_eta_0_and_does_not_move_the_others(signal: Signal) -> None:
    with_newcomer = rates_of(losses(2.0, 2.5, 3.0), signal, [0, 77, 1, 2])
    assert with_newcomer[1] == 1e-5
    assert [*with_newcomer[:1], *with_newcomer[2:]] == rates_of(
        losses(2.0, 2.5, 3.0), signal, [0, 1, 2]
    )


def test_only_the_cohort_counts() -> None:
    assert rates_of(losses(2.0, 2.5, 3.0, 1e9), "round-wise", [0, 2]) == pytest.approx(
        [5e-6, 15e-6]
    )


def test_round_wise_looks_at_the_last_loss_and_five_round_at_the_mean_of_five() -> None:
    s = Rates({0: (9, 9, 9, 9, 0), 1: (5, 5, 5, 5, 5)})
    assert rates_of(s, "round-wise", [0, 1]) == pytest.approx([5e-6, 15e-6])
    assert rates_of(s, "five-round", [0, 1]) == pytest.approx([15e-6, 5e-6])  # 7.2 and 5


def test_five_round_needs_five_rounds_of_a_client() -> None:
    s, seen = Rates(), []
    for round in range(1, 8):
        seen.append(rates_of(s, "five-round", [0, 1], round))
        s = remember(s, {0: 1.0, 1: 2.0}, {})
    assert seen[:5] == [[1e-5, 1e-5]] * 5
    assert seen[5:] == [pytest.approx([5e-6, 15e-6])] * 2


def test_the_state_keeps_five_losses_of_each_and_those_who_were_absent() -> None:
    s = Rates({4: (1.0,)}, {4: 0.5})
    for round in range(600):
        s = remember(s, {0: float(round)}, {0: float(-round)})
    assert s.losses == {4: (1.0,), 0: (595, 596, 597, 598, 599)}
    assert s.diffs == {4: 0.5, 0: -599}


def test_remembering_changes_nothing_in_place() -> None:
    before = Rates({0: (1.0, 2.0)}, {0: 3.0})
    after = remember(before, {0: 5.0, 1: 6.0}, {1: 7.0})
    assert before == Rates({0: (1.0, 2.0)}, {0: 3.0})
    assert after == Rates({0: (1.0, 2.0, 5.0), 1: (6.0,)}, {0: 3.0, 1: 7.0})


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 99), st.floats(-1e6, 1e6), max_size=12),
    st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True),
    st.integers(1, 10**6),
    st.sampled_from(get_args(Signal)),
)
def test_any_number_of_clients_in_any_round_stays_within_the_spread_and_in_order(
    q: dict[int, float], cohort: list[int], round: int, signal: Signal
) -> None:
    s = Rates({c: (value,) * 5 for c, value in q.items()}, q)
    found = phi(s, signal, SEED, round, cohort)
    assert list(found) == cohort
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in found.values())
    known = sorted((c for c in cohort if c in q), key=lambda c: s.losses[c][0])
    if signal in LEARNED:  # a larger signal never has the smaller rate
        ordered = [found[c] for c in known]
        assert ordered == sorted(ordered)


def test_random_rates_fill_their_range_and_repeat() -> None:
    cohort = list(range(400))
    got = np.array(rates_of(losses(2, 3), "random", cohort), np.float64)
    assert (got >= 5e-6).all()
    assert (got <= 15e-6).all()
    assert got.min() < 5.2e-6
    assert got.max() > 14.8e-6
    standard_error = 1e-5 / math.sqrt(12 * 400)
    assert abs(got.mean() - 1e-5) < 5 * standard_error
    assert got.tolist() == rates_of(Rates(), "random", cohort)  # of no state
    assert rates_of(Rates(), "random", [7, 3]) == [got[7], got[3]]  # nor of the company


def test_random_rates_by_hand_from_seed_round_and_client() -> None:
    u = float(noise.uniforms(noise.key("rate", 8, 3, 2), 0, 1)[0])
    assert rates_of(Rates(), "random", [2], 3, seed=8) == [pytest.approx(1e-5 + 5e-6 * u)]
    others = [(2, 4, 8), (1, 3, 8), (2, 3, 9)]
    assert all(rates_of(Rates(), "random", [c], r, seed=s)[0] != u for c, r, s in others)
    assert len({rates_of(Rates(), "random", [c], r, seed=s)[0] for c, r, s in others}) == 3


def test_frozen_rates_are_not_even_sent() -> None:
    assert rates_of(losses(2, 3), "frozen", [0, 1]) == [None, None]


def test_the_distance_is_a_sum_of_norms_by_tensor_not_one_norm() -> None:
    """|(3, 4)| + |-2| = 7, where one norm would be the root of 29."""
    assert distance(SPACE, f32(4, 6, -2), f32(1, 2, 0)) == 7
    assert distance(SPACE, f32(1, 2, 3), f32(1, 2, 3)) == 0


def three() -> list[Contribution]:
    """Their weighted mean is zero, and so are the weights of client 2."""
    far = [f32(3, 4, 2), f32(-3, -4, -2), f32(0, 0, 0)]
    return [
        contribution(Dense(w), c, n) for c, (w, n) in enumerate(zip(far, (1, 1, 2), strict=True))
    ]


def test_model_diff_by_hand_on_two_tensors() -> None:
    """q = 7, 7, 0, mean 14/3: Phi = 1/2, 1/2, -1."""
    method = fedmezo(FedMezo(lr=1e-5, wire="weights", signal="model-diff"), SPACE, SEED)
    s, step = method.aggregate(Rates(), f32(9, 9, 9), 1, three())
    assert step.values.tolist() == [0, 0, 0]
    assert s.diffs == {0: 7, 1: 7, 2: 0}
    assert [a.lr for a in method.plan(s, 2, [0, 1, 2])] == pytest.approx([12.5e-6, 12.5e-6, 5e-6])


def test_model_diff_from_scalars_by_hand() -> None:
    """Client 1 sends no change: q are |x - eta g z - mean| by tensor, the mean being half way."""
    method = fedmezo(FedMezo(lr=0.5, signal="model-diff"), SPACE, SEED)
    z = noise.normals(noise.key("direction", SEED, 4, 0, 0, 0), 0, 3).astype(np.float64)
    moved = contribution(Scalars((Run(0, 1),), f32(3)), 0, 1)
    still = contribution(Scalars((Run(1, 1),), f32(0)), 1, 1)
    s, _ = method.aggregate(Rates(), f32(9, 9, 9), 4, [moved, still])
    expected = 0.5 * 0.5 * 3 * (math.hypot(z[0], z[1]) + abs(z[2]))
    assert s.diffs == {0: pytest.approx(expected, rel=1e-5), 1: pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("wire", ["scalars", "weights"])
@pytest.mark.parametrize("signal", ["round-wise", "model-diff"])
def test_aggregate_remembers_each_clients_loss(wire: str, signal: Signal) -> None:
    o = FedMezo(wire=wire, signal=signal, steps=1)  # type: ignore[arg-type]
    sent = {
        c: Scalars((Run(c, 1),), f32(c)) if wire == "scalars" else Dense(f32(c, c, c))
        for c in (2, 6)
    }
    got = [Contribution(contribution(v, c).assignment, 1, v, 0.25 * c) for c, v in sent.items()]
    s, _ = fedmezo(o, SPACE, SEED).aggregate(Rates({6: (9.0,)}), f32(0, 0, 0), 1, got)
    assert s.losses == {2: (0.5,), 6: (9.0, 1.5)}
    assert set(s.diffs) == ({2, 6} if signal == "model-diff" else set())
