from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalgos.ferret import Ferret, allot, cut, ferret
from fedalgos.method import Assignment, Contribution, Method, Work
from fedalgos.optim import Sgd
from fedalgos.registry import settings as decode_settings
from fedalgos.space import ParamSpace, digest
from protocol import kernels, noise
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Blocks, Flat, Payload, spec_of
from tests.oracles import Exact, Quadratic, f32, over_the_wire, play, space_of, towards

SEED = 5
SPACE = space_of(3, 4, 5)  # three blocks: each tensor is above 0.9 of the median
START = np.linspace(-1, 1, 12).astype(np.float32)


def made(space: ParamSpace = SPACE, *, seed: int = SEED, **o: object) -> Method[None]:
    return ferret(Ferret(**{"local": Sgd(lr=1.0), **o}), space, seed)  # type: ignore[arg-type]


def u_of(round: int, block: int, k: int, start: int, stop: int) -> Exact:
    """Its numbers stand at the parameters' places in the whole vector."""
    key = noise.key("basis", SEED, round, block, k)
    return noise.uniforms(key, start, stop).astype(np.float64)


def sent_by(method: Method[None], change: Flat, round: int = 1, x: Flat | None = None) -> Blocks:
    """What a client sends whose one step of gradient descent is ``change``."""
    x = np.zeros_like(change) if x is None else x
    sent, _ = method.local(x, Quadratic(change), [None], Work(round, Assignment(0)))
    assert isinstance(sent, Blocks)
    return sent


def given_by(payload: Blocks, examples: int = 1, client: int = 0) -> Contribution:
    return Contribution(Assignment(client), examples, payload)


def rebuilt(method: Method[None], change: Flat, round: int) -> Exact:
    """What everyone makes of a lone client's change, away from zero: x - x' with lr 1."""
    zero = np.zeros_like(change)
    sent = over_the_wire(sent_by(method, change, round))
    _, step = method.aggregate(None, zero, round, [Contribution(Assignment(0), 7, sent)])
    return -method.apply(zero, round, over_the_wire(step)).astype(np.float64)


# --- blocks ---------------------------------------------------------------------------


def llama(layers: int, width: int, inner: int) -> ParamSpace:
    """Named parameters in the order of transformers' LlamaForCausalLM, head untied."""
    shapes: list[tuple[int, ...]] = [(32_000, width)]
    for _ in range(layers):
        shapes += [(width, width)] * 4  # q, k, v, o
        shapes += [(inner, width), (inner, width), (width, inner)]  # gate, up, down
        shapes += [(width,), (width,)]
    shapes += [(width,), (32_000, width)]
    return ParamSpace.of([TensorInfo(f"t{i}", s, f"u{i}") for i, s in enumerate(shapes)])


@pytest.mark.parametrize(
    ("layers", "width", "inner", "blocks"),
    [
        (24, 2048, 5504, 194),  # 1.3 B, and the paper's L
        (26, 3200, 8640, 210),
        (32, 4096, 11_008, 258),
        (40, 5120, 13_824, 322),
    ],
)
def test_the_four_llamas_have_194_210_258_and_322_blocks(
    layers: int, width: int, inner: int, blocks: int
) -> None:
    assert len(cut(llama(layers, width, inner))) == blocks


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((10, 10, 10), [10, 10, 10]),  # at most 9
        ((100, 4, 5, 4, 100), [100, 4, 5, 4, 100]),  # at most int(4.5)
        ((20, 9, 9, 20, 20, 8), [20, 9, 9, 20, 20, 8]),  # median 14.5, at most 13
        ((20, 9, 4, 20, 20, 20, 8, 10, 1), [20, 9, 4, 20, 20, 20, 8, 10, 1]),  # 10, at most 9
        ((100, 10, 80, 100, 1, 100, 100), [100, 90, 100, 1, 100, 100]),  # 90 is not above 90
        ((100, 11, 80, 100, 100), [100, 11, 80, 100, 100]),  # 91 is
        ((100, 1, 2, 3, 100, 100, 100, 1, 100), [100, 6, 100, 100, 100, 1, 100]),
        ((5,), [5]),
    ],
)
def test_small_tensors_merge_up_to_nine_tenths_of_the_median(
    sizes: tuple[int, ...], blocks: list[int]
) -> None:
    found = cut(space_of(*sizes))
    assert [stop - start for start, stop in found] == blocks
    assert found[0][0] == 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_blocks_are_whole_tensors_and_cover_all_once_in_order(sizes: list[int]) -> None:
    space = space_of(*sizes)
    blocks = cut(space)
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert (blocks[0][0], blocks[-1][1]) == (0, space.size)
    assert {edge for block in blocks for edge in block} <= set(space.offsets)
    assert all(start < stop for start, stop in blocks)


