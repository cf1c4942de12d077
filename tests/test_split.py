"""Who gets which units, as laws and as the published tables; and each unit's own server step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalgos.fedavg import FedAvg, fedavg
from fedalgos.method import Assignment, Contribution, mean_of
from fedalgos.optim import Adam, AdamW, Moments, Server, Sgd, Yogi, server_step
from fedalgos.space import PIECE, ParamSpace
from fedalgos.split import (
    Head,
    State,
    head_units,
    means_of,
    plan,
    server_steps,
    split,
    spread,
    whole,
)
from fedalgos.spry import Spry, spry
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Dense, Flat
from tests.oracles import contribution, f32, space_of


def lora_space(sizes: list[int], head: set[int]) -> ParamSpace:
    """One tensor per unit: LoRA's, or the head's."""
    return ParamSpace.of(
        [
            TensorInfo(f"m.{i}.weight" if i in head else f"m.{i}.lora_A.weight", (n,), f"u{i}")
            for i, n in enumerate(sizes)
        ]
    )


# --- TV9: who gets which tensors; a unit is two tensors, a trailing odd one its own ------

ASSIGNED = {
    "bert-base": (50, {0: [0, 1, 20, 21, 40, 41], 4: [8, 9, 28, 29, 48, 49], 5: [10, 11, 30, 31]}),
    "distilbert": (
        28,
        {0: [0, 1, 20, 21], 2: [4, 5, 24, 25], 3: [6, 7, 26, 27], 4: [8, 9]},
    ),
    "roberta-large": (
        100,
        {
            8: [16, 17, 36, 37, 56, 57, 76, 77, 96, 97],
            9: [18, 19, 38, 39, 58, 59, 78, 79, 98, 99],
        },
    ),
    "llama": (129, {4: [8, 9, 28, 29, 48, 49, 68, 69, 88, 89, 108, 109, 128]}),
}


@pytest.mark.parametrize("model", ASSIGNED)
def test_units_go_to_slots_cyclically(model: str) -> None:
    num_tensors, slots = ASSIGNED[model]
    cohort = [100 + 7 * m for m in range(10)]
    assigned = plan(split(space_of(*[1] * ((num_tensors + 1) // 2))), cohort)
    assert [a.client for a in assigned] == cohort
    assert [(a.slot, a.num_slots) for a in assigned] == [(m, 10) for m in range(10)]
    for slot, tensors in slots.items():
        held = [t for u in assigned[slot].units for t in (2 * u, 2 * u + 1) if t < num_tensors]
        assert held == tensors


def test_with_more_clients_than_units_slots_start_over() -> None:
    assert split(space_of(*[1] * 50))(100) == tuple((m % 50,) for m in range(100))


# --- by hand ---------------------------------------------------------------------


def test_balanced_gives_the_largest_to_the_least_loaded() -> None:
    """5 -> slot 0, 4 -> 1, 3 -> 2, the other 3 -> 2, 1 -> 1; at loads 5, 5, 6 the last -> 0."""
    sizes = [3, 5, 1, 4, 3, 1]
    assert spread(range(6), 3, sizes) == ((1, 5), (2, 3), (0, 4))
    assert spread(range(6), 3) == ((0, 3), (1, 4), (2, 5))
    assert split(space_of(*sizes), "balanced")(3) == ((1, 5), (2, 3), (0, 4))


def test_of_equals_the_lower_number_and_the_lower_slot_go_first() -> None:
    assert spread((4, 7, 9), 2, [6] * 10) == ((4, 9), (7,))


def test_balanced_starts_over_as_the_cyclic_does() -> None:
    assert spread((0, 1), 5, [1, 9]) == spread((0, 1), 5) == ((0,), (1,), (0,), (1,), (0,))


HEADS: list[tuple[Head, int, list[tuple[int, ...]]]] = [
    ("one", 2, [(0, 2), (1, 3)]),
    ("all", 2, [(0, 2, 3), (1, 3)]),
    ("own", 2, [(0, 1, 2), (3,)]),
    ("all", 4, [(0, 3), (1, 3), (2, 3), (0, 3)]),
    ("own", 5, [(0,), (1,), (2,), (0,), (3,)]),
    ("all", 1, [(0, 1, 2, 3)]),
    ("own", 1, [(0, 1, 2, 3)]),
]


@pytest.mark.parametrize(("head", "num_slots", "slots"), HEADS)
def test_where_the_head_goes(head: Head, num_slots: int, slots: list[tuple[int, ...]]) -> None:
    space = lora_space([1, 1, 1, 9], {3})
    assert split(space, "cyclic", head)(num_slots) == tuple(slots)


def test_no_split_is_everything_for_everyone() -> None:
    assert plan(whole, (4, 2)) == (
        Assignment(4, slot=0, num_slots=2),
        Assignment(2, slot=1, num_slots=2),
    )


# --- laws ------------------------------------------------------------------------


@st.composite
def spaces(draw: st.DrawFn) -> ParamSpace:
    """LoRA units and head units in any order, at least one of each."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=12))
    numbers = st.integers(0, len(sizes) - 1)
    head = draw(st.sets(numbers, min_size=1, max_size=len(sizes) - 1))
    return lora_space(sizes, head)


