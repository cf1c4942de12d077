from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest

from fedalgos.flasc import Flasc, flasc
from fedalgos.masks import HeadMask, sparsify
from fedalgos.method import Assignment, Memory, Method, Work
from fedalgos.optim import Adam, AdamW, Local, Moments, Sgd, local_steps, server_step
from fedalgos.registry import settings
from fedalgos.space import ParamSpace, digest
from fedalgos.sparse import State
from protocol import noise, places, values
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Dense, Flat, Run, Scalars, Sparse, spec_of
from protocol.values import Coding
from tests.oracles import (
    Quadratic,
    Round,
    contribution,
    f32,
    over_the_wire,
    play,
    space_of,
    towards,
)

# vector 9: two clients with constant gradients, client lr .1, one step, server SGD lr 1
W = f32(4, -3, 2, -1, 0.5, -0.25, 0.125, -0.0625)
G1 = np.arange(1, 9, dtype=np.float32)
G2 = -1.5 * G1[::-1]
SPACE = space_of(3, 5)
CLIENTS = {0: Quadratic(G1), 1: Quadratic(G2.astype(np.float32))}
PLAIN: dict[str, Any] = {"local": Sgd(lr=0.1), "server": Sgd(lr=1.0)}
DENSE_W = [4.55, -2.575, 2.3, -0.825, 0.55, -0.325, -0.075, -0.3875]
SEED = 7
CODINGS: tuple[Coding, ...] = get_args(Coding)


def made(o: Flasc, space: ParamSpace) -> Method[State]:
    return flasc(o, space, SEED)


def key(round: int, client: int) -> int:
    return noise.key("rounding", SEED, round, client)


def one_round(**settings: Any) -> tuple[Round, Round]:
    method = made(Flasc(**{**PLAIN, **settings}), SPACE)
    published, first = play(method, CLIENTS, W, 1, examples={0: 1, 1: 99})
    return published, first


def test_dense_by_hand_and_unweighted() -> None:
    _, first = one_round(density_down=1.0, density_up=1.0)
    np.testing.assert_allclose(first.state.weights, DENSE_W, atol=1e-6)
    assert first.x.tobytes() == first.state.weights.tobytes()


def test_a_quarter_up_by_hand() -> None:
    _, first = one_round(density_down=1.0, density_up=0.25)
    expected = [4.6, -2.475, 2, -1, 0.5, -0.25, -0.225, -0.4625]
    np.testing.assert_allclose(first.state.weights, expected, atol=1e-6)


def test_a_half_down_keeps_what_is_left_out_on_the_server() -> None:
    """Constant gradients: the dense W, though clients started from M.W."""
    published, first = one_round(density_down=0.5, density_up=1.0)
    assert published.x.tolist() == [4, -3, 2, -1, 0, 0, 0, 0]
    np.testing.assert_allclose(first.state.weights, DENSE_W, atol=1e-6)
    np.testing.assert_allclose(first.x, [*DENSE_W[:4], 0, 0, 0, 0], atol=1e-6)


def test_a_residual_that_grows_past_the_mask_enters_it() -> None:
    method = made(Flasc(density_down=0.25, density_up=1.0, **PLAIN), space_of(4))
    rounds = list(play(method, {0: Quadratic(f32(0, 0, 0, -3))}, f32(2, 0.5, 1, 0.9), 5))
    assert rounds[0].x.tolist() == [2, 0, 0, 0]
    np.testing.assert_allclose(rounds[3].state.weights, [2, 0.5, 1, 1.8], rtol=1e-6)
    assert rounds[3].x.tolist() == [2, 0, 0, 0]
    np.testing.assert_allclose(rounds[4].x, [0, 0, 0, 2.1], rtol=1e-6)  # the .9 was not lost
    np.testing.assert_allclose(rounds[4].state.weights, [2, 0.5, 1, 2.1], rtol=1e-6)


def test_first_adamw_step_decays_everything_and_moves_what_was_sent() -> None:
    """Vector 9: W (1 - 1e-5) - 1e-3 sign(aggregate)."""
    server = AdamW(lr=1e-3, weight_decay=0.01)
    _, first = one_round(density_down=1.0, density_up=0.25, server=server)
    aggregate = np.array([-0.6, -0.525, 0, 0, 0, 0, 0.35, 0.4])
    expected = W * (1 - 1e-5) - 1e-3 * np.sign(aggregate)
    np.testing.assert_allclose(first.state.weights, expected, atol=1e-7)


def test_clients_train_every_coordinate_and_send_the_change_with_its_sign() -> None:
    method = made(Flasc(density_down=0.25, density_up=0.25, **PLAIN), space_of(4))
    x = f32(2, 0, 0, 0)  # M.w
    sent, _ = method.local(x, Quadratic(f32(0.1, -5, 3, 1)), [None], Work(1, Assignment(0)))
    assert isinstance(sent, Sparse)
    assert (sent.size, sent.places.tolist()) == (4, [1])  # outside M
    np.testing.assert_allclose(sent.values, [-0.5])  # D = M.W - w