@pytest.mark.parametrize(
    ("norms", "k", "counts"),
    [
        ((1, 0.5, 0.001, math.nan), 200, [200, 100, 2, 2]),
        ((0.5, 0.25, 0.385), 10, [10, 5, 7]),  # the whole part of 7.7
        ((3, 3, 1), 10, [10, 10, 3]),
        ((1e-30, 1e-31), 100, [100, 10]),
        ((0, 0), 64, [2, 2]),
        ((math.nan, math.nan), 64, [2, 2]),
        ((math.inf, 1), 64, [2, 64]),
        ((7,), 2, [2]),
    ],
)
def test_projections_go_by_norm_and_nobody_gets_fewer_than_two(
    norms: tuple[float, ...], k: int, counts: list[int]
) -> None:
    assert allot(norms, k).tolist() == counts


# --- one round by hand ----------------------------------------------------------------


@pytest.mark.parametrize(("scale", "constant"), [("paper", 3.0), ("code", 1.0)])
def test_a_client_sends_the_scaled_products_of_its_change_with_the_basis(
    scale: str, constant: float
) -> None:
    """beta_k = (3 / K_l) <Delta_l, u_k>; norms 1, 2, 4 and K = 8 give K_l = 2, 4, 8."""
    change = f32(1, 0, 0, 0, -2, 0, 0, 0, 0, 0, 4, 0)
    sent = sent_by(made(projections=8, scale=scale), change, round=3, x=0 * START)
    assert sent.counts.tolist() == [2, 4, 8]
    expected = [
        constant / count * float(change[i:j] @ u_of(3, b, k, i, j))
        for b, (i, j, count) in enumerate([(0, 3, 2), (3, 7, 4), (7, 12, 8)])
        for k in range(count)
    ]
    np.testing.assert_allclose(sent.values, expected, rtol=1e-6)


def test_the_change_is_old_minus_new_after_all_local_steps() -> None:
    """Two steps of lr 0.5 towards the goal take 3/4 of the way there."""
    goal = np.linspace(3, -2, 12).astype(np.float32)
    method = made(projections=8, local=Sgd(lr=0.5))
    sent, loss = method.local(START, towards(goal), [None] * 2, Work(1, Assignment(0)))
    assert isinstance(sent, Blocks)
    direct = sent_by(method, 2 * 0.75 * (START - goal))  # one step of lr 0.5
    assert sent.counts.tolist() == direct.counts.tolist()
    np.testing.assert_allclose(sent.values, direct.values, rtol=1e-4, atol=1e-5)
    first, second = (towards(goal).loss(x, None) for x in (START, (START + goal) / 2))
    assert loss == pytest.approx((first + second) / 2, rel=1e-5)


def test_a_step_moves_against_the_coefficients_along_the_basis() -> None:
    step = Blocks(np.array([2, 3, 2]), f32(1, -2, 3, 0, 0.5, 7, -7))
    expected, at = START.astype(np.float64), 0
    for b, (i, j, count) in enumerate([(0, 3, 2), (3, 7, 3), (7, 12, 2)]):
        for k in range(count):
            expected[i:j] -= float(step.values[at]) * u_of(9, b, k, i, j)
            at += 1
    np.testing.assert_allclose(made().apply(START, 9, step), expected, rtol=1e-5, atol=1e-6)


