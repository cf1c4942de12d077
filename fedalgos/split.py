"""Who trains what: the units of a space dealt to the slots of a round, and put together again.

Spry (arXiv:2405.15551) gives each client of a round a few units; its baselines FedAvgSplit
and FedYogiSplit do the same with backpropagation.  A *slot* is a place in the drawn cohort.
Which units it has follows from the number of slots alone, so that a replica that knows the
slots of a round knows everybody's units.  A unit's mean is over those who hold it; one that
nobody returned keeps its value and its moments, because a change of zero would still move
it through the momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedalgos.limits import Limit, Takes, TakesOf
from fedalgos.method import Assignment, Batch, Contribution, Mean, Oracle, Plan, Vector
from fedalgos.optim import Local, Moments, Server, local_steps, server_step
from fedalgos.space import ParamSpace, pieces
from protocol.errors import ExperimentError
from protocol.parts import TensorInfo
from protocol.payload import Dense, Flat

Assign = Literal["cyclic", "balanced"]
Head = Literal["one", "all", "own"]
Slots = tuple[tuple[int, ...], ...]  # each slot's units, in ascending order
Deal = Callable[[int], Slots]  # from how many slots there are
FEW_HOLDERS = "a unit is held by few clients, often by one, so that there is nobody to compare with"

# --- who holds what --------------------------------------------------------------


def whole(num_slots: int) -> Slots:
    """No split: everybody trains everything."""
    return ((),) * num_slots


def split(space: ParamSpace, assign: Assign = "cyclic", head: Head = "one") -> Deal:
    """The deal of a space's units: every unit is held, and every slot holds one.

    Args:
        space: whose units.
        assign: by number, as published, or by how many parameters they have.
        head: the head's units are like others, or in every slot, or in one of their own.

    Raises:
        ExperimentError: ``head`` asks for what cannot be told from this space.
    """
    everything = tuple(range(len(space.units)))
    apart = () if head == "one" else head_units(space)
    body = tuple(u for u in everything if u not in apart)
    if head != "one" and not (apart and body):
        raise ExperimentError(
            f'[method] head = "{head}": which units are the head cannot be told '
            'from what is trained here; take head = "one"'
        )
    sizes = [space.count((u,)) for u in everything] if assign == "balanced" else None

    def deal(num_slots: int) -> Slots:
        if head == "own":
            return (*spread(body, num_slots - 1, sizes), apart) if num_slots > 1 else (everything,)
        return tuple(tuple(sorted((*units, *apart))) for units in spread(body, num_slots, sizes))

    return deal


def spread(units: Sequence[int], num_slots: int, sizes: Sequence[int] | None = None) -> Slots:
    """Deal units to slots.

    By number it is cyclic both ways: slot m gets the units at places m, m + M, ..., or with
    more slots than units the one at place m mod U.  With ``sizes`` the largest goes first,
    to the slot that has the least; of equal units or slots the lower one is first.
    """
    if sizes is None or num_slots >= len(units):
        return tuple(
            tuple(units[m::num_slots]) or (units[m % len(units)],) for m in range(num_slots)
        )
    loads, held = [0] * num_slots, [list[int]() for _ in range(num_slots)]
    for u in sorted(units, key=lambda u: (-sizes[u], u)):
        m = loads.index(min(loads))
        loads[m] += sizes[u]
        held[m].append(u)
    return tuple(tuple(sorted(slot)) for slot in held)


def head_units(space: ParamSpace) -> tuple[int, ...]:
    """The units of the head, or none where that cannot be told.

    With LoRA, those without a LoRA tensor.  With vectors (biases, IA3) or adapters inside
    of the model's numbered blocks, what comes after the last block and is trained whole: of
    a last norm, or a pooler that the checkpoint has, the bias alone is, like those of the
    blocks.  Where blocks train matrices of their own, as with full parameters, these stand
    where the head does, and nothing tells them apart; nor is there a head without a body.
    """
    lora = {t.unit for t in space.tensors if ".lora_" in t.name}
    if lora:
        return tuple(u for u, unit in enumerate(space.units) if unit.name not in lora)
    inside = [t for t in space.tensors if any(part.isdigit() for part in t.unit.split("."))]
    if not inside or any(_is_matrix(t) for t in inside):
        return ()
    blocks = {t.unit for t in inside}
    last = max(u for u, unit in enumerate(space.units) if unit.name in blocks)
    after = {unit.name: u for u, unit in enumerate(space.units) if u > last}
    whole = {_module(t) for t in space.tensors if t.unit in after and len(t.shape) > 1}
    return tuple(sorted({after[t.unit] for t in space.tensors if _module(t) in whole}))


def _module(t: TensorInfo) -> str:
    return t.name.rpartition(".")[0]


def _is_matrix(t: TensorInfo) -> bool:
    return len(t.shape) > 1 and min(t.shape) > 1 and "adapter" not in t.name


def plan(deal: Deal, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """Slot m is the m-th client in the order drawn, so units move between clients."""
    slots = enumerate(zip(cohort, deal(len(cohort)), strict=True))
    return tuple(
        Assignment(client, units, slot=m, num_slots=len(cohort)) for m, (client, units) in slots
    )


def takes(space: ParamSpace, is_split: bool) -> TakesOf:
    """All units down, at the most; up the smallest, or all of them too."""
    sizes = [space.count((u,)) for u in range(len(space.units))]
    least = min(sizes) if is_split else space.size
    return lambda tier: Takes(4 * space.size, 4 * least)


def fit(space: ParamSpace, plan: Plan, limits: Mapping[int, Limit]) -> Plan:
    """Take units from those who have no room for them, and give them to those who have.

    A client gives its last units away; each goes to the least loaded of those who have room,
    of equals the first.  What nobody has room for is trained by nobody in this round.  A
    client that is left with none shares the first one that it has room for, or the smallest.
    """
    sizes = [space.count((u,)) for u in range(len(space.units))]
    room = [
        limits[a.client].update_bytes(4 * space.size) // 4 if a.client in limits else space.size
        for a in plan
    ]
    held, left = [list(a.units) for a in plan], list[int]()

    def load(m: int) -> int:
        return sum(sizes[u] for u in held[m])

    for m, units in enumerate(held):
        while load(m) > room[m]:
            left.append(units.pop())
    left = sorted({u for u in left if not any(u in units for units in held)})
    for u in left:
        free = [m for m in range(len(held)) if load(m) + sizes[u] <= room[m]]
        if free:
            held[min(free, key=load)].append(u)
    for m, units in enumerate(held):
        if not units:
            units.append(next((u for u, n in enumerate(sizes) if n <= room[m]), smallest(sizes)))
    return tuple(replace(a, units=tuple(sorted(u))) for a, u in zip(plan, held, strict=True))


def unheld(space: ParamSpace, plan: Plan) -> list[str]:
    """The names of the units that nobody trains."""
    held = {u for a in plan for u in a.units}
    if not all(a.units for a in plan):
        return []
    return [unit.name for u, unit in enumerate(space.units) if u not in held]


def smallest(sizes: Sequence[int]) -> int:
    """The first of the smallest units."""
    return min(range(len(sizes)), key=sizes.__getitem__)


# --- on the node -----------------------------------------------------------------


def train_units(
    optimiser: Local,
    space: ParamSpace,
    x: Flat,
    oracle: Oracle,
    batches: Iterable[Batch],
    units: tuple[int, ...],
    gradient: Callable[[Vector, int, Batch], tuple[float, Vector]],
) -> tuple[Dense, float]:
    """Train the units alone; their values after the last step, and the mean loss.

    Args:
        optimiser: made anew; it never sees the other units, so no decay moves them.
        space: of x.
        x: the shared parameters.
        oracle: of the client.
        batches: one for each step.
        units: to be trained; none means everything.
        gradient: from (parameters, step, batch) to a loss and a vector of x's size, of
            which the units' ranges are read.
    """
    ranges, w, losses = space.ranges(units), oracle.start(x), []
    step_ = local_steps(optimiser, [w[start:stop] for start, stop in ranges])  # views
    for t, batch in enumerate(batches):
        loss, g = gradient(w, t, batch)
        losses.append(loss)
        step_([g[start:stop] for start, stop in ranges])
    return Dense(space.take(oracle.numpy(w), units), units), float(np.mean(losses))


# --- at the server ---------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Each unit's server moments, by unit number; absent before its first step."""

    moments: dict[int, Moments]