counts = st.integers(1, 30)


@pytest.mark.parametrize("assign", ["cyclic", "balanced"])
@pytest.mark.parametrize("head", ["one", "all", "own"])
@given(space=spaces(), num_slots=counts)
def test_every_unit_is_held_and_every_slot_holds_some_once_and_in_order(
    assign: str, head: str, space: ParamSpace, num_slots: int
) -> None:
    deal = split(space, assign, head)  # type: ignore[arg-type]  # of the parameters above
    slots = deal(num_slots)
    assert slots == deal(num_slots)
    assert len(slots) == num_slots
    assert all(slots)
    assert all(list(units) == sorted(set(units)) for units in slots)
    assert {u for units in slots for u in units} == set(range(len(space.units)))


@pytest.mark.parametrize("assign", ["cyclic", "balanced"])
@given(space=spaces(), num_slots=counts)
def test_the_load_is_as_even_as_it_can_be(assign: str, space: ParamSpace, num_slots: int) -> None:
    slots = split(space, assign)(num_slots)  # type: ignore[arg-type]
    holders = Counter(u for units in slots for u in units)
    floor = num_slots // len(space.units)
    assert set(holders.values()) <= ({floor, floor + 1} if floor else {1})
    if assign == "cyclic":
        assert max(map(len, slots)) - min(map(len, slots)) <= 1
    elif not floor:  # a slot was the least loaded before it got its last, its smallest
        loads = [space.count(units) for units in slots]
        heaviest = slots[loads.index(max(loads))]
        assert max(loads) - min(loads) <= min(space.count((u,)) for u in heaviest)


@pytest.mark.parametrize("assign", ["cyclic", "balanced"])
@given(space=spaces(), num_slots=counts)
def test_the_policies_move_the_head_and_nothing_else(
    assign: str, space: ParamSpace, num_slots: int
) -> None:
    head = set(head_units(space))
    assert head == {u for u, t in enumerate(space.tensors) if "lora" not in t.name}
    body = sorted(set(range(len(space.units))) - head)
    sizes = [t.shape[0] for t in space.tensors] if assign == "balanced" else None
    everywhere = split(space, assign, "all")(num_slots)  # type: ignore[arg-type]
    assert all(head <= set(units) for units in everywhere)
    rest = tuple(tuple(u for u in units if u not in head) for units in everywhere)
    assert rest == spread(body, num_slots, sizes)
    own = split(space, assign, "own")(num_slots)  # type: ignore[arg-type]
    if num_slots > 1:
        assert set(own[-1]) == head
        assert own[:-1] == spread(body, num_slots - 1, sizes)


# --- which units are the head ----------------------------------------------------


def space_named(*names: str, shape: tuple[int, ...] = (4, 4)) -> ParamSpace:
    """Tensors of these names, units by module path as a node makes them."""
    units = [n.removeprefix("base_model.model.").rpartition(".")[0] for n in names]
    units = [u.removesuffix(".lora_A").removesuffix(".lora_B") for u in units]
    shapes = [shape if n.endswith("weight") else (4,) for n in names]
    infos = zip(names, shapes, units, strict=True)
    return ParamSpace.of([TensorInfo(*info) for info in infos])