def test_the_moves_are_one_fp32_product_and_sum_after_the_other() -> None:
    x, beta = np.linspace(-1, 1, 5).astype(np.float32), f32(0.3, -1e3, 7e-5)
    expected = x
    for k in range(3):
        u = noise.uniforms(noise.key("basis", SEED, 9, 0, k), 0, 5)
        expected = expected + -beta[k] * u
    got = made(space_of(5)).apply(x, 9, Blocks(np.array([3]), beta))
    assert got.tobytes() == expected.tobytes()


def test_the_basis_is_new_in_every_round_and_run() -> None:
    step = Blocks(np.array([2, 2, 2]), f32(1, 2, 3, 4, 5, 6))
    ends = [made().apply(START, 1, step), made().apply(START, 2, step)]
    ends.append(made(seed=6).apply(START, 1, step))
    assert len({digest(x) for x in ends}) == 3


def test_equal_blocks_do_not_share_their_vectors() -> None:
    method = made(space_of(4, 4))
    moved = method.apply(np.zeros(8, np.float32), 1, Blocks(np.array([2, 2]), f32(1, 0, 1, 0)))
    assert not np.allclose(moved[:4], moved[4:])


def test_a_step_of_another_number_of_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 blocks, want 3"):
        made().apply(START, 1, Blocks(np.array([2, 2]), f32(1, 2, 3, 4)))


# --- clients together -----------------------------------------------------------------


def test_coefficients_of_clients_with_other_counts_meet_at_their_places() -> None:
    """Weights 1 : 3 and lr 2; what a client did not send counts as 0."""
    method = made(projections=4, lr=2.0)
    one = Blocks(np.array([4, 2, 2]), f32(1, 2, 3, 4, 10, 20, 100, 200))
    other = Blocks(np.array([2, 4, 3]), f32(-1, -2, 1, 2, 3, 4, 8, 16, 24))
    s, step = method.aggregate(None, START, 1, [given_by(one, 8), given_by(other, 24, 6)])
    assert s is None
    assert isinstance(step, Blocks)
    assert step.counts.tolist() == [4, 4, 3]
    expected = [
        *((1 - 3) / 2, (2 - 6) / 2, 3 / 2, 4 / 2),
        *((10 + 3) / 2, (20 + 6) / 2, 9 / 2, 12 / 2),
        *((100 + 24) / 2, (200 + 48) / 2, 72 / 2),
    ]
    assert step.values.tolist() == expected


def test_a_step_on_the_sum_is_the_mean_of_the_clients_steps() -> None:
    method = made(projections=8)
    changes = [np.linspace(1, 3, 12) ** 3, np.linspace(-4, 1, 12)]
    parts = [sent_by(method, c.astype(np.float32)) for c in changes]
    assert parts[0].counts.tolist() != parts[1].counts.tolist()

    def end(got: list[Contribution]) -> Exact:
        step = method.aggregate(None, START, 1, got)[1]
        return method.apply(START, 1, step).astype(np.float64)

    one, three = given_by(parts[0], 5), given_by(parts[1], 15, 1)
    np.testing.assert_allclose(
        end([one, three]), 0.25 * end([one]) + 0.75 * end([three]), rtol=1e-4, atol=1e-4
    )


def test_no_momentum_is_carried_from_round_to_round() -> None:
    method = made(projections=8, local=Sgd(lr=0.1))
    assert method.init(START) == (None, None)
    first, second = play(method, {0: towards(-START)}, START, 2)
    assert (first.state, second.state) == (None, None)
    sent = sent_by(made(projections=8), 0.1 * (first.x + START), round=2)
    _, step = method.aggregate(None, first.x, 2, [given_by(sent)])
    np.testing.assert_allclose(method.apply(first.x, 2, step), second.x, rtol=1e-4, atol=1e-5)


def test_an_aggregate_of_no_updates_is_an_error() -> None:
    with pytest.raises(ValueError, match="no updates"):
        made().aggregate(None, START, 1, [])


# --- what the reconstruction is worth -------------------------------------------------

SIZES, K, ROUNDS = (20, 21, 22), 40, 100