def reference(
    local: Local, server: Any, oracles: Sequence[Quadratic], w: Flat, rounds: int
) -> Flat:
    """The dense method, written out without a mask or a codec."""
    s = Moments()
    for _ in range(rounds):
        total = np.zeros(len(w))
        for oracle in oracles:
            v = w.copy()
            step_ = local_steps(local, [v])
            for _ in range(2):
                step_([oracle.grad(v, None)[1]])
            total += w - v
        s, new = server_step(server, s, w, (-total / len(oracles)).astype(np.float32))
        w = new.astype(np.float32)
    return w


def test_density_one_equals_dense_to_the_bit() -> None:
    oracles = [towards(G1), towards(-W)]
    o = Flasc(density_down=1.0, density_up=1.0, local=Sgd(lr=0.1, momentum=0.9), server=Adam())
    *_, last = play(made(o, SPACE), dict(enumerate(oracles)), W, 4, batches=lambda c, r: [None] * 2)
    assert digest(last.x) == digest(reference(o.local, o.server, oracles, W, 4))


@pytest.mark.parametrize(
    ("density", "size", "k"), [(0.29, 100, 29), (1.0, 7, 7), (1e-6, 7, 1), (0.25, 10, 2)]
)
def test_densities_are_rounded_and_never_nothing(density: float, size: int, k: int) -> None:
    method = made(Flasc(density_down=density, density_up=density), space_of(size))
    x = np.ones(size, np.float32)
    _, published = method.init(x)
    sent, _ = method.local(x, towards(0 * x), [None], Work(1, Assignment(0)))
    assert published is not None
    assert len(published.values) == len(sent.values) == k


def test_accepts() -> None:
    method = made(Flasc(density_up=0.5), space_of(4))
    a = Assignment(0)
    assert method.accepts(a, Sparse(4, np.array([0, 2]), f32(1, 2))) is None
    assert method.accepts(a, Sparse(4, np.array([0]), f32(1))) == "another size: 1 entries, want 2"
    wrong = "want a sparse payload of size 4"
    assert method.accepts(a, Sparse(5, np.array([0, 2]), f32(1, 2))) == wrong
    assert method.accepts(a, Dense(f32(1, 2, 3, 4))) == wrong
    assert method.accepts(a, Scalars((Run(0, 2),), f32(1, 2))) == wrong
    in_16_bits = Sparse(4, np.array([0, 2]), f32(1, 2), "f16")
    assert method.accepts(a, in_16_bits) == "want f32 values"
    other = made(Flasc(density_up=0.5, coding_up="f16", coding_down="int8"), space_of(4))
    assert other.accepts(a, in_16_bits) is None


def test_a_step_of_another_size_is_an_error_and_takes_no_memory() -> None:
    method = made(Flasc(), space_of(4))
    for size in (3, 5, 1 << 40):
        with pytest.raises(ValueError, match=f"a step of size {size}, want 4"):
            method.apply(f32(1, 2, 3, 4), 1, Sparse(size, np.array([0]), f32(1)))


def test_aggregate_of_nothing_is_refused() -> None:
    method = made(Flasc(), space_of(2))
    with pytest.raises(ValueError, match="no updates"):
        method.aggregate(State(f32(1, 2), Moments()), f32(1, 2), 1, [])


def test_one_clients_entry_is_divided_by_all_clients() -> None:
    method = made(Flasc(density_down=1.0, density_up=0.5, **PLAIN), space_of(2))
    contributions = [
        contribution(Sparse(2, np.array([0]), f32(1)), 0),
        contribution(Sparse(2, np.array([1]), f32(-4)), 1),
    ]
    s, _ = method.aggregate(State(f32(0, 0), Moments()), f32(0, 0), 1, contributions)
    assert s.weights.tolist() == [-0.5, 2]


# --- in fewer bits ---------------------------------------------------------------


