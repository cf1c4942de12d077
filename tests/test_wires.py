"""Both wires of the forward-mode methods: by hand, and against one another to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace as having

from fedalgos import registry
from fedalgos.fedfgd import FedFGD, fedfgd
from fedalgos.forward import Forward
from fedalgos.method import Assignment, Contribution, Method, Oracle, Work
from fedalgos.optim import Adam, AdamW, Server, Sgd, Yogi
from fedalgos.registry import build
from fedalgos.space import digest
from fedalgos.split import State
from fedalgos.spry import Spry, spry
from node import device
from protocol import noise
from protocol.errors import ExperimentError
from protocol.payload import Dense, Flat, Run, Scalars
from tests.oracles import Quadratic, f32, over_the_wire, play, space_of, towards

SGD = Sgd(lr=0.1)
UP = Spry(wire="scalars", local=SGD, server=Sgd(lr=1.0))
SPACE = space_of(2, 3, 1)
X = f32(0.3, -0.1, 0.2, 0.5, -1.5, 2.0)


def z(seed: int, round: int, client: int, k: int, size: int = 6) -> Flat:
    return noise.normals(noise.key("direction", seed, round, client, 0, k), 0, size)


def answers(
    method: Method[Any], x: Flat, cohort: Sequence[int], oracle: Oracle, round: int = 1
) -> list[Contribution]:
    """What the cohort sends, in order of client; client c has c + 1 examples."""
    out = []
    for a in method.plan(method.init(x)[0], round, cohort):
        sent, loss = method.local(x, oracle, [None], Work(round, a))
        assert method.accepts(a, sent) is None
        out.append(Contribution(a, a.client + 1, over_the_wire(sent), loss))
    return sorted(out, key=lambda c: c.assignment.client)


def turned(method: Method[Any]) -> Method[Any]:
    """The same with the cohort drawn the other way round: slots against the clients' order."""
    return replace(method, plan=lambda s, round, cohort: method.plan(s, round, cohort[::-1]))


# --- by hand ---------------------------------------------------------------------


def test_a_round_of_scalars_by_hand() -> None:
    """Clients 5 and 2, K = 2, a linear loss: slot 0 has units 0 and 2, slot 1 unit 1."""
    g = f32(1, -2, 0.5, 3, -1, 2)
    o = having(UP, perturbations=2, server=Sgd(lr=0.5))
    method = spry(o, SPACE, 9)
    mask = {5: f32(1, 1, 0, 0, 0, 1), 2: f32(0, 0, 1, 1, 1, 0)}
    expected, sent = X.astype(np.float64), {}
    for client, m in mask.items():
        v = [(z(9, 1, client, k) * m).astype(np.float64) for k in range(2)]
        sent[client] = [float(g @ one) for one in v]
        g_hat = sum(jvp * one for jvp, one in zip(sent[client], v, strict=True)) / 2
        expected -= 0.5 * 0.1 * g_hat  # server's rate, client's rate
    got = answers(method, X, (5, 2), Quadratic(g))
    for c in got:
        assert isinstance(c.payload, Scalars)
        assert c.payload.runs == (Run(c.assignment.client, 2),)
        np.testing.assert_allclose(c.payload.values, sent[c.assignment.client], rtol=1e-5)
        assert c.loss == pytest.approx(float(g @ X), rel=1e-6)
    state, step = method.aggregate(State({}), X, 1, got)
    assert state == State({})
    assert isinstance(step, Scalars)
    assert step.runs == (Run(5, 2, 0.1, 6), Run(2, 2, 0.1, 3))  # in order of slot
    np.testing.assert_allclose(step.values, sent[5] + sent[2], rtol=1e-5)
    np.testing.assert_allclose(method.apply(X, 1, step), expected, rtol=1e-5)