def samples(scale: str) -> tuple[Exact, Exact, Exact]:
    """Slope, relative squared error and cosine, each (rounds, blocks); K_l = 40, 20, 10."""
    space, rng = space_of(*SIZES), np.random.default_rng(0)
    parts = [rng.normal(size=d) for d in SIZES]
    norms = [1, 0.51, 0.26]  # a little above, as the whole part of K norm is taken
    deltas = [n * p / np.linalg.norm(p) for n, p in zip(norms, parts, strict=True)]
    change = np.concatenate(deltas).astype(np.float32)
    method = made(space, projections=K, scale=scale)
    assert sent_by(method, change).counts.tolist() == [40, 20, 10]
    out = []
    for round in range(1, ROUNDS + 1):
        found = rebuilt(method, change, round)
        for (i, j), delta in zip(cut(space), deltas, strict=True):
            tilde, square = found[i:j], delta @ delta
            out.append(
                (
                    tilde @ delta / square,
                    (tilde - delta) @ (tilde - delta) / square,
                    tilde @ delta / np.sqrt(square * (tilde @ tilde)),
                )
            )
    slope, mse, cosine = np.array(out).reshape(ROUNDS, 3, 3).transpose(2, 0, 1)
    return slope, mse, cosine


def assert_means(found: Exact, expected: Exact | list[float]) -> None:
    """Within five standard errors."""
    error = found.std(axis=0) / ROUNDS**0.5
    assert (np.abs(found.mean(axis=0) - expected) < 5 * error).all()
    assert (error < 0.1 * np.abs(expected)).all()  # so that a wrong factor would show


def test_the_papers_constant_is_unbiased_in_every_block_with_the_error_of_theory() -> None:
    """Slope 1.  With E u^2 = 1/3 and E u^4 = 1/5, E |Delta~|^2 = |Delta|^2 (1 + (d - 0.2) / K)."""
    slope, mse, cosine = samples("paper")
    assert_means(slope, [1, 1, 1])
    assert_means(mse, [(20 - 0.2) / 40, (21 - 0.2) / 20, (22 - 0.2) / 10])
    theory = [math.sqrt(k / (k + d)) for k, d in zip((40, 20, 10), SIZES, strict=True)]
    np.testing.assert_allclose(cosine.mean(axis=0), theory, rtol=0.05)


def test_the_codes_constant_is_a_third() -> None:
    """And so its error is (1 - 1/3)^2 + ((d - 0.2) / K) / 9."""
    slope, mse, _ = samples("code")
    assert_means(slope, [1 / 3] * 3)
    ds = np.array([20, 21, 22]) - 0.2
    assert_means(mse, 4 / 9 + ds / np.array([40, 20, 10]) / 9)


def test_the_uniform_basis_has_the_variance_of_the_papers_truncated_normal_to_order_1_over_d() -> (
    None
):
    """rho = Var(v) for v normal and cut at 1 / sqrt(d), so 1 / rho = 3 d + 0.4; ours is 3 d."""
    for d in (16, 100, 1000):
        a = d**-0.5
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        rho = 1 - 2 * a * density / math.erf(a / math.sqrt(2))
        assert 1 / rho == pytest.approx(3 * d + 0.4, abs=2e-2)
        if d == 100:
            assert rho == pytest.approx(0.0033288910, abs=1e-10)
    u = noise.uniforms(noise.key("basis", 1, 1, 0, 0), 0, 200_000).astype(np.float64)
    assert np.abs(u).max() < 1
    assert float((u**2).mean()) == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / 200_000))
    assert float((u**4).mean()) == pytest.approx(1 / 5, abs=5 * math.sqrt(16 / 225 / 200_000))


# --- the wire -------------------------------------------------------------------------


@pytest.mark.parametrize(("coding", "nbytes"), [("f32", 4 * 14), ("f16", 1 + 2 * 14)])
def test_an_update_is_two_bytes_a_block_and_two_or_four_a_coefficient(
    coding: Literal["f32", "f16"], nbytes: int
) -> None:
    change = f32(1, 0, 0, 0, -2, 0, 0, 0, 0, 0, 4, 0)
    method = made(projections=8, coding=coding)
    sent = sent_by(method, change)
    _, step = method.aggregate(None, START, 1, [given_by(sent)])
    assert sent.counts.tolist() == [2, 4, 8]
    assert spec_of(sent).nbytes == spec_of(step).nbytes == 2 * 3 + nbytes


