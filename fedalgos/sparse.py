"""The engine of the sparse methods: dense weights at the server, masked ones at the clients.

Kuo et al., arXiv:2406.05233, and the baselines that its code has as flags.  The server keeps
W; what is shared, evaluated and exported is x, which is W at the places published.  A client
starts from x at its own places, M, trains everything or M alone, and sends D = M.x - w: the
largest entries of it with their places, or, where it trained M alone, the values at M.
Which M that was both sides derive from x (``fedalgos.masks``).  The server steps W along the
plain mean of the D, so what was left out stays in W.  In a coding of fewer bits x is rounded
for everybody, W for nobody, and D when it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fedalgos import privacy
from fedalgos.limits import Limit, TakesOf, lowered
from fedalgos.masked import remember, train
from fedalgos.masks import Places, Pool, restricted
from fedalgos.method import (
    Assignment,
    Batch,
    Contribution,
    Method,
    Oracle,
    Plan,
    Settings,
    Work,
    all_of_it,
    unchanged,
)
from fedalgos.optim import Adam, Local, Moments, Server, Sgd, server_step
from fedalgos.privacy import Dp, Exact, Sampled
from fedalgos.robust import Common
from fedalgos.space import ParamSpace
from protocol.errors import ExperimentError
from protocol.payload import Dense, Flat, Payload, Sparse
from protocol.values import Coding

NOISY_SUM = Common("nothing", "the noise of dp is for a plain sum of clipped updates")
SERVER = -1  # stands for the client in the keys of what the server rounds


class SparseSettings(Settings, frozen=True, kw_only=True):
    """Settings of all sparse methods."""

    local: Local = Sgd(lr=1e-3, momentum=0.9)
    server: Server = Adam(lr=1e-3)
    dp: Dp | None = None

    @property
    def late_fault(self) -> str | None:
        if self.dp is not None:
            return "the accountant of dp counts on cohorts that are drawn from everybody"
        return None

    @property
    def common(self) -> Common:
        return Common() if self.dp is None else NOISY_SUM


@dataclass(frozen=True)
class State:
    """W: the dense weights, of which clients see a part; moments: the server optimiser's.

    ``sampled`` says how many clients were asked, in how many rounds, if it is private.
    """

    weights: Flat
    moments: Moments
    sampled: Sampled = ()


def one(x: Flat, places: Places, change: Flat) -> float:
    """The weight of an update where all count the same."""
    del x, places, change
    return 1.0


def read_sparse(x: Flat, round: int, step: Payload) -> Flat:
    """The parameters that a sparse step stands for."""
    del round
    assert isinstance(step, Sparse)
    if step.size != len(x):  # before memory of that size is taken
        raise ValueError(f"a step of size {step.size}, want {len(x)}")
    return step.dense()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What tells one method from another.

    Attributes:
        held: (x, round, tier) -> the places that a client starts from.
        num_sent: (round, tier) -> how many entries its update has.
        published: (W, x, round) -> the places of the next x; round 0 is before the first.
        write, read: the step from W and the places, and parameters from the step.
        view: of a step, for a tier.
        chosen_from: what the largest changes are chosen from; None: clients train what they
            hold alone, and send the values there.
        trained: ranges that are trained alone, and sent; the others keep their values.
        is_frozen: the server, too, moves only what clients hold.
        coding_up, coding_down: of the values of sparse updates and steps.
        key: (round, client or SERVER) -> of the stream by which they are rounded.
        changes: how many entries an update has changes over the rounds.
        remembers: what was not sent is added to the client's next change.
        weight: (x, places, change) -> of an update in the mean.
        by_owners: a place's mean is over those who hold it, not over all.
        takes: bytes of a round by tier, where they are the same in all rounds.
    """

    held: Callable[[Flat, int, int], Places]
    num_sent: Callable[[int, int], int]
    published: Callable[[Flat, Flat, int], Places]
    write: Callable[[Flat, Places], Payload] = lambda w, places: Sparse(len(w), places, w[places])
    read: Callable[[Flat, int, Payload], Flat] = read_sparse
    view: Callable[[Payload, int], Payload] = all_of_it
    tiers: int = 1
    chosen_from: Pool | None = None
    trained: tuple[tuple[int, int], ...] = ()
    is_frozen: bool = False
    coding_up: Coding = "f32"
    coding_down: Coding = "f32"
    key: Callable[[int, int], int] = lambda round, client: 0
    changes: bool = False
    remembers: bool = False
    weight: Callable[[Flat, Places, Flat], float] = one
    takes: TakesOf | None = None
    by_owners: bool = False


@dataclass(frozen=True)
class Setup:
    """What the coordinator and every node know alike; the secret is the coordinator's own."""

    o: SparseSettings
    space: ParamSpace
    rules: Rules
    secret: bytes | None


def engine(
    o: SparseSettings, space: ParamSpace, rules: Rules, secret: bytes | None = None
) -> Method[State]:
    """Build a sparse method; the coordinator of a private one needs a ``secret``."""
    known = Setup(o, space, rules, secret)
    return Method(
        init=partial(_init, known),
        plan=partial(_plan, known),
        local=partial(_local, known),
        accepts=partial(_accepts, known),
        aggregate=partial(_aggregate, known),
        apply=rules.read,
        onto="initial" if rules.trained else "nothing",
        metrics=lambda s: privacy.figures(o.dp, s.sampled),
        tiers=rules.tiers,
        view=rules.view,
        tier_of=partial(_tier_of, known),
        takes=rules.takes,
        fit=unchanged if rules.takes is None else partial(_fit, known),
    )