def test_holders_of_a_unit_are_averaged_by_examples() -> None:
    """One unit and three clients: g = sum n_m jvp_m v_m / sum n_m."""
    g = f32(2, -1)
    method = spry(having(UP, server=Yogi()), space_of(2), 4)
    got = answers(method, f32(1, 1), (0, 3, 7), Quadratic(g))
    mean = np.zeros(2)
    for client in (0, 3, 7):
        v = z(4, 1, client, 0, 2).astype(np.float64)
        mean += (client + 1) * (g @ v) * v / (1 + 4 + 8)
    delta = -0.1 * mean
    state, step = method.aggregate(State({}), f32(1, 1), 1, got)
    assert isinstance(step, Dense)
    m, v = 0.1 * delta, 0.01 * delta**2
    np.testing.assert_allclose(step.values, 1 + 0.01 * m / (v**0.5 + 1e-3), rtol=1e-5)
    kept = state.moments[0]
    assert kept.m is not None
    assert kept.v is not None
    np.testing.assert_allclose(kept.m, m, rtol=1e-4)
    np.testing.assert_allclose(kept.v, v, rtol=1e-4)


def test_a_round_of_fedfgd_by_hand() -> None:
    """Everyone moves everything along a direction of its own; then the mean."""
    g = f32(1, -2, 0.5, 3, -1, 2)
    method = fedfgd(FedFGD(local=SGD, server=Sgd(lr=1.0)), SPACE, 2)
    got = answers(method, X, (1, 0), Quadratic(g))
    expected = np.zeros(6)
    for c in got:
        v = z(2, 1, c.assignment.client, 0).astype(np.float64)
        ends = X - 0.1 * (g @ v) * v
        np.testing.assert_allclose(c.payload.values, ends, rtol=1e-5)
        expected += c.examples * ends / 3
    _, step = method.aggregate(State({}), X, 1, got)
    assert isinstance(step, Dense)
    assert step.units == ()
    np.testing.assert_allclose(method.apply(0 * X, 1, step), expected, rtol=1e-5)


# --- one wire against the other --------------------------------------------------

SERVERS: list[Server] = [
    Sgd(lr=0.7),
    Sgd(lr=0.7, momentum=0.5),
    Yogi(lr=0.05),
    Adam(lr=0.05),
    AdamW(lr=0.01, weight_decay=0.1),
]
FIVE = {c: towards(f32(*np.linspace(-c, c, 6))) for c in range(5)}
WHICH: list[Forward] = [Spry(), Spry(assign="balanced"), FedFGD()]