@pytest.mark.parametrize("size", [1e-15, 1e-7, 1.0, 1e9])
def test_half_precision_keeps_eleven_bits_of_coefficients_of_any_size(size: float) -> None:
    change = (size * np.linspace(1, 3, 12)).astype(np.float32)
    full = sent_by(made(projections=8), change)
    half = over_the_wire(sent_by(made(projections=8, coding="f16"), change))
    assert isinstance(half, Blocks)
    assert half.coding == "f16"
    assert half.counts.tolist() == full.counts.tolist()
    assert half.counts.max() == 8
    largest = float(np.abs(full.values).max())
    error = np.abs(half.values.astype(np.float64) - full.values)
    assert (error <= np.maximum(np.abs(full.values) * 2.0**-11, largest * 2.0**-24)).all()
    assert error.max() > 0


def test_a_step_is_rounded_as_it_is_sent_so_all_replicas_apply_the_same() -> None:
    method = made(projections=8, coding="f16")
    parts = [
        given_by(sent_by(method, c.astype(np.float32)), n, n)
        for n, c in [(1, np.linspace(1, 3, 12)), (2, np.linspace(-4, 1, 12))]
    ]
    _, step = method.aggregate(None, START, 1, parts)
    here, there = method.apply(START, 1, step), method.apply(START, 1, over_the_wire(step))
    assert digest(here) == digest(there)


def test_a_replica_needs_the_steps_alone_for_the_same_bits() -> None:
    method, replica = made(projections=8, local=Sgd(lr=0.1)), made(lr=9.0, scale="code")
    x = START
    for r in play(method, {0: towards(-START), 4: towards(2 * START)}, START, 4, examples={4: 3}):
        x = replica.apply(x, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)


def test_threads_change_no_bit_of_an_update() -> None:
    space = space_of(200_000, 70_000)
    change = np.linspace(-1, 2, space.size).astype(np.float32)
    before, found = kernels._num_threads, set()
    try:
        for threads in (1, 3):
            kernels.use_threads(threads)
            sent = sent_by(made(space, projections=3), change)
            found.add((sent.values.tobytes(), made(space).apply(change, 1, sent).tobytes()))
    finally:
        kernels.use_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (Blocks(np.array([2, 4, 8]), np.ones(14, np.float32)), None),
        (Blocks(np.array([8, 8, 8]), np.ones(24, np.float32)), None),
        (Blocks(np.array([2, 4, 9]), np.ones(15, np.float32)), "2 to 8 coefficients"),
        (Blocks(np.array([1, 4, 8]), np.ones(13, np.float32)), "2 to 8 coefficients"),
        (Blocks(np.array([0, 4, 8]), np.ones(12, np.float32)), "2 to 8 coefficients"),
        (Blocks(np.array([4, 8]), np.ones(12, np.float32)), "2 blocks, want 3"),
        (Blocks(np.array([], np.int64), f32()), "0 blocks, want 3"),
        (Blocks(np.array([2, 4, 8]), np.ones(14, np.float32), "f16"), "want blocks of f32"),
    ],
)
def test_accepts(payload: Payload, why: str | None) -> None:
    said = made(projections=8).accepts(Assignment(0), payload)
    assert said is None if why is None else why in str(said)


def test_a_client_that_changed_nothing_is_accepted_and_moves_nothing() -> None:
    method = made(projections=8)
    sent = sent_by(method, 0 * START)
    assert not sent.values.any()
    assert method.accepts(Assignment(0), over_the_wire(sent)) is None
    assert rebuilt(method, 0 * START, 1).tolist() == [0] * 12


def test_fewer_projections_than_every_block_gets_are_refused() -> None:
    for k, fine in [(1, False), (2, True), (65_535, True), (65_536, False)]:
        table = {"name": "ferret", "projections": k}
        if fine:
            decode_settings(table)
        else:
            with pytest.raises(ExperimentError, match="projections"):
                decode_settings(table)