def _tier_of(known: Setup, client: int) -> int:
    return client % known.rules.tiers


def _tier_in(known: Setup, a: Assignment) -> int:
    return _tier_of(known, a.client) if a.tier is None else a.tier


def _fit(known: Setup, s: State, plan: Plan, limits: Mapping[int, Limit]) -> Plan:
    """Lower tiers for those who have no room for their own."""
    del s
    assert known.rules.takes is not None
    own = [_tier_of(known, a.client) for a in plan]
    takes = known.rules.takes
    tiers = [lowered(t, takes, limits.get(a.client)) for t, a in zip(own, plan, strict=True)]
    changes = zip(plan, own, tiers, strict=True)
    return tuple(a if tier == was else replace(a, tier=tier) for a, was, tier in changes)


def _init(known: Setup, x: Flat) -> tuple[State, Payload | None]:
    if known.o.dp is not None and known.o.dp.noise_multiplier and not known.secret:
        raise ExperimentError("[method] dp: the coordinator has no secret to draw noise from")
    first = None if known.rules.trained else _written(known, x, x, 0)
    return State(x, Moments()), first


def _written(known: Setup, w: Flat, x: Flat, round: int) -> Payload:
    """The step from W, as everybody will have it."""
    rules = known.rules
    step = rules.write(w, rules.published(w, x, round))
    if not isinstance(step, Sparse):
        return step
    key = rules.key(round, SERVER)
    return Sparse.of(known.space.size, step.places, step.values, rules.coding_down, key)


def _plan(known: Setup, s: State, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    del s
    rules = known.rules

    def assigned(slot: int, client: int) -> Assignment:
        sent = (rules.num_sent(round, _tier_of(known, client)),) if rules.changes else ()
        return Assignment(client, picks=sent, slot=slot, num_slots=len(cohort))

    return tuple(assigned(slot, client) for slot, client in enumerate(cohort))


def _local(
    known: Setup, x: Flat, oracle: Oracle, batches: Iterable[Batch], work: Work
) -> tuple[Payload, float]:
    rules = known.rules
    tier = _tier_in(known, work.assignment)
    places = rules.held(x, work.round, tier)
    start = x if rules.trained else restricted(x, places)
    mask = None if rules.chosen_from is not None or len(places) == known.space.size else places
    trained, loss = train(known.o.local, start, oracle, batches, rules.trained, mask)
    change = start - trained  # D = M.x - w
    if rules.chosen_from is None:
        return Dense(change[places]), loss
    if rules.remembers and work.memory.value is not None:
        change += work.memory.value
    sent = rules.chosen_from.largest(change, rules.num_sent(work.round, tier))
    key = rules.key(work.round, work.assignment.client)
    payload = Sparse.of(known.space.size, sent, change[sent], rules.coding_up, key)
    if rules.remembers:
        remember(work.memory, change, payload)
    return payload, loss


def _accepts(known: Setup, a: Assignment, payload: Payload) -> str | None:
    rules = known.rules
    if rules.chosen_from is None:
        if not isinstance(payload, Dense) or payload.units:
            return "want a dense payload of what the client trained"
    elif not isinstance(payload, Sparse) or payload.size != known.space.size:
        return f"want a sparse payload of size {known.space.size}"
    elif payload.coding != rules.coding_up:
        return f"want {rules.coding_up} values"
    got, want = len(payload.values), a.picks[0] if a.picks else _num_sent(known, a)
    return None if got == want else f"another size: {got} entries, want {want}"


def _num_sent(known: Setup, a: Assignment) -> int:
    return known.rules.num_sent(1, _tier_in(known, a))


def _collect(
    known: Setup, x: Flat, held: Sequence[Places], contributions: Iterable[Contribution]
) -> tuple[Exact, float | Exact, int]:
    """The sum of the D, what it is to be divided by, and how many clients were asked."""
    total, weight, num_asked = np.zeros(known.space.size), 0.0, 0
    owned = np.zeros(known.space.size) if known.rules.by_owners else None
    for c in contributions:
        got, places = c.payload.values, held[_tier_in(known, c.assignment)]
        if isinstance(c.payload, Sparse):
            places = c.payload.places
        p = known.rules.weight(x, places, got)
        change = privacy.clipped(got, known.o.dp.clip) if known.o.dp else got.astype(float)
        total[places] += p * c.damping * change
        if owned is not None:
            owned[places] += p
        weight, num_asked = weight + p, max(num_asked, c.assignment.num_slots)
    if not weight:
        raise ValueError("aggregate of no updates")
    return total, weight if owned is None else np.where(owned > 0, owned, 1.0), num_asked


def _aggregate(
    known: Setup, s: State, x: Flat, round: int, contributions: Iterable[Contribution]
) -> tuple[State, Payload]:
    rules = known.rules
    held = [rules.held(x, round, tier) for tier in range(rules.tiers)]
    total, divisor, num_asked = _collect(known, x, held, contributions)
    sampled = s.sampled
    if known.o.dp is not None:
        touched = held[-1] if rules.chosen_from is None else np.arange(known.space.size)
        total[touched] = privacy.noised(known.o.dp, known.secret or b"", round, total[touched])
        sampled = privacy.asked(sampled, num_asked)
    delta = (-total / divisor).astype(np.float32)
    moments, new = server_step(known.o.server, s.moments, s.weights, delta)
    if rules.trained or rules.is_frozen:  # momentum and decay, too, leave the rest alone
        everywhere, new = new, s.weights.copy()
        new[held[-1]] = everywhere[held[-1]]
    weights = new.astype(np.float32)
    return State(weights, moments, sampled), _written(known, weights, x, round)
