"""The one interface that every federated method implements.

    plan (coordinator) -> local (node) -> aggregate (coordinator) -> apply (both)

A method is these functions over flat fp32 vectors.  None keeps state, reads a clock,
logs, or draws from a global generator; hyperparameters are closed over by the factory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct, structs

from fedalgos.limits import Limit, TakesOf
from fedalgos.robust import Common, Rule
from fedalgos.space import pieces
from protocol.noise import Direction
from protocol.payload import Flat, Payload

S = TypeVar("S")  # what the server keeps between rounds
Vector = Any  # a flat fp32 array of the oracle's device: numpy in tests, torch on a node
Batch = Any  # opaque: made by the node, read by the oracle

Positive = Annotated[float, Meta(gt=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
NonNegative = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Oracle(Protocol):
    """The model seen from a method: losses and derivatives of flat vectors, per batch.

    All loss values are means over the batch's examples, without dropout.
    """

    def start(self, x: Flat) -> Vector:
        """The model's own parameters, set to ``x``: what a local run trains in place.

        Valid until the next ``start``; asking about it copies nothing.
        """

    def array(self, x: Flat) -> Vector:
        """A private copy of ``x`` on the oracle's device."""

    def numpy(self, x: Vector) -> Flat:
        """Back to numpy, float32, a copy or not."""

    def loss(self, x: Vector, batch: Batch) -> float:
        """f(x)."""

    def grad(
        self, x: Vector, batch: Batch, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[float, Vector]:
        """f(x) and its gradient, by backpropagation.

        With ``ranges`` only with respect to these, zero elsewhere; they end where
        tensors end.
        """

    def jvp(
        self, x: Vector, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        """f(x) and its derivative along each direction, in one forward pass (forward mode)."""

    def losses(
        self, x: Vector, directions: Sequence[Direction], offsets: Sequence[float], batch: Batch
    ) -> list[tuple[float, ...]]:
        """f(x + s z) of each direction z for each offset s; ``x`` is left bit for bit as it was.

        All directions of a step at once: whoever computes may share them out.
        """

    def add_(self, x: Vector, alpha: float, direction: Direction) -> None:
        """X += alpha z in place."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one client is asked to do.

    Attributes:
        client: its number.
        units: which units to train; none means everything.
        lr: its step size, where the method gives each client its own.
        picks: which of the method's candidates to use, where the coordinator chooses; the
            method says how they are written.
        tier: which it works as, where its node has less room than its own tier takes.
        slot, num_slots: its place in the plan, of how many; the coordinator keeps them.
    """

    client: int
    units: tuple[int, ...] = ()
    lr: float | None = None
    picks: tuple[int, ...] = ()
    slot: int = 0
    num_slots: int = 1
    tier: int | None = None


@dataclass(slots=True)
class Memory:
    """What one client carries from its local run in one round to that in the next.

    It is kept by the node that hosts the client, and is not sent.
    ``local`` may read and replace ``value``, and changes nothing else that outlives it.
    """

    value: Flat | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Which round a local run belongs to, its part in it, and what its client remembers."""

    round: int
    assignment: Assignment
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True)
class Contribution:
    """A client's accepted update: its weight is how many examples it processed.

    ``loss`` is their mean loss during the local run.  ``damping`` is what a change that
    comes late is multiplied by; its weight stays, so that a late round moves less far.
    """

    assignment: Assignment
    examples: int
    payload: Payload
    loss: float = 0.0
    damping: float = 1.0


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"):
    """The part of the ``[method]`` section that all methods share.

    Attributes:
        batch_size: examples per mini-batch.
        steps: mini-batches per client and round; 0 means one pass over the client's data.
        robust: a rule in place of the weighted mean of updates (``fedalgos.robust``).
    """

    batch_size: Count = 16
    steps: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    robust: Rule | None = None

    @property
    def common(self) -> Common:
        """What a robust rule can compare in the updates of different clients."""
        return Common()

    @property
    def late_fault(self) -> str | None:
        """Why a late update cannot be folded into a later round; None: it can.

        It can where it is a change by itself, whatever the round's seeds, the version that
        it started from, and the parts of others.
        """
        return "what its clients send is read with the directions and parameters of its round"


def changed(o: Settings, names: Iterable[str]) -> str | None:
    """The first of these settings that is not at its default, or None."""
    defaults = {field.name: field.default for field in structs.fields(o)}
    return next((name for name in names if getattr(o, name) != defaults[name]), None)


def no_metrics(_: Any) -> Mapping[str, float]:
    """The figures of methods that have none."""
    return {}


def all_of_it(step: Payload, tier: int) -> Payload:
    """What a node gets of a step where tiers make no difference."""
    del tier
    return step


def from_zero(x: Flat, assignment: Assignment) -> Flat | None:
    """The origin of updates that are changes."""
    del x, assignment
    return None


def one_tier(client: int) -> int:
    """The tier of a client where there is one only."""
    del client
    return 0


Plan = tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class Collective:
    """What the nodes of a round do among themselves, where updates stay on their nodes.

    Attributes:
        announce: update -> what is sent in its place.
        accepts: (assignment, announcement) -> None, or why it cannot be one.
        share: (updates on one node, examples of all nodes together) -> its part of the sum,
            flat fp32.
        step: (parameters, the sum over all nodes) -> step payload.
        seconds: for how long a node waits for another.
    """

    announce: Callable[[Payload], Payload]
    accepts: Callable[[Assignment, Payload], str | None]
    share: Callable[[Iterable[Contribution], int], Flat]
    step: Callable[[Flat, Flat], Payload]
    seconds: float


def unchanged(state: Any, plan: Plan, limits: Mapping[int, Limit]) -> Plan:
    """The plan of methods that ask everybody for the same."""
    del state, limits
    return plan


@dataclass(frozen=True, slots=True)
class Method(Generic[S]):
    """A federated method as plain functions.

    Attributes:
        init: parameters -> (server state, step to publish before round 1 or None).
        plan: (state, round, cohort in the order drawn) -> an assignment for each.
        local: (parameters, oracle, batches, work) -> (payload, mean loss); on the node.
        accepts: (assignment, payload) -> None, or why it cannot be an answer to it.
        aggregate: (state, parameters, round, contributions) -> (state, step payload).
            Consumes lazily, holds one update at a time; the caller orders by client.
        apply: (parameters, round, step payload) -> new parameters, deterministic to the bit;
            they may be the step's own memory, and nobody writes to either.
        onto: which parameters ``apply`` wants: the previous step's, those that the run
            began with, or none, because the step replaces them.
        metrics: state -> figures of it that are worth a line in each round's record.
        tiers: how many kinds of clients it tells apart, from 0; a node has the highest of
            its clients' tiers.
        view: (step payload, tier) -> what a node of the tier gets of the step; ``apply``
            of it gives what ``local`` wants for clients of this tier and of lower ones.
        tier_of: a client's tier.
        takes: tier -> bytes of a round, of the least that ``fit`` can ask for; None where
            they are not known beforehand.
        fit: (state, plan, limits by client) -> the plan within the limits, as far as it
            can be; clients without one may get what others leave.
        origin: (parameters, assignment) -> the values of a payload that would change
            nothing; None for zeros.  How far a payload is from it is its norm.
        collective: how nodes aggregate without the coordinator; it must come to what
            ``aggregate`` does, but for rounding.  Steps must suffice by themselves.
    """

    init: Callable[[Flat], tuple[S, Payload | None]]
    plan: Callable[[S, int, Sequence[int]], tuple[Assignment, ...]]
    local: Callable[[Flat, Oracle, Iterable[Batch], Work], tuple[Payload, float]]
    accepts: Callable[[Assignment, Payload], str | None]
    aggregate: Callable[[S, Flat, int, Iterable[Contribution]], tuple[S, Payload]]
    apply: Callable[[Flat, int, Payload], Flat]
    onto: Literal["previous", "initial", "nothing"]
    metrics: Callable[[S], Mapping[str, float]] = no_metrics
    tiers: int = 1
    view: Callable[[Payload, int], Payload] = all_of_it
    tier_of: Callable[[int], int] = one_tier
    takes: TakesOf | None = None
    fit: Callable[[S, Plan, Mapping[int, Limit]], Plan] = unchanged
    origin: Callable[[Flat, Assignment], Flat | None] = from_zero
    collective: Collective | None = None

    @property
    def absolute(self) -> bool:
        """Whether a step suffices by itself, so that earlier ones need not be known."""
        return self.onto != "previous"


def everything(state: Any, round: int, cohort: Sequence[int]) -> tuple[Assignment, ...]:
    """The plan of methods in which every client trains everything."""
    del state, round
    return tuple(Assignment(client) for client in cohort)


class Mean:
    """A weighted mean that holds one running sum, in float64."""

    def __init__(self, size: int) -> None:
        self._sum: npt.NDArray[np.float64] = np.zeros(size)
        self._weight = 0.0

    def add(self, weight: float, x: Flat, damping: float = 1.0) -> None:
        for piece in pieces(len(x)):
            exact = x[piece].astype(np.float64)  # numpy 1 would stay in fp32
            self._sum[piece] += exact * (weight * damping)
        self._weight += weight

    def value(self) -> npt.NDArray[np.float64]:
        """The mean, in the sum's memory: nothing can be added any more.

        Raises:
            ValueError: nothing was added; a round below quorum must not reach here.
        """
        if self._weight == 0.0:
            raise ValueError("mean of no updates")
        self._sum /= self._weight
        self._weight = 0.0
        return self._sum


def mean_of(contributions: Iterable[Contribution], size: int) -> npt.NDArray[np.float64]:
    """The mean of dense contributions, weighted by examples, one in memory at a time."""
    mean = Mean(size)
    for c in contributions:
        mean.add(c.examples, c.payload.values)
        del c  # before the next is read
    return mean.value()
