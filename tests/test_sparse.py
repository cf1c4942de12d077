"""Vector 9 of the FLASC family, and what sets its members apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from fedalgos.ffalora import FfaLora
from fedalgos.flasc import Flasc
from fedalgos.hetlora import HetLora, product_norm
from fedalgos.method import Assignment, Contribution, Memory, Method, Work
from fedalgos.optim import Adam, AdamW, Sgd
from fedalgos.privacy import Dp, epsilon, gaussian, noised
from fedalgos.pruned import AdapterLth, FedSelect, SparseAdapter
from fedalgos.registry import AnySettings, build, settings
from fedalgos.space import ParamSpace, digest
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Dense, Flat, Sparse
from tests.oracles import (
    Quadratic,
    Round,
    f32,
    over_the_wire,
    play,
    space_of,
    towards,
)

# vector 9: two clients with constant gradients, client lr .1, one step, server SGD lr 1
W = f32(4, -3, 2, -1, 0.5, -0.25, 0.125, -0.0625)
G1 = np.arange(1, 9, dtype=np.float32)
G2 = (-1.5 * G1[::-1]).astype(np.float32)
SPACE = space_of(3, 5)
CLIENTS = {0: Quadratic(G1), 1: Quadratic(G2)}
PLAIN: dict[str, Any] = {"local": Sgd(lr=0.1), "server": Sgd(lr=1.0)}
DENSE = [4.55, -2.575, 2.3, -0.825, 0.55, -0.325, -0.075, -0.3875]
REST = W[4:].tolist()
SECRET = bytes(range(32))
PAIR = ParamSpace.of(  # A (2, 1), B (2, 2), head (2,)
    [
        TensorInfo("p.lora_A.weight", (2, 1), "p"),
        TensorInfo("p.lora_B.weight", (2, 2), "p"),
        TensorInfo("head", (2,), "head"),
    ]
)


def rounds(
    o: AnySettings,
    count: int = 1,
    space: ParamSpace = SPACE,
    clients: Mapping[int, Any] = CLIENTS,
    start: Flat = W,
) -> list[Round]:
    return list(play(build(o, space, 0, SECRET), clients, start, count, examples={0: 1, 1: 99}))


def near(x: Flat, want: Any) -> None:
    np.testing.assert_allclose(x, want, atol=1e-6)


# --- vector 9 --------------------------------------------------------------------


@pytest.mark.parametrize(
    "o",
    [
        Flasc(density_down=1.0, density_up=1.0, **PLAIN),
        Flasc(tiers=(1.0,), **PLAIN),
        SparseAdapter(density=0.5, **PLAIN),  # round 1 is dense
        AdapterLth(density=1.0, **PLAIN),
        FedSelect(density=1.0, **PLAIN),
    ],
    ids=lambda o: o.__struct_config__.tag,
)
def test_dense_by_hand(o: AnySettings) -> None:
    near(rounds(o)[-1].state.weights, DENSE)


def test_a_half_trained_alone_by_hand() -> None:
    """Vector 9, frozen: the first four as dense, the rest unchanged."""
    for o in (FedSelect(density=0.5, **PLAIN), AdapterLth(density=0.5, decay=1.0, **PLAIN)):
        published, first = rounds(o)
        assert published.x.tolist() == [4, -3, 2, -1, 0, 0, 0, 0]
        near(first.state.weights, [*DENSE[:4], *REST])


def test_sparse_adapter_keeps_its_mask_after_one_dense_round_by_hand() -> None:
    """Constant gradients: each round adds the same to what is trained."""
    o = SparseAdapter(density=0.5, **PLAIN)
    published, first, second, third = rounds(o, 3)
    assert published.x.tolist() == W.tolist()
    near(first.x, [*DENSE[:4], 0, 0, 0, 0])
    step = np.array(DENSE) - W
    near(second.state.weights, [*(W + 2 * step)[:4], *DENSE[4:]])
    near(third.x, [*(W + 3 * step)[:4], 0, 0, 0, 0])
    assert [len(r.step.values) for r in (published, first, second, third)] == [8, 4, 4, 4]


def test_sparse_adapter_holds_what_it_pruned_against_momentum_and_decay() -> None:
    for server in (Adam(lr=0.1), AdamW(lr=0.1, weight_decay=0.1), Sgd(lr=1.0, momentum=0.9)):
        o = SparseAdapter(density=0.5, local=Sgd(lr=0.1), server=server)
        _, first, second = rounds(o, 2)
        pruned = np.setdiff1d(np.arange(8), first.step.places)  # type: ignore[union-attr]
        np.testing.assert_array_equal(second.state.weights[pruned], first.state.weights[pruned])
        assert (second.x[pruned] == 0).all()


def test_pruned_entries_of_the_server_move_on_and_can_return() -> None:
    """Adapter-LTH and Federated Select: momentum from when they were trained."""
    o = AdapterLth(density=1.0, decay=0.5, every=1, local=Sgd(lr=0.1), server=Adam(lr=0.1))
    _, first, second = rounds(o, 2)
    gone = np.flatnonzero(first.x == 0)
    assert len(gone) == 4
    assert (second.state.weights[gone] != first.state.weights[gone]).all()


def test_adapter_lth_shares_less_every_few_rounds() -> None:
    o = AdapterLth(density=1.0, decay=0.5, every=2, **PLAIN)
    assert [len(r.step.values) for r in rounds(o, 5)] == [8, 8, 4, 4, 2, 2]


def test_ffa_lora_by_hand_moves_and_sends_all_but_a() -> None:
    frozen = ParamSpace.of(
        [TensorInfo("p.lora_A.weight", (3, 1), "p"), TensorInfo("p.lora_B.weight", (1, 5), "p")]
    )
    o = FfaLora(local=AdamW(lr=0.1, weight_decay=0.5), server=Sgd(lr=1.0))
    method = build(o, frozen, 0)
    sent, _ = method.local(W, CLIENTS[0], [None], Work(1, Assignment(0)))
    np.testing.assert_allclose(sent.values, W[3:] * 0.05 + 0.1, rtol=1e-5)
    assert len(sent.values) == 5
    (first,) = rounds(FfaLora(**PLAIN), space=frozen)
    near(first.x, [*W[:3], *DENSE[3:]])
    assert first.x[:3].tobytes() == W[:3].tobytes()
    assert len(first.step.values) == 5
    with pytest.raises(ValueError, match="8 values, want 5"):
        method.apply(W, 1, Dense(W))


def test_adamw_by_hand() -> None:
    """W (1 - 1e-5) - 1e-3 sign(aggregate), everywhere but where the method freezes."""
    server = AdamW(lr=1e-3, weight_decay=0.01)
    sign = np.sign(W - np.array(DENSE))
    expected = W * (1 - 1e-5) - 1e-3 * sign
    got = rounds(FedSelect(density=0.5, local=Sgd(lr=0.1), server=server))[-1].state.weights
    np.testing.assert_allclose(got[:4], expected[:4], atol=1e-7)
    np.testing.assert_allclose(got[4:], W[4:] * (1 - 1e-5), atol=1e-7)  # nobody sent these


def test_clipping_by_hand_and_no_division_by_the_clip() -> None:
    """Vector 9; half the clip is half the step, where the published code divides it away."""
    want = np.array([4.245, -2.825, 2.105, -0.965, 0.465, -0.355, -0.05, -0.3075])
    for clip in (1.0, 0.5):
        o = Flasc(density_down=1.0, density_up=1.0, dp=Dp(clip=clip, noise_multiplier=0.0), **PLAIN)
        got = rounds(o)[-1].state.weights
        np.testing.assert_allclose(got, W + clip * (want - W), atol=6e-4)


# --- density 1 is dense LoRA -----------------------------------------------------


def test_density_one_is_the_same_for_all_of_them_to_the_bit() -> None:
    """And test_flasc.py has FLASC's equal to a dense method written out."""
    same: dict[str, Any] = {"local": Sgd(lr=0.1, momentum=0.9), "server": Adam()}
    clients = {0: towards(G1), 1: towards(-W)}
    methods: list[AnySettings] = [
        Flasc(density_down=1.0, density_up=1.0, **same),
        Flasc(tiers=(1.0,), **same),
        SparseAdapter(density=1.0, **same),
        AdapterLth(density=1.0, decay=1.0, **same),
        FedSelect(density=1.0, **same),
    ]
    first, *others = (digest(rounds(o, 4, clients=clients)[-1].x) for o in methods)
    assert others == [first] * 4