def normal(n: int, seed: int) -> Flat:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("coding", CODINGS)
def test_an_update_is_rounded_by_client_and_round_and_a_step_by_round(coding: Coding) -> None:
    o = Flasc(density_down=0.5, density_up=0.25, coding_down=coding, coding_up=coding, **PLAIN)
    method, x, n = made(o, space_of(400)), normal(400, 1), 400
    change = normal(400, 2)
    sent = {}
    for round, client in ((1, 3), (1, 4), (2, 3)):
        work = Work(round, Assignment(client))
        update, _ = method.local(x, Quadratic(change), [None], work)
        assert isinstance(update, Sparse)
        exact = sparsify(x - (x - np.float32(0.1) * change), n // 4)
        assert update.places.tolist() == exact.places.tolist()
        want = values.rounded(coding, exact.values, key(round, client))
        assert update.values.tobytes() == want.tobytes()
        sent[round, client] = update.values.tobytes()
        c = contribution(update, client)
        state, step = method.aggregate(State(x, Moments()), x, round, [c])
        assert isinstance(step, Sparse)
        exact = sparsify(state.weights, n // 2)
        assert step.places.tolist() == exact.places.tolist()
        want = values.rounded(coding, exact.values, key(round, -1))
        assert step.values.tobytes() == want.tobytes()
        assert method.apply(x, round, step).tobytes() == step.dense().tobytes()
    assert len(set(sent.values())) == (3 if coding == "int8" else 1)
    _, published = method.init(x)
    want = values.rounded(coding, sparsify(x, n // 2).values, key(0, -1))
    assert published is not None
    assert published.values.tobytes() == want.tobytes()


@pytest.mark.parametrize("coding", CODINGS)
def test_the_server_keeps_what_rounding_leaves_out_of_a_step(coding: Coding) -> None:
    """Constant gradients: the dense W, though clients started from M.W in a few bits."""
    published, first = one_round(density_down=1.0, density_up=1.0, coding_down=coding)
    np.testing.assert_allclose(first.state.weights, DENSE_W, atol=2e-6)
    assert (published.x.tobytes() == W.tobytes()) == (coding in ("f32", "f16", "bf16"))
    assert (first.x.tobytes() == first.state.weights.tobytes()) == (coding == "f32")


@pytest.mark.parametrize("up", CODINGS)
@pytest.mark.parametrize("down", ["f32", "int8"])
def test_sizes_of_both_ways(down: Coding, up: Coding) -> None:
    o = Flasc(density_down=0.5, density_up=0.1, coding_down=down, coding_up=up, **PLAIN)
    method, x = made(o, space_of(6000)), normal(6000, 1)
    rounds = list(play(method, {0: towards(-x)}, x, 1))
    update, _ = method.local(x, towards(-x), [None], Work(1, Assignment(0)))
    ways: list[tuple[Any, Coding, int]] = [(update, up, 600)]
    ways += [(r.step, down, 3000) for r in rounds]
    for payload, coding, k in ways:
        _, size = places.nbytes(6000, payload.places)
        assert spec_of(payload).nbytes == values.nbytes(coding, k) + size


def test_eight_bits_up_are_right_on_average_over_the_clients() -> None:
    """Their rounding is independent: of 200 equal changes the mean is closer than any of them."""
    o = Flasc(density_down=1.0, density_up=1.0, coding_up="int8", **PLAIN)
    method, x, change = made(o, space_of(256)), normal(256, 1), normal(256, 2)
    cs = []
    for client in range(200):
        update, _ = method.local(x, Quadratic(change), [None], Work(1, Assignment(client)))
        cs.append(contribution(over_the_wire(update), client))
    exact = x - np.float32(0.1) * change
    step = float(np.abs(x - exact).max()) / 127
    one, _ = method.aggregate(State(x, Moments()), x, 1, cs[:1])
    all_, _ = method.aggregate(State(x, Moments()), x, 1, cs)
    assert np.abs(one.weights - exact).max() > 0.8 * step
    assert np.abs(all_.weights - exact).max() < 0.2 * step  # five standard errors of half a step


@pytest.mark.parametrize("coding", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("head", ["inside", "outside"])
def test_what_a_tier_gets_of_a_step_in_fewer_bits_has_the_very_values(
    coding: Coding, head: HeadMask
) -> None:
    space = ParamSpace.of(
        [TensorInfo("a.lora_A.w", (300,), "a"), TensorInfo("classifier.w", (9,), "head")]
    )
    o = Flasc(tiers=(0.05, 0.3, 1.0), head=head, coding_down=coding, **PLAIN)
    method, x = made(o, space), normal(309, 1)
    _, step = method.init(x)
    assert isinstance(step, Sparse)
    whole = method.apply(x, 0, step)
    for tier in range(3):
        seen = over_the_wire(method.view(step, tier))
        assert isinstance(seen, Sparse)
        assert seen.coding == coding
        part = method.apply(x, 0, seen)
        assert part[seen.places].tobytes() == whole[seen.places].tobytes()
        assert np.count_nonzero(part) == len(seen.places)


def test_codings_whose_values_share_a_scale_do_not_go_with_tiers() -> None:
    tiers = {"name": "flasc", "tiers": [0.5, 1.0]}
    for coding in CODINGS:
        settings({**tiers, "coding_up": coding})
        settings({"name": "flasc", "coding_down": coding})
        if coding in ("int8", "sign"):
            with pytest.raises(ExperimentError, match="coding_down has to be f32, f16 or bf16"):
                settings({**tiers, "coding_down": coding})
        else:
            settings({**tiers, "coding_down": coding})


@pytest.mark.parametrize("coding", CODINGS)
def test_with_error_feedback_nothing_of_a_change_is_lost(coding: Coding) -> None:
    """What was sent over the rounds and what is left are the changes, but for fp32."""
    o = Flasc(density_down=1.0, density_up=0.2, coding_up=coding, error_feedback=True, **PLAIN)
    method, x, memory = made(o, space_of(200)), normal(200, 1), Memory()
    total = np.zeros(200)
    for round in range(1, 6):
        update, _ = method.local(
            x, Quadratic(normal(200, 2)), [None], Work(round, Assignment(0), memory)
        )
        assert isinstance(update, Sparse)
        total += update.dense()
    assert memory.value is not None
    np.testing.assert_allclose(total + memory.value, 5 * 0.1 * normal(200, 2), atol=1e-5)
