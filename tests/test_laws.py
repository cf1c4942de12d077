"""Laws that hold for every method.  A new method is one row in ``ROWS``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalgos import guard
from fedalgos.allreduce import FedAvgAllreduce
from fedalgos.baffle import Baffle
from fedalgos.decomfl import DeComFL
from fedalgos.fedavg import FedAvg
from fedalgos.fedfgd import FedFGD
from fedalgos.fedkseed import FedKSeed
from fedalgos.fedmezo import FedMezo
from fedalgos.ferret import Ferret
from fedalgos.ffalora import FfaLora
from fedalgos.flasc import Flasc
from fedalgos.fwdllm import FwdLLM
from fedalgos.hetlora import HetLora
from fedalgos.limits import Limit, lowered
from fedalgos.method import Contribution, Method, Work
from fedalgos.optim import Adam, Moments, Sgd, Yogi
from fedalgos.privacy import Dp
from fedalgos.pruned import AdapterLth, FedSelect, SparseAdapter
from fedalgos.registry import AnySettings, build
from fedalgos.robust import Clip, Median, TrimmedMean
from fedalgos.space import ParamSpace, digest
from fedalgos.spry import Spry
from fedalgos.state import dump, load
from protocol.parts import TensorInfo
from protocol.payload import (
    Blocks,
    Dense,
    Flat,
    Payload,
    Run,
    Scalars,
    Sparse,
    decode,
    encode,
    spec_of,
)
from protocol.wire import RemoteProtocolError
from tests.oracles import Quadratic, over_the_wire, play, space_of, towards

SEED = 11
FOUR = space_of(5, 2, 3, 2)  # more units than the two clients below
ONE = space_of(12)  # fewer
HEADED = ParamSpace.of(
    [TensorInfo(f"t{i}" + ".lora_A.w" * (i < 3), (n,), f"u{i}") for i, n in enumerate((5, 2, 3, 2))]
)
LORA = ParamSpace.of(  # the goal of A below is zero
    [
        TensorInfo("t0.lora_B.w", (5, 1), "u0"),
        TensorInfo("t0.lora_A.w", (1, 2), "u0"),
        TensorInfo("t1", (5,), "u1"),
    ]
)
PAIR = ParamSpace.of(
    [
        TensorInfo("t0.lora_A.w", (2, 3), "u0"),
        TensorInfo("t0.lora_B.w", (2, 2), "u0"),
        TensorInfo("t1", (2,), "u1"),
    ]
)
STEPS = 4
SECRET = bytes(32)  # of the coordinator, the same for every seed
# commits in round 1, not in round 2, and within three attempts
PACED = partial(FwdLLM, lr=0.3, perturbations=4, gate="compat", threshold=1.4, max_attempts=3)


def sparse(kind: Callable[..., AnySettings], **settings: Any) -> AnySettings:
    """A sparse method at rates that suit the quadratics."""
    return kind(**{"steps": STEPS, "local": Sgd(lr=0.1), "server": Sgd(lr=0.5)} | settings)


class Made(NamedTuple):
    method: Method[Any]
    space: ParamSpace


Row = Callable[[int], Made]  # from the run's seed


def row(o: AnySettings, space: ParamSpace = FOUR) -> Row:
    return lambda seed: Made(build(o, space, seed, SECRET), space)


ROWS: dict[str, Row] = {
    "fedavg": row(FedAvg(steps=STEPS)),
    "fedavg-allreduce": row(FedAvgAllreduce(steps=STEPS)),
    "fedavg, change": row(FedAvg(steps=STEPS, sends="change")),
    "fedavg, split, change": row(FedAvg(steps=STEPS, split=True, sends="change")),
    "fedavg, adam": row(FedAvg(steps=STEPS, server=Adam(lr=0.05))),
    "fedavg, yogi": row(FedAvg(steps=STEPS, server=Yogi(lr=0.05))),
    "fedavg, momentum": row(FedAvg(steps=STEPS, server=Sgd(lr=0.5, momentum=0.5))),
    "fedavg, split": row(FedAvg(steps=STEPS, split=True)),
    "fedavg, split, M > U, yogi": row(FedAvg(steps=STEPS, split=True, server=Yogi(lr=0.05)), ONE),
    "fedavg, split, balanced, head all": row(
        FedAvg(steps=STEPS, split=True, assign="balanced", head="all"), HEADED
    ),
    "fedavg, split, head own": row(FedAvg(steps=STEPS, split=True, head="own"), HEADED),
    "fedavg, median": row(FedAvg(steps=STEPS, robust=Median())),
    "fedavg, clipped, yogi": row(FedAvg(steps=STEPS, server=Yogi(lr=0.05), robust=Clip(norm=1.0))),
    "fedmezo, scalars": row(FedMezo(steps=STEPS, lr=0.02)),
    "fedmezo, weights": row(FedMezo(steps=STEPS, lr=0.02, wire="weights")),
    "fedmezo, five-round": row(FedMezo(steps=STEPS, lr=0.02, signal="five-round")),
    "fedmezo, model-diff": row(FedMezo(steps=STEPS, lr=0.02, signal="model-diff")),
    "fedmezo, weights, trimmed, round-wise": row(
        FedMezo(
            steps=STEPS,
            lr=0.02,
            wire="weights",
            signal="round-wise",
            robust=TrimmedMean(byzantine=0),
        )
    ),
    "fedkseed": row(FedKSeed(steps=STEPS, lr=0.02, candidates=32)),
    "fedkseed, few": row(FedKSeed(steps=STEPS, lr=0.02, candidates=4096)),
    "fedkseed, pro": row(FedKSeed(steps=STEPS, lr=0.02, candidates=32, pro=True)),
    "decomfl": row(DeComFL(steps=STEPS, lr=0.05, perturbations=2)),
    "decomfl, forward": row(DeComFL(steps=STEPS, lr=0.05, perturbations=2, scheme="forward")),
    "decomfl, median": row(DeComFL(steps=STEPS, lr=0.05, perturbations=2, robust=Median())),
    "baffle": row(Baffle(steps=STEPS, lr=0.3, perturbations=6)),
    "fwdllm": row(FwdLLM(steps=STEPS, lr=0.3, perturbations=6, threshold=4.0)),
    "fwdllm, jvp": row(FwdLLM(lr=0.3, perturbations=6, estimator="jvp", gate="none")),
    "fwdllm, one tensor": row(PACED(perturbations=6, tensor=1, threshold=0.4)),
    "fwdllm, best quarter": row(PACED(lr=0.1, keep=0.25)),
    "fwdllm, more perturbations": row(PACED(grow="perturbations")),
    "ferret": row(Ferret(steps=STEPS, local=Sgd(lr=0.05), projections=8)),
    "ferret, as coded": row(
        Ferret(steps=STEPS, local=Sgd(lr=0.05), projections=8, scale="code", coding="f16", lr=3.0)
    ),
    "ferret, clipped": row(Ferret(steps=STEPS, local=Sgd(lr=0.05), projections=8, robust=Clip())),
    "spry, M < U": row(Spry(steps=STEPS, local=Sgd(lr=0.02), server=Sgd(lr=1.0))),
    "spry, M > U": row(Spry(steps=STEPS, local=Sgd(lr=0.02), server=Sgd(lr=1.0)), ONE),
    "spry, K = 4, yogi": row(
        Spry(steps=STEPS, perturbations=4, local=Sgd(lr=0.05), server=Yogi(lr=0.05))
    ),
    "spry, balanced": row(
        Spry(steps=STEPS, assign="balanced", local=Sgd(lr=0.02), server=Sgd(lr=1.0))
    ),
    "spry, head all": row(
        Spry(steps=STEPS, head="all", local=Sgd(lr=0.02), server=Sgd(lr=1.0)), HEADED
    ),
    "spry, head own": row(
        Spry(steps=STEPS, head="own", local=Sgd(lr=0.02), server=Sgd(lr=1.0)), HEADED
    ),
    "spry, scalars": row(Spry(wire="scalars", local=Sgd(lr=0.05), server=Sgd(lr=1.0))),
    "spry, scalars, M > U": row(Spry(wire="scalars", local=Sgd(lr=0.05), server=Sgd(lr=1.0)), ONE),
    "spry, scalars, K = 4, momentum": row(
        Spry(
            wire="scalars",
            perturbations=4,
            local=Sgd(lr=0.1),
            server=Sgd(lr=0.5, momentum=0.5),
        )
    ),
    "spry, scalars, yogi": row(
        Spry(wire="scalars", perturbations=4, local=Sgd(lr=0.1), server=Yogi(lr=0.05))
    ),
    "spry, scalars, balanced, head all": row(
        Spry(
            wire="scalars",
            assign="balanced",
            head="all",
            local=Sgd(lr=0.05),
            server=Sgd(lr=1.0),
        ),
        HEADED,
    ),
    "spry, scalars, head own": row(
        Spry(wire="scalars", head="own", local=Sgd(lr=0.05), server=Sgd(lr=1.0)), HEADED
    ),
    "spry, scalars, clipped": row(
        Spry(wire="scalars", local=Sgd(lr=0.05), server=Sgd(lr=1.0), robust=Clip(norm=10.0))
    ),
    "fedfgd": row(FedFGD(steps=STEPS, local=Sgd(lr=0.02), server=Sgd(lr=1.0))),
    "fedfgd, scalars": row(FedFGD(wire="scalars", local=Sgd(lr=0.05), server=Sgd(lr=1.0))),
    "fedfgd, scalars, yogi": row(
        FedFGD(wire="scalars", perturbations=4, local=Sgd(lr=0.1), server=Yogi(lr=0.05))
    ),
    "flasc, all": row(
        Flasc(
            steps=STEPS,
            density_down=1.0,
            density_up=1.0,
            local=Sgd(lr=0.1),
            server=Adam(lr=0.05),
        )
    ),
    "flasc, median": row(sparse(Flasc, density_down=0.5, density_up=0.5, robust=Median())),
    "flasc, 8 bits, clipped": row(sparse(Flasc, coding_up="int8", robust=Clip())),
    "flasc, a quarter": row(Flasc(steps=STEPS, local=Sgd(lr=0.1), server=Sgd(lr=0.5))),
    "flasc, 16 bits": row(sparse(Flasc, coding_down="f16", coding_up="bf16")),
    "flasc, 8 bits": row(  # of few values, rounding up or down may come out alike
        sparse(Flasc, density_down=1.0, density_up=1.0, coding_down="int8", coding_up="int8")
    ),
    "flasc, 8 bits up, error feedback": row(sparse(Flasc, coding_up="int8", error_feedback=True)),
    "flasc, 16 bits, tiers": row(sparse(Flasc, tiers=(0.25, 1.0), coding_down="f16")),
    "flasc, tiers": row(sparse(Flasc, tiers=(0.25, 1.0))),
    "flasc, error feedback, head outside": row(
        sparse(Flasc, density_down=0.5, density_up=0.1, error_feedback=True, head="outside"), HEADED
    ),
    "flasc, private": row(sparse(Flasc, dp=Dp(clip=1.0, noise_multiplier=0.01))),
    "sparse-adapter": row(sparse(SparseAdapter)),
    "sparse-adapter, momentum": row(sparse(SparseAdapter, server=Sgd(lr=0.3, momentum=0.5))),
    "adapter-lth": row(sparse(AdapterLth, decay=0.5, every=60)),
    "fedselect": row(sparse(FedSelect)),
    "fedselect, private": row(sparse(FedSelect, dp=Dp(clip=1.0, noise_multiplier=0.01))),
    "ffa-lora": row(sparse(FfaLora), LORA),
    "hetlora": row(sparse(HetLora, ranks=(1, 2)), PAIR),
    "hetlora, owners by norm": row(
        sparse(HetLora, ranks=(1, 2), mean="owners", weight="norm"), PAIR
    ),
}
MASKED = ("flasc", "sparse-adapter", "adapter-lth", "fedselect", "hetlora")
DRAWS = {name for name in ROWS if not name.startswith(("fedavg", "ffa-lora", *MASKED))}
DRAWS |= {name for name in ROWS if name.startswith("flasc, 8 bits")}  # what to round up
WHOLE = ("fedavg", "fedmezo, weights", "fedfgd", *MASKED)
PARTS = {"fedfgd, scalars"} | {name for name in ROWS if name.startswith("fedavg, split")}
ABSOLUTE = {name for name in ROWS if name.startswith(WHOLE)} - PARTS
FROM_START = {name for name in ROWS if name.startswith(("fedkseed", "ffa-lora"))}
each_method = pytest.mark.parametrize("made", [r(SEED) for r in ROWS.values()], ids=ROWS.keys())
each_row = pytest.mark.parametrize("name", ROWS)

# two clients that agree on the quarter of the coordinates that matters
GOAL = np.array([3, 0, 0, -2, 0, 0, 0, 0, 1, 0, 0, 0], np.float32)
APART = np.linspace(-0.2, 0.2, 12).astype(np.float32)
CLIENTS = {3: towards(GOAL + APART), 8: towards(GOAL - APART)}
START = np.linspace(-0.1, 0.1, 12).astype(np.float32)
EXAMPLES = {3: 5, 8: 7}


def batches(client: int, round: int) -> list[Any]:
    return [None] * STEPS


def frozen(x: Flat) -> Flat:
    x = x.copy()
    x.flags.writeable = False  # any in-place write now raises
    return x


def contributions(made: Made, x: Flat, round: int = 1) -> list[Contribution]:
    """What the two clients send, each after local training from ``x``."""
    out = []
    for a in made.method.plan(made.method.init(x)[0], round, list(CLIENTS)):
        sent, loss = made.method.local(x, CLIENTS[a.client], batches(0, 0), Work(round, a))
        assert np.isfinite(loss)
        out.append(Contribution(a, EXAMPLES[a.client], sent))
    return out


def one_round(made: Made) -> tuple[Any, Flat, Any, Payload]:
    """State and parameters before a round, state and step after it."""
    state, published = made.method.init(frozen(START))
    x = START if published is None else made.method.apply(START, 0, published)
    after, step = made.method.aggregate(state, frozen(x), 1, contributions(made, x))
    return state, x, after, step


def bits(value: object) -> object:
    """A state's every number, comparable."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tobytes())
    if isinstance(value, Moments):
        return (bits(value.m), bits(value.v), value.steps)
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: bits(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, float):
        return value.hex()
    return value