LAYER = "base_model.model.bert.encoder.layer.1.attention.self.query"
CLASSIFIER = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")
TOLD = {
    "lora": ((f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", *CLASSIFIER), (1,)),
    "lora, two layers of a head": (
        (f"{LAYER}.lora_A.weight", "bert.pooler.dense.weight", *CLASSIFIER),
        (1, 2),
    ),
    "lora, only B is trained": ((f"{LAYER}.lora_B.weight", *CLASSIFIER), (1,)),
    "lora, the head is first": ((*CLASSIFIER, f"{LAYER}.lora_A.weight"), (0,)),
    "lora without a head": ((f"{LAYER}.lora_A.weight",), ()),
    "biases": (
        (
            *("bert.embeddings.LayerNorm.bias", "bert.layer.0.a.bias", "bert.layer.1.a.bias"),
            *("bert.pooler.dense.bias", *CLASSIFIER),
        ),
        (4,),
    ),
    "biases, and a pooler that is new": (
        ("bert.layer.0.a.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias", *CLASSIFIER),
        (1, 2),
    ),
    "biases of GPT-2": (
        ("transformer.h.0.a.bias", "transformer.ln_f.bias", "score.weight"),
        (2,),
    ),
    "biases of GPT-2 without a head": (("transformer.h.0.a.bias", "transformer.ln_f.bias"), ()),
    "adapters": (
        ("bert.layer.0.adapter.down.weight", "bert.layer.0.adapter.up.weight", *CLASSIFIER),
        (2,),
    ),
    "full parameters": (("bert.wte.weight", "bert.layer.0.a.weight", *CLASSIFIER), ()),
    "the head alone": (CLASSIFIER, ()),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_head_is_told_from_the_names(name: str) -> None:
    names, head = TOLD[name]
    assert head_units(space_named(*names)) == head


def test_a_vector_may_be_stored_as_a_matrix_of_one_column() -> None:
    ia3 = space_named("bert.layer.0.ia3_l.weight", *CLASSIFIER, shape=(4, 1))
    assert head_units(ia3) == (1,)


@pytest.mark.parametrize("head", ["all", "own"])
@pytest.mark.parametrize("name", [name for name, (_, head) in TOLD.items() if not head])
def test_a_head_that_cannot_be_told_is_refused_in_one_line(name: str, head: Head) -> None:
    space = space_named(*TOLD[name][0])
    builds: tuple[Callable[[], object], ...] = (
        lambda: spry(Spry(head=head), space, 0),
        lambda: fedavg(FedAvg(split=True, head=head), space),
    )
    for build in builds:
        with pytest.raises(ExperimentError, match=f'head = "{head}": which units') as caught:
            build()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("[method] ")
    spry(Spry(), space, 0)  # as published it needs no head


# --- the server's half -----------------------------------------------------------


def test_a_step_names_its_units_only_where_some_are_missing() -> None:
    space = space_of(1, 2)
    o, x = Sgd(lr=1.0), f32(0, 0, 0)
    _, all_ = server_steps(o, space, State({}), x, [(0, np.ones(1)), (1, np.ones(2))])
    assert all_.units == ()
    _, some = server_steps(o, space, State({}), x, [(1, np.ones(2))])
    assert some.units == (1,)
    assert some.values.tolist() == [1, 1]


def test_a_whole_update_counts_for_every_unit() -> None:
    space = space_of(1, 2)
    got = [
        contribution(Dense(f32(1, 2, 3)), 0, 1),
        contribution(Dense(f32(8, 9), (1,)), 1, 2, (1,)),
    ]
    means = {u: mean.tolist() for u, mean in means_of(space, got)}
    assert means == {0: [1], 1: [6, 7]}


def test_untouched_units_keep_value_and_moments() -> None:
    space = space_of(1, 1)
    before = State({0: Moments(f32(1), f32(2), 3), 1: Moments(f32(4), f32(5), 6)})
    after, step = server_steps(Yogi(), space, before, f32(7, 8), [(1, np.ones(1))])
    assert step.units == (1,)
    assert after.moments[0] is before.moments[0]
    assert after.moments[1].steps == 7
    assert before.moments[1].steps == 6


@pytest.mark.parametrize(
    "o", [Sgd(lr=0.5), Sgd(lr=0.5, momentum=0.9), AdamW(lr=0.1), Adam(), Yogi()]
)
def test_a_step_in_pieces_has_the_bits_of_one_in_whole(o: Server) -> None:
    size = 2 * PIECE + 3
    x, mean = np.random.default_rng(1).standard_normal((2, size))
    x = x.astype(np.float32)
    s, all_, state = Moments(), x, State({})
    for _ in range(3):  # with moments of before, too
        before = all_
        s, all_ = server_step(o, s, before, (mean - before).astype(np.float32))
        state, step = server_steps(o, space_of(size), state, before, [(0, mean)])
        assert step.values.tobytes() == all_.astype(np.float32).tobytes()
        ours = state.moments[0]
        assert ours.steps == s.steps
        assert [a is None or a.tobytes() for a in (ours.m, ours.v)] == [
            a is None or a.astype(np.float32).tobytes() for a in (s.m, s.v)
        ]


def test_a_unit_of_no_numbers_takes_its_step_too() -> None:
    nothing, one = np.empty(0), np.ones(1)
    state, step = server_steps(Adam(), space_of(0, 1), State({}), f32(0), [(0, nothing), (1, one)])
    assert len(step.values) == 1
    assert [state.moments[u].steps for u in (0, 1)] == [1, 1]


def test_a_step_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mean of no updates"):
        server_steps(Sgd(lr=1.0), space_of(1), State({}), f32(0), [])


@pytest.mark.parametrize("mean", [mean_of, lambda got, size: list(means_of(space_of(2, 2), got))])
def test_no_two_updates_are_in_memory_at_a_time(
    mean: Callable[[Iterable[Contribution], int], object],
) -> None:
    seen: list[weakref.ref[Flat]] = []

    def made() -> Contribution:
        values = f32(1, 2, 3, 4)
        seen.append(weakref.ref(values))
        return contribution(Dense(values))

    def stored() -> Iterator[Contribution]:
        for _ in range(3):
            assert not any(values() is not None for values in seen)
            yield made()

    mean(stored(), 4)
    assert len(seen) == 3
