from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedalgos.optim import (
    Adam,
    AdamW,
    Local,
    Moments,
    Server,
    Sgd,
    Yogi,
    local_steps,
    server_gain,
    server_step,
)
from tests.oracles import f32


def wide(*xs: float) -> Any:
    return np.array(xs, np.float64)


# --- local -----------------------------------------------------------------------


@pytest.mark.parametrize(("w", "g", "after"), [(0.5, 7.68, 0.4998995), (2.0, 6.75, 1.999898)])
def test_first_adamw_step_forgets_the_size_of_the_gradient(
    w: float, g: float, after: float
) -> None:
    """TV6: lr 1e-4, decay 0.01."""
    x = wide(w)
    local_steps(AdamW(lr=1e-4, weight_decay=0.01), [x])([wide(g)])
    assert x[0] == pytest.approx(after, abs=1e-9)


TORCH: list[tuple[Local, Any]] = [
    (Sgd(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Sgd(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)),
    (
        AdamW(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize("on", ["numpy", "torch"])
@pytest.mark.parametrize(("ours", "theirs"), TORCH)
def test_local_steps_follow_torch_on_numpy_and_on_torch(ours: Local, theirs: Any, on: str) -> None:
    rng = np.random.default_rng(0)
    start = [rng.normal(size=3), rng.normal(size=5)]
    parameters = [torch.tensor(a, requires_grad=True) for a in start]
    reference = theirs(parameters)
    mine: list[Any] = [torch.tensor(a) if on == "torch" else a.copy() for a in start]
    step_ = local_steps(ours, mine)
    for _ in range(6):
        gradients = [rng.normal(size=3), rng.normal(size=5)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        reference.step()
        step_([torch.tensor(g) if on == "torch" else g for g in gradients])
    for p, x in zip(parameters, mine, strict=True):
        np.testing.assert_allclose(np.asarray(x), p.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("ours", [row[0] for row in TORCH])
def test_local_steps_write_through_views_keep_float32_and_leave_gradients(ours: Local) -> None:
    w, g = f32(1, 2, 3), f32(1, 1)
    g.flags.writeable = False
    step_ = local_steps(ours, [w[1:]])
    step_([g])
    step_([g])
    assert w.dtype == np.float32
    assert w[0] == 1
    assert (w[1:] < f32(2, 3)).all()


def test_each_local_optimiser_starts_afresh() -> None:
    optimiser = Sgd(lr=1.0, momentum=0.5)
    for _ in range(2):
        x = f32(0)
        local_steps(optimiser, [x])([f32(1)])
        assert x.tolist() == [-1]


def test_a_missing_gradient_is_an_error_not_a_shorter_step() -> None:
    for optimiser, _ in TORCH:
        with pytest.raises(ValueError, match="zip"):
            local_steps(optimiser, [f32(1), f32(2)])([f32(1)])


# --- server ----------------------------------------------------------------------


def test_yogi_against_flower() -> None:
    """TV7, run on flwr 1.5.0 with its defaults."""
    s, x = Moments(), wide(1.0)
    table = [
        (0.1, 1.0090909091, 0.01, 1e-4),
        (0.1, 1.0216386768, 0.019, 2e-4),
        (-0.2, 1.0205011943, -0.0029, 6e-4),
    ]
    for steps, (delta, after, m, v) in enumerate(table, start=1):
        s, x = server_step(Yogi(), s, x, wide(delta))
        np.testing.assert_allclose(x, [after], rtol=1e-9)
        assert s.m is not None
        assert s.v is not None
        np.testing.assert_allclose([s.m[0], s.v[0], s.steps], [m, v, steps], rtol=1e-9)


def test_yogi_lowers_v_when_the_change_is_smaller_and_keeps_it_when_equal() -> None:
    start = Moments(m=wide(0, 0), v=wide(1, 1), steps=1)
    s, _ = server_step(Yogi(beta2=0.75), start, wide(0, 0), wide(0.5, 1))
    assert s.v is not None
    assert s.v.tolist() == [1 - 0.25 * 0.25, 1]


def test_adam_has_no_bias_correction() -> None:
    s, x = server_step(Adam(), Moments(), wide(1.0), wide(0.1))
    np.testing.assert_allclose(x, [1 + 0.01 * 0.01 / (1e-4**0.5 + 1e-3)], rtol=1e-12)
    s, x = server_step(Adam(), s, x, wide(-0.2))
    m, v = 0.9 * 0.01 - 0.1 * 0.2, 0.99 * 1e-4 + 0.01 * 0.04
    np.testing.assert_allclose(x, [1.0090909091 + 0.01 * m / (v**0.5 + 1e-3)], rtol=1e-9)


def test_plain_sgd_with_lr_1_takes_the_mean_itself_and_keeps_no_momentum() -> None:
    s, x = server_step(Sgd(lr=1.0), Moments(), wide(1, 2), wide(0.5, -1))
    assert x.tolist() == [1.5, 1.0]
    assert (s.m, s.v) == (None, None)


@pytest.mark.parametrize(
    "o", [Sgd(lr=0.3), Sgd(lr=0.3, momentum=0.9), AdamW(lr=0.01, weight_decay=0.1)]
)
def test_server_steps_follow_the_local_ones_along_minus_the_gradient(o: Sgd | AdamW) -> None:
    rng = np.random.default_rng(1)
    local = rng.normal(size=4)
    s, x = Moments(), local.copy()
    step_ = local_steps(o, [local])
    for _ in range(5):
        g = rng.normal(size=4)
        step_([g])
        s, x = server_step(o, s, x, -g)
        np.testing.assert_allclose(x, local, rtol=1e-12)


SERVERS: list[Server] = [Sgd(lr=1.0, momentum=0.9), AdamW(lr=0.1), Adam(), Yogi()]


@pytest.mark.parametrize("o", SERVERS, ids=lambda o: type(o).__name__)
def test_server_steps_are_pure_and_stay_in_float32(o: Server) -> None:
    x, delta = f32(1, 2), f32(0.5, -0.5)
    for a in (x, delta):
        a.flags.writeable = False
    first, _ = server_step(o, Moments(), x, delta)
    moments = [a for a in (first.m, first.v) if a is not None]
    for a in moments:
        a.flags.writeable = False
    second, new = server_step(o, first, x, delta)
    assert first.steps == 1
    assert second.steps == 2
    moments += [a for a in (second.m, second.v) if a is not None]
    assert {a.dtype for a in (*moments, new)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("o", SERVERS, ids=lambda o: type(o).__name__)
def test_server_steps_read_the_same_on_torch(o: Server) -> None:
    deltas = [wide(0.5, -0.5), wide(-0.1, 0.7), wide(0.0, 0.01)]
    s, x = Moments(), wide(1, 2)
    st, xt = Moments(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for delta in deltas:
        s, x = server_step(o, s, x, delta)
        st, xt = server_step(o, st, xt, torch.tensor(delta))
    np.testing.assert_allclose(xt.numpy(), x, rtol=1e-12)


@pytest.mark.parametrize("o", [Adam(lr=0.5, tau=1.0), Yogi(lr=0.5, tau=1.0)])
def test_the_gain_is_what_the_first_moment_is_multiplied_by(o: Server) -> None:
    """At v = 4, the median over both units of 0, 1, 4, 9 and 100: .5 / (2 + 1)."""
    units = [Moments(f32(1, 1), f32(100, 1), 1), Moments(), Moments(f32(1, 1, 1), f32(9, 0, 4), 1)]
    assert server_gain(o, units) == {"server_gain": 0.5 / 3}
    assert server_gain(o, iter(units)) == {"server_gain": 0.5 / 3}


def test_at_one_coordinate_the_gain_is_the_step_over_the_first_moment() -> None:
    s, x = server_step(Yogi(), Moments(), f32(1), f32(0.1))
    assert s.m is not None
    assert server_gain(Yogi(), [s])["server_gain"] * s.m == pytest.approx(x - 1, rel=1e-4)


@pytest.mark.parametrize("o", [AdamW(lr=1.0), Adam(), Yogi()])
def test_there_is_no_gain_before_a_step(o: Server) -> None:
    assert server_gain(o, []) == {}
    assert server_gain(o, [Moments()]) == {}
    s, _ = server_step(o, Moments(), f32(1), f32(0.1))
    assert server_gain(o, [s])["server_gain"] > 0


@pytest.mark.parametrize("o", [Sgd(lr=0.5), Sgd(lr=0.5, momentum=0.9), AdamW(lr=0.5)])
def test_a_steady_change_is_carried_as_far_as_the_gain_says(o: Server) -> None:
    s, x, delta = Moments(), f32(0), f32(0.1)
    before = x
    for _ in range(300):
        before = x
        s, x = server_step(o, s, x, delta)
    assert float((x - before)[0]) == pytest.approx(
        server_gain(o, [s])["server_gain"] * 0.1, rel=1e-3
    )


def test_of_many_coordinates_some_are_looked_at() -> None:
    v = np.linspace(0, 8, 200_001, dtype=np.float32)
    gain = server_gain(Adam(lr=0.5, tau=1.0), [Moments(v, v, 1)])["server_gain"]
    assert gain == pytest.approx(0.5 / 3, rel=1e-4)