UnitMean = tuple[int, npt.NDArray[np.float64]]  # a unit, and the mean of its new values


def means_of(space: ParamSpace, contributions: Iterable[Contribution]) -> Iterator[UnitMean]:
    """Each returned unit's mean over its holders, by examples; one update in memory at a time."""
    means: dict[int, Mean] = {}
    for c in contributions:
        at = 0
        for u in c.assignment.units or range(len(space.units)):
            size = space.count((u,))
            if u not in means:
                means[u] = Mean(size)
            means[u].add(c.examples, c.payload.values[at : at + size], c.damping)
            at += size
        del c  # before the next is read
    return ((u, means.pop(u).value()) for u in sorted(means))


def server_steps(
    o: Server, space: ParamSpace, s: State, x: Flat, means: Iterable[UnitMean]
) -> tuple[State, Dense]:
    """Each unit's own server step towards its mean; units are in ascending order.

    Returns:
        The next state, and the new values of the units, all of them if none is named.

    Raises:
        ValueError: no means; a round below quorum must not reach here.
    """
    moments, new, moved = dict(s.moments), np.empty_like(x), []
    for u, mean in means:
        place = slice(space.units[u].start, space.units[u].stop)
        start = moments.get(u, Moments())
        moments[u] = _unit_step(o, start, x[place], mean, new[place])
        moved.append(u)
        del mean  # in float64: the largest there is
    if not moved:
        raise ValueError("mean of no updates")
    units = () if len(moved) == len(space.units) else tuple(moved)
    return State(moments), Dense(space.of_units(new, units), units)


def _unit_step(o: Server, s: Moments, x: Flat, mean: npt.NDArray[np.float64], new: Flat) -> Moments:
    """One unit's step, into ``new``: piece by piece, so that what lies between takes no memory."""
    made: dict[str, Flat] = {}
    for piece in pieces(len(x)):
        delta = (mean[piece] - x[piece]).astype(np.float32)
        part, new[piece] = server_step(o, s.part(piece), x[piece], delta)
        for name, moment in (("m", part.m), ("v", part.v)):
            if moment is not None:
                if name not in made:
                    made[name] = np.empty_like(x)
                made[name][piece] = moment
    return Moments(**made, steps=s.steps + 1)