def test_one_rank_is_the_same_as_dense_to_the_bit() -> None:
    same: dict[str, Any] = {"local": Sgd(lr=0.1, momentum=0.9), "server": Adam()}
    clients = {0: towards(G1), 1: towards(-W)}
    flasc = Flasc(density_down=1.0, density_up=1.0, **same)
    for mean in ("padded", "owners"):
        one_rank = HetLora(ranks=(2,), mean=mean, **same)
        het = rounds(one_rank, 4, PAIR, clients, W)[-1].x
        assert digest(het) == digest(rounds(flasc, 4, PAIR, clients, W)[-1].x)


# --- masks that both sides derive ------------------------------------------------


@pytest.mark.parametrize("o", [FedSelect(density=0.5, **PLAIN), SparseAdapter(**PLAIN)], ids=str)
def test_a_model_of_zeros_and_ties_has_one_mask_on_both_sides(o: AnySettings) -> None:
    """B = 0 at the start: fewer entries than k are not zero, and the lowest zeros join them."""
    start = f32(0, 1, 0, -1, 0, 0, 1, 0)
    towards_ones = {0: towards(np.ones(8, np.float32)), 1: towards(-np.ones(8, np.float32))}
    x, played = start, rounds(o, 4, clients=towards_ones, start=start)
    if isinstance(o, FedSelect):
        assert played[0].step.places.tolist() == [0, 1, 3, 6]  # type: ignore[union-attr]
    replica = build(o, SPACE, 0)
    for r in played:
        x = replica.apply(x, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)