def freeze(value: object) -> None:
    """Make every array of a state read-only."""
    if isinstance(value, np.ndarray):
        value.flags.writeable = False
    elif isinstance(value, dict):
        for v in value.values():
            freeze(v)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            freeze(getattr(value, name))


@each_method
@settings(max_examples=20)
@given(cohort=st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
def test_plan_gives_each_client_once_and_covers_every_unit(made: Made, cohort: list[int]) -> None:
    plan = made.method.plan(made.method.init(START)[0], 1, cohort)
    assert [a.client for a in plan] == cohort
    everything = set(range(len(made.space.units)))
    held = [set(a.units) or everything for a in plan]
    assert set().union(*held) == everything
    assert all(len(a.units) == len(set(a.units)) for a in plan)


@each_method
def test_local_borrows_the_parameters_and_answers_what_is_accepted(made: Made) -> None:
    for c in contributions(made, frozen(START)):
        assert made.method.accepts(c.assignment, c.payload) is None
        assert c.payload.values.dtype == np.float32


@each_method
@settings(max_examples=20)
@given(cohort=st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
def test_limits_that_nobody_comes_near_change_no_plan(made: Made, cohort: list[int]) -> None:
    state, _ = made.method.init(START)
    plan = made.method.plan(state, 1, cohort)
    assert made.method.fit(state, plan, {}) == plan
    assert made.method.fit(state, plan, dict.fromkeys(cohort, Limit(1 << 30, 9))) == plan


@each_method
@settings(max_examples=20, deadline=None)
@given(rooms=st.tuples(st.integers(0, 99), st.integers(0, 99)), clients=st.integers(1, 3))
def test_a_round_within_limits_is_a_round_and_takes_no_more_than_they_say(
    made: Made, rooms: tuple[int, int], clients: int
) -> None:
    """Wherever the least that the method can ask for fits; ``clients`` of a node all answer."""
    method, takes = made.method, made.method.takes
    state, published = method.init(START)
    x = START if published is None else method.apply(START, 0, published)
    least = 0 if takes is None else takes(0).down + clients * takes(0).up
    limits = {c: Limit(least + room, clients) for c, room in zip(CLIENTS, rooms, strict=True)}
    plan = method.fit(state, method.plan(state, 1, list(CLIENTS)), limits)
    assert [a.client for a in plan] == list(CLIENTS)
    sent = []
    for a in plan:
        value, _ = method.local(x, CLIENTS[a.client], batches(0, 0), Work(1, a))
        assert method.accepts(a, value) is None
        sent.append(Contribution(a, EXAMPLES[a.client], value))
    _, step = method.aggregate(state, x, 1, sent)
    if takes is None:
        return
    for c in sent:
        limit = limits[c.assignment.client]
        tier = lowered(method.tier_of(c.assignment.client), takes, limit)
        down = spec_of(method.view(step, tier)).nbytes
        assert down + clients * spec_of(c.payload).nbytes <= limit.nbytes


def others(payload: Payload) -> Iterator[Payload]:
    """Payloads of another kind or size, as like to this one as can be."""
    v = payload.values
    n = len(v)
    match payload:
        case Dense(units=units):
            yield Dense(v[:-1], units)
            yield Dense(np.append(v, v[:1]), units)
            yield Dense(v, (*units, 0))
        case Sparse(size=size, places=places, coding=coding):
            yield Sparse(size, places[:-1], v[:-1], coding)
            yield Sparse(size + 1, places, v, coding)
            yield Sparse(size, places, v, "f32" if coding == "f16" else "f16")
        case Scalars(runs=runs):
            (run,) = runs
            yield Scalars((Run(run.client, n - 1),), v[:-1])
            yield Scalars((Run(run.client + 1, n),), v)
            yield Scalars((Run(run.client, n, 2.0),), v)
            yield Scalars((run, run), np.append(v, v))
            yield Scalars((Run(run.client, n, 1.0, 2.0),), v)
            yield Scalars((Run(run.client, n, picks=(5,)),), v)
        case Blocks(counts=counts, coding=width):
            yield Blocks(counts[:-1], v[: -counts[-1]], width)
            yield Blocks(np.append(counts, 2), np.append(v, v[:2]), width)
            yield Blocks(np.full_like(counts, 9), np.resize(v, 9 * len(counts)), width)
            yield Blocks(np.full_like(counts, 1), np.resize(v, len(counts)), width)
            yield Blocks(counts, v, "f32" if width == "f16" else "f16")
    if not isinstance(payload, Dense):
        yield Dense(v)
    if not isinstance(payload, Sparse):
        yield Sparse(n, np.arange(n), v)
    if not isinstance(payload, Scalars):
        yield Scalars((Run(3, n),), v)
    if not isinstance(payload, Blocks):
        yield Blocks(np.array([n]), v)


@each_method
def test_a_payload_of_another_kind_or_size_is_not_accepted(made: Made) -> None:
    for c in contributions(made, START):
        for other in others(c.payload):
            assert made.method.accepts(c.assignment, other) is not None, other


@each_method
def test_the_wire_is_exact_and_the_size_is_known_beforehand(made: Made) -> None:
    for c in contributions(made, START):
        spec = spec_of(c.payload)
        back = decode(spec, encode(c.payload))
        assert len(encode(c.payload)) == spec.nbytes
        assert spec_of(back) == spec
        assert bytes(encode(back)) == bytes(encode(c.payload))
        assert made.method.accepts(c.assignment, back) is None


@each_method
def test_a_value_that_is_not_finite_does_not_get_over_the_wire(made: Made) -> None:
    for c in contributions(made, START):
        sent = owned(c.payload)
        sent.values[-1] = np.nan
        with pytest.raises((ArithmeticError, RemoteProtocolError), match="not finite"):
            over_the_wire(sent)


def owned(payload: Payload) -> Payload:
    """A copy that nobody else holds, so that a weak reference tells who does."""
    match payload:
        case Dense(values=v, units=units):
            return Dense(v.copy(), units)
        case Sparse(size=size, places=places, values=v, coding=coding):
            return Sparse(size, places.copy(), v.copy(), coding)
        case Scalars(runs=runs, values=v):
            return Scalars(runs, v.copy())
        case Blocks(counts=counts, values=v, coding=width):
            return Blocks(counts, v.copy(), width)


@each_method
def test_aggregate_consumes_lazily_and_holds_one_update_at_a_time(made: Made) -> None:
    """The rule: what grows with the model is held once.

    Scalars do not, and a step made of scalars has to repeat them all, so a method may
    hold those; a dense or sparse payload must be gone before the next but one is asked for.
    A robust rule has to see all of them.
    """
    if made.method.aggregate.__module__ == guard.__name__:
        return
    x = START
    ready = contributions(made, x)
    alive: list[weakref.ref[Flat]] = []

    def arriving() -> Iterator[Contribution]:
        for i in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            c = ready[i % 2]
            payload = owned(c.payload)
            if not isinstance(payload, Scalars):
                alive.append(weakref.ref(payload.values))
            yield Contribution(c.assignment, c.examples, payload)
            del payload

    made.method.aggregate(made.method.init(x)[0], x, 1, arriving())


@each_method
def test_aggregate_mutates_neither_parameters_nor_state_nor_updates(made: Made) -> None:
    _, x, state, _ = one_round(made)
    x = frozen(x)
    freeze(state)
    before, updates = bits(state), contributions(made, x, round=2)
    for c in updates:
        c.payload.values.flags.writeable = False
    sent = [c.payload.values.tobytes() for c in updates]
    after, _ = made.method.aggregate(state, x, 2, updates)
    assert bits(state) == before
    assert [c.payload.values.tobytes() for c in updates] == sent
    assert bits(after) == bits(made.method.aggregate(state, x, 2, updates)[0])


@each_method
def test_apply_mutates_nothing_keeps_float32_and_is_deterministic(made: Made) -> None:
    _, x, _, step = one_round(made)
    x = frozen(x)
    step.values.flags.writeable = False
    sent = step.values.tobytes()
    first, second = (made.method.apply(x, 1, step) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == x.shape
    assert first.tobytes() == second.tobytes() != x.tobytes()
    assert not np.shares_memory(first, x)
    assert not np.shares_memory(first, step.values)
    assert step.values.tobytes() == sent


@each_row
def test_a_step_gives_the_same_from_any_start_where_it_is_said_to_be_absolute(name: str) -> None:
    made = ROWS[name](SEED)
    onto = "nothing" if name in ABSOLUTE else "initial" if name in FROM_START else "previous"
    assert made.method.onto == onto
    state, x, _, _ = one_round(made)
    for answers in (contributions(made, x), contributions(made, x)[:1]):
        _, step = made.method.aggregate(state, x, 1, answers)
        here, there = (made.method.apply(a, 1, step) for a in (x, -7 * x + 1))
        if onto == "nothing":
            assert here.tobytes() == there.tobytes()
        elif not name.startswith(("spry", "fedavg, split")):  # whose steps may have all units
            assert here.tobytes() != there.tobytes()


@each_row
def test_a_replica_that_replays_all_steps_equals_the_coordinator_to_the_bit(name: str) -> None:
    made, replica = ROWS[name](SEED), ROWS[name](SEED).method
    online = list(play(made.method, CLIENTS, START, 5, examples=EXAMPLES, batches=batches))
    x = START
    for r in online:
        base = START if replica.onto == "initial" else x
        x = replica.apply(base, r.round, over_the_wire(r.step))
        assert digest(x) == digest(r.x)
    if replica.absolute:  # the last step says all
        base = START if replica.onto == "initial" else 0 * START
        assert digest(replica.apply(base, 5, online[-1].step)) == digest(x)


@each_row
def test_a_state_that_went_through_bytes_goes_on_as_if_it_had_not(name: str) -> None:
    def restarted(state: Any, kind: type[Any]) -> Any:
        plain, arrays = dump(state)
        return load(plain, [bytes(a.tobytes()) for a in arrays], kind)

    made, again = ROWS[name](SEED).method, ROWS[name](SEED).method
    kind = type(made.init(START)[0])
    resumed = replace(
        again, aggregate=lambda state, *rest: again.aggregate(restarted(state, kind), *rest)
    )
    resumed = replace(resumed, plan=lambda s, *rest: again.plan(restarted(s, kind), *rest))
    there = play(resumed, CLIENTS, START, 5, examples=EXAMPLES, batches=batches)
    for here in play(made, CLIENTS, START, 5, examples=EXAMPLES, batches=batches):
        r = next(there)
        assert digest(r.x) == digest(here.x)
        assert bits(restarted(r.state, kind)) == bits(here.state)
        assert made.metrics(restarted(r.state, kind)) == made.metrics(here.state)


@each_method
def test_figures_of_the_state_are_finite_and_change_nothing(made: Made) -> None:
    before, _, after, _ = one_round(made)
    for state in (before, after):
        freeze(state)
        figures = made.method.metrics(state)
        assert all(type(v) in (int, float) and np.isfinite(v) for v in figures.values())


@each_method
def test_two_clients_on_a_quadratic_converge(made: Made) -> None:
    *_, last = play(made.method, CLIENTS, START, 150, batches=batches)
    start, end = (float(((x - GOAL) ** 2).sum()) for x in (START, last.x))
    assert end < 0.02 * start


def trained(name: str, method_seed: int, data_seed: int) -> bytes:
    """The digest after three rounds; data are noise on a linear term."""

    def noisy(client: int, round: int) -> list[Any]:
        rng = np.random.default_rng([data_seed, client, round])
        return [rng.normal(size=12) for _ in range(STEPS)]

    clients = {c: Quadratic(o.c, o.a) for c, o in CLIENTS.items()}
    *_, last = play(ROWS[name](method_seed).method, clients, START, 3, batches=noisy)
    return digest(last.x)


@each_row
def test_the_same_seed_twice_gives_the_same_digest_and_another_seed_another(name: str) -> None:
    first = trained(name, 1, 1)
    assert first == trained(name, 1, 1)
    assert first != trained(name, 1, 2)  # other data
    assert (first != trained(name, 2, 1)) == (name in DRAWS)  # other directions, if it draws any


def test_every_method_of_the_registry_has_a_row() -> None:
    names = {name.split(",")[0] for name in ROWS}
    assert names == {o.__struct_config__.tag for o in AnySettings.__args__}
