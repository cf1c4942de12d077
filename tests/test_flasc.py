from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedalgos.flasc import Flasc, flasc
from fedalgos.method import Assignment, Work
from fedalgos.optim import Adam, AdamW, Local, Moments, Sgd, local_steps, server_step
from fedalgos.space import digest
from fedalgos.sparse import State
from protocol.payload import Dense, Flat, Run, Scalars, Sparse
from tests.oracles import Quadratic, Round, contribution, f32, play, space_of, towards

# vector 9: two clients with constant gradients, client lr .1, one step, server SGD lr 1
W = f32(4, -3, 2, -1, 0.5, -0.25, 0.125, -0.0625)
G1 = np.arange(1, 9, dtype=np.float32)
G2 = -1.5 * G1[::-1]
SPACE = space_of(3, 5)
CLIENTS = {0: Quadratic(G1), 1: Quadratic(G2.astype(np.float32))}
PLAIN: dict[str, Any] = {"local": Sgd(lr=0.1), "server": Sgd(lr=1.0)}
DENSE_W = [4.55, -2.575, 2.3, -0.825, 0.55, -0.325, -0.075, -0.3875]


def one_round(**settings: Any) -> tuple[Round, Round]:
    method = flasc(Flasc(**{**PLAIN, **settings}), SPACE)
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
    method = flasc(Flasc(density_down=0.25, density_up=1.0, **PLAIN), space_of(4))
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
    method = flasc(Flasc(density_down=0.25, density_up=0.25, **PLAIN), space_of(4))
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
    *_, last = play(
        flasc(o, SPACE), dict(enumerate(oracles)), W, 4, batches=lambda c, r: [None] * 2
    )
    assert digest(last.x) == digest(reference(o.local, o.server, oracles, W, 4))


@pytest.mark.parametrize(
    ("density", "size", "k"), [(0.29, 100, 29), (1.0, 7, 7), (1e-6, 7, 1), (0.25, 10, 2)]
)
def test_densities_are_rounded_and_never_nothing(density: float, size: int, k: int) -> None:
    method = flasc(Flasc(density_down=density, density_up=density), space_of(size))
    x = np.ones(size, np.float32)
    _, published = method.init(x)
    sent, _ = method.local(x, towards(0 * x), [None], Work(1, Assignment(0)))
    assert published is not None
    assert len(published.values) == len(sent.values) == k


def test_accepts() -> None:
    method = flasc(Flasc(density_up=0.5), space_of(4))
    a = Assignment(0)
    assert method.accepts(a, Sparse(4, np.array([0, 2]), f32(1, 2))) is None
    assert method.accepts(a, Sparse(4, np.array([0]), f32(1))) == "another size: 1 entries, want 2"
    wrong = "want a sparse payload of size 4"
    assert method.accepts(a, Sparse(5, np.array([0, 2]), f32(1, 2))) == wrong
    assert method.accepts(a, Dense(f32(1, 2, 3, 4))) == wrong
    assert method.accepts(a, Scalars((Run(0, 2),), f32(1, 2))) == wrong


def test_aggregate_of_nothing_is_refused() -> None:
    method = flasc(Flasc(), space_of(2))
    with pytest.raises(ValueError, match="no updates"):
        method.aggregate(State(f32(1, 2), Moments()), f32(1, 2), 1, [])


def test_one_clients_entry_is_divided_by_all_clients() -> None:
    method = flasc(Flasc(density_down=1.0, density_up=0.5, **PLAIN), space_of(2))
    contributions = [
        contribution(Sparse(2, np.array([0]), f32(1)), 0),
        contribution(Sparse(2, np.array([1]), f32(-4)), 1),
    ]
    s, _ = method.aggregate(State(f32(0, 0), Moments()), f32(0, 0), 1, contributions)
    assert s.weights.tolist() == [-0.5, 2]