def test_the_update_of_a_mask_is_its_values_alone() -> None:
    method = build(FedSelect(density=0.25, **PLAIN), SPACE, 0)
    sent, _ = method.local(f32(4, -3, 0, 0, 0, 0, 0, 0), CLIENTS[0], [None], Work(1, Assignment(0)))
    assert isinstance(sent, Dense)
    near(sent.values, [0.1, 0.2])
    a = Assignment(0)
    assert method.accepts(a, sent) is None
    wrong = "want a dense payload of what the client trained"
    assert method.accepts(a, Sparse(8, np.array([0, 1]), f32(1, 2))) == wrong
    assert method.accepts(a, Dense(f32(1, 2), (0,))) == wrong
    assert method.accepts(a, Dense(f32(1))) == "another size: 1 entries, want 2"


def test_how_many_entries_are_due_travels_where_it_changes() -> None:
    method = build(SparseAdapter(density=0.25, **PLAIN), SPACE, 0)
    state, _ = method.init(W)
    assert [method.plan(state, r, [5])[0].picks for r in (1, 2, 3)] == [(8,), (2,), (2,)]
    late = method.plan(state, 2, [5])[0]
    assert method.accepts(late, Dense(f32(1, 2))) is None
    assert method.accepts(late, Dense(W)) == "another size: 8 entries, want 2"
    constant = build(FedSelect(), SPACE, 0)
    assert constant.plan(constant.init(W)[0], 1, [5])[0].picks == ()


def test_the_head_outside_is_always_shared() -> None:
    o = Flasc(density_down=1 / 3, density_up=1 / 6, head="outside", **PLAIN)
    start = f32(3, 2, 1, 9, 8, 7, 0.5, 0.25)
    published, _ = rounds(o, 1, PAIR, CLIENTS, start)
    assert published.x.tolist() == [0, 0, 0, 9, 8, 0, 0.5, 0.25]
    sent, _ = build(o, PAIR, 0).local(start, Quadratic(G1), [None], Work(1, Assignment(0)))
    assert isinstance(sent, Sparse)
    assert sent.places.tolist() == [5, 6, 7]


# --- tiers -----------------------------------------------------------------------


def check_views(method: Method[Any], x: Flat, step: Any, want: list[list[float]]) -> None:
    """What a node of a tier gets gives M_t.W, after the wire too."""
    assert method.tiers == len(want)
    for tier, expected in enumerate(want):
        seen = over_the_wire(method.view(step, tier))
        assert method.apply(x, 1, seen).tolist() == expected


def test_density_tiers_by_hand() -> None:
    o = Flasc(tiers=(0.125, 0.5, 1.0), **PLAIN)
    method = build(o, SPACE, 0)
    assert [method.tier_of(c) for c in (0, 1, 2, 3, 350)] == [0, 1, 2, 0, 2]
    _, step = method.init(W)
    want = [[4, *[0] * 7], [4, -3, 2, -1, 0, 0, 0, 0], W.tolist()]
    check_views(method, W, step, want)
    for client, (count, mask) in enumerate(zip((1, 4, 8), want, strict=True)):
        a = Assignment(client)
        from_all, _ = method.local(W, towards(0 * W), [None], Work(1, a))
        own, _ = method.local(np.array(mask, np.float32), towards(0 * W), [None], Work(1, a))
        assert from_all.values.tobytes() == own.values.tobytes()  # of M_t.W either way
        assert len(own.values) == count
        assert method.accepts(a, own) is None
        assert method.accepts(Assignment(client + 1), own) is not None