@pytest.mark.parametrize("server", SERVERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("o", WHICH, ids=["cyclic", "balanced", "fedfgd"])
@pytest.mark.parametrize("num_clients", [1, 2, 5])
def test_scalars_give_the_bits_that_weights_would_have(
    o: Forward, server: Server, num_clients: int
) -> None:
    """One plain local step, whatever the server's optimiser; slots are not in client order."""
    clients = {c: FIVE[c] for c in range(num_clients)}
    digests = []
    for wire in ("weights", "scalars"):
        chosen = having(o, wire=wire, local=SGD, server=server, perturbations=3)
        method = turned(build(chosen, SPACE, 3))  # type: ignore[arg-type]  # one of the two
        examples = {c: 2 * c + 1 for c in clients}
        digests.append([digest(r.x) for r in play(method, clients, X, 4, examples=examples)])
    assert digests[0] == digests[1]


@dataclass(frozen=True)
class Torch(Quadratic):
    """Holds its vectors as a node does."""

    def start(self, x: Flat) -> Any:
        return torch.tensor(x)

    array = start

    def add_(self, x: Any, alpha: float, direction: noise.Direction) -> None:
        device.add_(x, alpha, direction)


def test_a_client_on_torch_gets_the_bits_of_a_server_on_numpy() -> None:
    big = space_of(700, 301)
    x = noise.normals(1, 0, big.size)
    clients = {c: Torch(noise.normals(2 + c, 0, big.size)) for c in range(3)}
    o = Spry(wire="scalars", local=Sgd(lr=0.0123), server=Sgd(lr=1.0), perturbations=3)
    (by_weights,) = play(spry(having(o, wire="weights"), big, 1), clients, x, 1)
    (by_scalars,) = play(spry(o, big, 1), clients, x, 1)
    assert digest(by_weights.x) == digest(by_scalars.x) != digest(x)


@pytest.mark.parametrize("wire", ["weights", "scalars"])
@pytest.mark.parametrize("fgd_wire", ["weights", "scalars"])
def test_one_client_with_all_units_and_sgd_is_fedfgd(wire: Any, fgd_wire: Any) -> None:
    """To the bit, whichever way either talks."""
    server, one = Sgd(lr=1.0), {4: towards(f32(1, 2, 3, 4, 5, 6))}
    mine = play(spry(Spry(wire=wire, local=SGD, server=server), SPACE, 3), one, X, 5)
    theirs = play(fedfgd(FedFGD(wire=fgd_wire, local=SGD, server=server), SPACE, 3), one, X, 5)
    assert [digest(r.x) for r in mine] == [digest(r.x) for r in theirs]


def test_what_comes_down_is_scalars_where_the_server_keeps_nothing() -> None:
    """The same new parameters either way: a momentum of nearly 0 is none in round 1."""
    kept = {}
    for server in (Sgd(lr=0.7), Sgd(lr=0.7, momentum=1e-30), Yogi()):
        method = spry(having(UP, server=server), SPACE, 1)
        assert method.onto == "previous"
        (kept[server],) = play(method, FIVE, X, 1)
    plain, dense, yogi = kept.values()
    assert [type(r.step) for r in (plain, dense, yogi)] == [Scalars, Dense, Dense]
    assert digest(plain.x) == digest(dense.x) != digest(yogi.x)
    assert fedfgd(FedFGD(), SPACE, 1).onto == "nothing"
    assert fedfgd(FedFGD(wire="scalars", local=SGD), SPACE, 1).onto == "nothing"
    plain_fgd = FedFGD(wire="scalars", local=SGD, server=Sgd(lr=1.0))
    assert fedfgd(plain_fgd, SPACE, 1).onto == "previous"


def test_the_server_draws_the_clients_directions_in_the_order_of_its_scalars() -> None:
    """TV16: jvp . v put together at the server is the client's g to the bit."""
    k, unit = 3, SPACE.units[1]

    class Watching(Quadratic):
        def jvp(self, x: Flat, directions: Sequence[noise.Direction], batch: object) -> Any:
            seen.extend(d.dense(6) for d in directions)
            return super().jvp(x, directions, batch)

        def add_(self, x: Flat, alpha: float, direction: noise.Direction) -> None:
            super().add_(x, alpha, direction)
            at_client[:] = x

    seen: list[Flat] = []
    at_client = np.zeros(6, np.float32)
    o = having(UP, perturbations=k)
    work = Work(1, Assignment(8, (1,)))
    spry(having(o, wire="weights"), SPACE, 5).local(X, Watching(X), [None], work)
    sent, _ = spry(o, SPACE, 5).local(X, Watching(X), [None], work)
    server = [z(5, 1, 8, j)[unit.start : unit.stop] for j in range(k)]
    for v, by_weights, by_scalars in zip(server, seen[:k], seen[k:], strict=True):
        assert v.tobytes() == by_weights[unit.start : unit.stop].tobytes()
        assert by_weights.tobytes() == by_scalars.tobytes()
        assert not by_weights[: unit.start].any()
    g = np.zeros(3, np.float32)
    for jvp, v in zip(sent.values, server, strict=True):
        g += jvp / np.float32(k) * v
    assert g.tobytes() == at_client[unit.start : unit.stop].tobytes()
    assert at_client.any()


# --- who is absent ---------------------------------------------------------------


@pytest.mark.parametrize("wire", ["weights", "scalars"])
@pytest.mark.parametrize("server", [Sgd(lr=1.0), Yogi()], ids=["sgd", "yogi"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_absent_client_leaves_its_units_alone_and_no_others(
    gone: int, wire: Any, server: Server
) -> None:
    """Slots 0, 1, 2 are clients 9, 4, 6 and units 0, 1, 2; one drops out in round 2."""
    o = Spry(wire=wire, local=SGD, server=server)
    method, oracle, cohort = spry(o, SPACE, 1), towards(0 * X), (9, 4, 6)
    first = answers(method, X, cohort, oracle)
    s, step = method.aggregate(State({}), X, 1, first)
    x = method.apply(X, 1, step)
    assert (x != X).all()
    second = answers(method, x, cohort, oracle, round=2)
    everyone = method.apply(x, 2, method.aggregate(s, x, 2, second)[1])
    without = [c for c in second if c.assignment.client != cohort[gone]]
    after, step = method.aggregate(s, x, 2, without)
    y = method.apply(x, 2, over_the_wire(step))
    rest = tuple(u for u in range(3) if u != gone)
    assert SPACE.take(y, (gone,)).tobytes() == SPACE.take(x, (gone,)).tobytes()
    assert SPACE.take(y, rest).tobytes() == SPACE.take(everyone, rest).tobytes()
    assert (SPACE.take(y, rest) != SPACE.take(x, rest)).all()
    if isinstance(step, Dense):
        assert step.units == rest
        assert after.moments[gone] is s.moments[gone]
        assert [after.moments[u].steps for u in range(3)] == [
            1 if u == gone else 2 for u in (0, 1, 2)
        ]
    else:
        runs = [Run(client, 1, 0.1, client + 1) for client in cohort]
        runs[gone] = Run(0, 0)
        assert isinstance(step, Scalars)
        assert step.runs == tuple(runs)


def test_sums_are_in_order_of_client_whatever_the_slots() -> None:
    """w = -P, b, P of clients 0, 1, 2: (-P + b) + P is 0 in fp64, where -P + P + b is b."""
    v = [z(1, 1, client, 0, 1)[0] for client in range(3)]
    jvp = {0: v[2] * 2**60, 1: f32(1)[0], 2: -v[0] * 2**60}  # so that the products are equal
    step = Scalars(tuple(Run(c, 1, 1.0) for c in (0, 2, 1)), f32(*(jvp[c] for c in (0, 2, 1))))
    assert spry(UP, space_of(1), 1).apply(f32(0), 1, step).tolist() == [0]


def test_a_step_of_no_reports_is_refused() -> None:
    for server in (Sgd(lr=1.0), Yogi()):
        with pytest.raises(ValueError, match="mean of no updates"):
            spry(having(UP, server=server), SPACE, 0).aggregate(State({}), X, 1, [])
    empty = Scalars((Run(0, 0), Run(0, 0)), f32())
    with pytest.raises(ValueError, match="mean of no updates"):
        spry(UP, SPACE, 0).apply(X, 1, empty)


def test_a_run_of_another_length_than_the_directions_is_refused() -> None:
    for count in (1, 3):
        step = Scalars((Run(1, count),), np.ones(count, np.float32))
        with pytest.raises(ValueError, match="2 keys"):
            spry(having(UP, perturbations=2), SPACE, 0).apply(X, 1, step)


# --- statistics ------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["weights", "scalars"])
def test_clients_that_share_a_unit_divide_its_error(wire: Any) -> None:
    """U = 1: E|g_hat - g|^2 = (d + 1)|g|^2 / M, within 5 standard errors."""
    space, g, rounds, start = space_of(4), f32(1, -2, 0.5, 1), 600, f32(0, 0, 0, 0)
    method = spry(Spry(wire=wire, local=Sgd(lr=1.0), server=Sgd(lr=1.0)), space, 6)
    for num_clients in (1, 8):
        cohort = {c: Quadratic(g) for c in range(num_clients)}
        xs = [start, *(r.x for r in play(method, cohort, start, rounds))]
        errors = (((np.array(xs[:-1]) - xs[1:]) - g) ** 2).sum(1)
        theory, standard_error = 5 * float(g @ g) / num_clients, errors.std() / rounds**0.5
        assert abs(errors.mean() - theory) < 5 * standard_error
        assert 5 * standard_error < 0.75 * theory  # so that another M would show


# --- settings --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spry", "fedfgd"])
@pytest.mark.parametrize(
    "wrong",
    [
        {},  # adamw is the default
        {"local": {"kind": "sgd", "lr": 0.1, "momentum": 0.5}},
        {"local": {"kind": "sgd", "lr": 0.1}, "steps": 2},
        {"local": {"kind": "sgd", "lr": 0.1}, "steps": 0},
        {"local": {"kind": "adamw", "lr": 0.1}},
    ],
)
def test_scalars_need_one_plain_step(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match="needs steps = 1 and local = ") as caught:
        registry.settings({"name": name, "wire": "scalars", **wrong})
    assert "\n" not in str(caught.value)
    registry.settings({"name": name, **wrong})  # with weights all of it is fine
    registry.settings({"name": name, "wire": "scalars", "local": {"kind": "sgd", "lr": 0.1}})


def test_the_baseline_has_no_units_to_deal() -> None:
    for key, value in (("assign", "balanced"), ("head", "all")):
        with pytest.raises(ExperimentError, match=f"unknown field `{key}`"):
            registry.settings({"name": "fedfgd", key: value})
    assert msgspec.structs.asdict(FedFGD()).items() <= msgspec.structs.asdict(Spry()).items()
