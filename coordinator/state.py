"""What the round machine knows: an experiment's numbers, the phase, who is here and who was.

Immutable values; every transition between them is in ``rounds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.deadline import Deadline
from coordinator.events import Client, Commit, Node, Place
from fedalgos.limits import Limit
from protocol.experiment import Budget

UNLIMITED = Budget()


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers of an experiment that the machine needs, all resolved."""

    clients: int  # in the experiment: 0 to clients - 1
    start_clients: int  # hosted before round 1 opens
    cohort: int  # asked per round
    target: int  # updates that close a round early, quorum <= target <= cohort
    quorum: int  # updates without which nothing is committed, at least 1
    rounds: int
    evaluate_every: int
    deadline_seconds: float
    return_seconds: float  # how long a lost node is waited for
    seed: int
    max_attempts: int = 10  # failed attempts at one round before the run gives up
    deadline_mads: float | None = None  # of an adaptive deadline, see ``coordinator.deadline``
    least_seconds: float = 0.0  # that it leaves
    max_staleness: int = 0  # rounds that an update may be late, and still count; 0: none may
    budget: Budget = UNLIMITED  # the last round is the one that uses it up

    @property
    def deadline(self) -> Deadline:
        return Deadline(self.deadline_seconds, self.least_seconds, self.deadline_mads)


@dataclass(frozen=True, slots=True)
class Gathering:
    """Waiting for nodes, or for the evaluator, since a time."""

    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Training:
    cohort: tuple[Client, ...]
    opened_at: float
    closes_at: float
    refs: Mapping[Client, str] = field(default_factory=dict)  # never mutated
    failed: Mapping[Client, str] = field(default_factory=dict)
    arrived: Mapping[Client, float] = field(default_factory=dict)  # when each of the refs came
    stale: Mapping[Client, int] = field(default_factory=dict)  # rounds that a ref is late
    limits: Mapping[Client, Limit] = field(default_factory=dict)  # that it is planned within


@dataclass(frozen=True, slots=True)
class Committing:
    """The shell was told, and has not said how it went; after a restart it is told again."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class Evaluating:
    pass


@dataclass(frozen=True, slots=True)
class Finished:
    reason: str | None = None


Phase = Gathering | Training | Committing | Evaluating | Finished


@dataclass(frozen=True, slots=True)
class State:
    """``round`` counts committed rounds, so the open one is ``round + 1``."""

    members: Mapping[Node, tuple[Client, ...]] = field(default_factory=dict)
    lost: Mapping[Client, tuple[float, str]] = field(default_factory=dict)  # when and why
    evaluator: bool = False
    round: int = 0
    attempt: int = 0
    failures: int = 0  # attempts at this round that were opened and abandoned
    scored: int = -1  # the last round that was evaluated
    seen: tuple[float, ...] = ()  # what tasks of committed rounds took, the newest
    out: Mapping[Client, Place] = field(default_factory=dict)  # earlier tasks that may still count
    early: Mapping[Client, tuple[int, str]] = field(default_factory=dict)  # what came of those
    # between rounds: the task's round and the ref; it counts in the next round
    limits: Mapping[Client, Limit] = field(default_factory=dict)  # as of its node's last login
    ended: str | None = None  # why no further round is opened, though there should be more
    phase: Phase = Gathering()

    @property
    def hosted(self) -> frozenset[Client]:
        """Clients whose node is ready."""
        return frozenset(client for clients in self.members.values() for client in clients)

    def is_last(self, policy: Policy) -> bool:
        """Whether no further round is opened."""
        return self.round == policy.rounds or self.ended is not None


def held(state: State) -> frozenset[str]:
    """Refs of the updates that are still to be aggregated or discarded."""
    early = frozenset(ref for _, ref in state.early.values())
    match state.phase:
        case Training(refs=refs):
            return early.union(refs.values())
        case Committing(commit):
            return early.union(ref for _, ref in commit.refs)
        case _:
            return early