def test_rank_tiers_by_hand() -> None:
    method = build(HetLora(ranks=(1, 2), **PLAIN), PAIR, 0)
    _, step = method.init(W)
    assert isinstance(step, Dense)
    # A (2, 1) = 4, -3; B (2, 2) = 2, -1; .5, -.25: row 1 of A and column 1 of B are not there
    check_views(method, W, step, [[4, 0, 2, 0, 0.5, 0, 0.125, -0.0625], W.tolist()])
    assert len(method.view(step, 0).values) == 5
    sent, _ = method.local(W, Quadratic(G1), [None], Work(1, Assignment(2)))
    near(sent.values, [0.1, 0.3, 0.5, 0.7, 0.8])
    with pytest.raises(ValueError, match="3 values are of no rank"):
        method.apply(W, 1, Dense(f32(1, 2, 3)))


@pytest.mark.parametrize(("mean", "share"), [("padded", 0.5), ("owners", 1.0)])
def test_what_one_of_two_clients_holds_by_hand(mean: Any, share: float) -> None:
    got = rounds(HetLora(ranks=(1, 2), mean=mean, **PLAIN), space=PAIR)[-1].x
    alone = W - 0.1 * share * G2  # client 1 has both ranks
    near(got, [DENSE[0], alone[1], DENSE[2], alone[3], DENSE[4], alone[5], *DENSE[6:]])


def test_weights_by_the_norm_of_the_product_by_hand() -> None:
    w = np.arange(1.0, 9.0)
    a, b = w[:2].reshape(2, 1), w[2:6].reshape(2, 2)
    assert product_norm(PAIR, w) == pytest.approx(np.linalg.norm(b @ a))
    got = rounds(HetLora(ranks=(1, 2), weight="norm", **PLAIN), space=PAIR)[-1].x
    held = np.isin(np.arange(8), [0, 2, 4, 6, 7])
    low = np.where(held, W - 0.1 * G1, 0)
    high = W - 0.1 * G2
    p = np.array([product_norm(PAIR, v.astype(np.float64)) for v in (low, high)])
    d = np.array([np.where(held, 0.1 * G1, 0), 0.1 * G2])
    near(got, W - p @ d / p.sum())


def test_products_that_are_all_zero_weigh_the_same() -> None:
    start, head = np.zeros(8, np.float32), f32(0, 0, 0, 0, 0, 0, 1, 1)
    clients = {0: Quadratic(head), 1: Quadratic(3 * head)}
    got = rounds(HetLora(ranks=(1, 2), weight="norm", **PLAIN), 1, PAIR, clients, start)[-1].x
    near(got, [0] * 6 + [-0.2] * 2)


# --- error feedback --------------------------------------------------------------


def test_what_was_not_sent_joins_the_next_change() -> None:
    method = build(Flasc(density_down=1.0, density_up=0.25, error_feedback=True, **PLAIN), SPACE, 0)
    work = Work(1, Assignment(0), Memory())
    sent = [method.local(W, Quadratic(G1), [None], work)[0] for _ in range(3)]
    assert [s.places.tolist() for s in sent] == [[6, 7], [4, 5], [6, 7]]  # type: ignore[union-attr]
    near(sent[1].values, [1.0, 1.2])  # of two rounds
    near(sent[2].values, [1.4, 1.6])  # of the two since they were sent
    assert work.memory.value is not None
    near(work.memory.value, [0.3, 0.6, 0.9, 1.2, 0.5, 0.6, 0, 0])


def test_a_run_that_came_to_nothing_is_not_remembered() -> None:
    method = build(Flasc(error_feedback=True, **PLAIN), SPACE, 0)
    kept = np.ones(8, np.float32)
    memory = Memory(kept)
    method.local(W, Quadratic(G1 * np.float32(np.nan)), [None], Work(1, Assignment(0), memory))
    assert memory.value is kept


def test_without_error_feedback_nothing_is_remembered() -> None:
    work = Work(1, Assignment(0))
    build(Flasc(**PLAIN), SPACE, 0).local(W, Quadratic(G1), [None], work)
    assert work.memory.value is None


# --- privacy ---------------------------------------------------------------------


def test_noise_is_on_every_coordinate_of_the_sum_and_divided_by_the_clients() -> None:
    o = Flasc(density_down=1.0, density_up=0.25, dp=Dp(clip=9.0, noise_multiplier=0.5), **PLAIN)
    got = rounds(o)[-1].state.weights
    sent = np.array([-1.2, -1.05, 0, 0, 0, 0, 0.7, 0.8])  # the sum of the two D, unclipped
    np.testing.assert_allclose(got, W - noised_as_seen(o, sent) / 2, atol=1e-5)


