"""Training a part, where what is trained and what is not talk to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedalgos.masked import remember, train
from fedalgos.method import Batch, Memory, Vector
from fedalgos.optim import AdamW, Sgd
from protocol.payload import Flat, Sparse
from tests.oracles import Exact, Quadratic, f32

BENT = Quadratic(f32(1, -2, 3, 0.5), np.full((4, 4), 0.1, np.float32) + np.eye(4, dtype=np.float32))


def by_hand(steps: int, free: Sequence[int], x: Flat) -> Exact:
    """Gradient descent on some coordinates; the others are constants."""
    w = np.array(x, np.float64)
    for _ in range(steps):
        g = BENT.gradient(w, None)
        w[list(free)] -= 0.1 * g[list(free)]
    return w


def test_a_mask_holds_at_zero_what_it_leaves_out() -> None:
    start = f32(2, 0, 1, 0)
    trained, _ = train(Sgd(lr=0.1), start, BENT, [None] * 3, mask=np.array([0, 2]))
    assert trained[[1, 3]].tolist() == [0, 0]
    np.testing.assert_allclose(trained, by_hand(3, [0, 2], start), rtol=1e-5)
    decayed = AdamW(lr=0.1, weight_decay=0.5)
    trained, _ = train(decayed, start, BENT, [None] * 3, mask=np.array([0, 2]))
    assert trained[[1, 3]].tolist() == [0, 0]
    assert start.tolist() == [2, 0, 1, 0]


class Asked(Quadratic):
    """Gradients of ranges alone."""

    def grad(
        self, x: Vector, batch: Batch, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[float, Vector]:
        assert ranges == ((1, 3),)  # what is not trained needs no gradient
        return super().grad(x, batch, ranges)


def test_ranges_keep_the_values_of_the_rest_and_no_decay_moves_them() -> None:
    start, oracle = f32(2, -1, 1, 7), Asked(BENT.c, BENT.a)
    trained, _ = train(Sgd(lr=0.1), start, oracle, [None] * 3, ((1, 3),))
    np.testing.assert_allclose(trained, by_hand(3, [1, 2], start), rtol=1e-5)
    decay = AdamW(lr=0.1, weight_decay=0.5)
    trained, _ = train(decay, start, oracle, [None] * 3, ((1, 3),))
    assert trained[[0, 3]].tolist() == [2, 7]
    assert (trained[1:3] != start[1:3]).all()


def test_the_loss_is_the_mean_over_the_steps_before_each() -> None:
    start = f32(2, -1, 1, 7)
    _, loss = train(Sgd(lr=0.1), start, BENT, [None] * 2)
    want = [BENT.value(by_hand(n, range(4), start), None) for n in (0, 1)]
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-6)


def test_what_a_coding_rounded_away_is_remembered_too() -> None:
    memory = Memory()
    remember(memory, f32(1.25, 0.5, -3), Sparse(3, np.array([0, 2]), f32(1, -3)))
    assert memory.value is not None
    assert memory.value.tolist() == [0.25, 0.5, 0]