def noised_as_seen(o: Flasc, total: Any) -> Any:
    """The noise is keyed by the sum's bits, so these are made as the server makes them."""
    method = build(o, SPACE, 0)
    exact = np.zeros(8)
    for c, oracle in CLIENTS.items():
        s, _ = method.local(W, oracle, [None], Work(1, Assignment(c)))
        exact[s.places] += s.values.astype(np.float64)  # type: ignore[union-attr]
    np.testing.assert_allclose(exact, total, atol=1e-6)
    assert o.dp is not None
    out = noised(o.dp, SECRET, 1, exact)
    np.testing.assert_allclose(out - exact, 4.5 * gaussian(SECRET, 1, exact), rtol=1e-6)
    return out


def test_noise_stays_inside_of_what_is_trained() -> None:
    dp = Dp(clip=1.0, noise_multiplier=1.0)
    got = rounds(FedSelect(density=0.5, dp=dp, **PLAIN))[-1].state.weights
    assert got[4:].tolist() == REST
    assert (np.abs(got[:4] - W[:4]) > 1e-3).all()


def test_without_a_secret_the_coordinator_refuses_and_nodes_do_not() -> None:
    o = FfaLora(dp=Dp(clip=1.0, noise_multiplier=1.0), **PLAIN)
    method = build(o, PAIR, 0)
    assert len(method.local(W, CLIENTS[0], [None], Work(1, Assignment(0)))[0].values) == 6
    with pytest.raises(ExperimentError, match="no secret to draw noise from"):
        method.init(W)
    build(o, PAIR, 0, SECRET).init(W)


def test_epsilon_counts_the_clients_that_were_asked() -> None:
    pytest.importorskip("dp_accounting")
    dp = Dp(clip=1.0, noise_multiplier=4.0, clients=100)
    method = build(Flasc(dp=dp, **PLAIN), SPACE, 0, SECRET)
    state, _ = method.init(W)
    a = method.plan(state, 1, [3, 8, 9])[0]
    sent, _ = method.local(W, CLIENTS[0], [None], Work(1, a))
    state, _ = method.aggregate(state, W, 1, [Contribution(a, 1, sent)])
    assert state.sampled == ((3, 1),)
    assert method.metrics(state) == {"epsilon": epsilon(4.0, 1e-5, [(3, 1)], 100), "delta": 1e-5}


# --- refusals --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"name": "flasc", "tiers": [0.5, 0.25]}, "tiers have to increase"),
        ({"name": "flasc", "tiers": [0.0]}, "> 0"),
        (
            {"name": "flasc", "error_feedback": True, "dp": {"clip": 1, "noise_multiplier": 1}},
            "error_feedback",
        ),
        ({"name": "hetlora", "ranks": []}, "ranks have to increase"),
        ({"name": "hetlora", "ranks": [4, 4]}, "ranks have to increase"),
        ({"name": "hetlora"}, "missing required field `ranks`"),
        (
            {"name": "hetlora", "ranks": [4], "dp": {"clip": 1, "noise_multiplier": 1}},
            "hetlora has no dp",
        ),
        ({"name": "fedselect", "dp": {"clip": 0, "noise_multiplier": 1}}, "> 0"),
        ({"name": "sparse-adapter", "density_up": 0.5}, "density_up"),
    ],
)
def test_settings_that_make_no_sense_are_refused(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ExperimentError, match=why):
        settings(table)


@pytest.mark.parametrize(
    ("o", "space"),
    [
        (FfaLora(), SPACE),
        (FfaLora(), ParamSpace.of(PAIR.tensors[:1])),
        (HetLora(ranks=(1,)), PAIR),
        (HetLora(ranks=(1, 3)), PAIR),
        (HetLora(ranks=(2,)), SPACE),
        (Flasc(head="outside"), SPACE),
    ],
)
def test_spaces_that_do_not_fit_are_refused(o: AnySettings, space: ParamSpace) -> None:
    with pytest.raises(ExperimentError):
        build(o, space, 0)


def test_settings_come_from_a_table() -> None:
    table = {"name": "hetlora", "ranks": [1, 4], "mean": "owners"}
    assert settings(table) == HetLora(ranks=(1, 4), mean="owners")
    assert msgspec.to_builtins(settings({"name": "adapter-lth"}))["decay"] == 0.8


@pytest.mark.parametrize("o", [FedSelect(), HetLora(ranks=(1, 2))], ids=str)
def test_aggregate_of_nothing_is_refused(o: AnySettings) -> None:
    method = build(o, PAIR, 0)
    with pytest.raises(ValueError, match="no updates"):
        method.aggregate(method.init(W)[0], W, 1, [])
