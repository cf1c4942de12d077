"""The running totals of a run: what its summary is made of, and what a restart must not lose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coordinator.reconcile import Unexplained
from protocol.messages import Score
from protocol.meter import Around, Key, Meter
from protocol.tcp import Traffic


@dataclass
class Round:
    """A round as it is measured, from its first task to its commit."""

    number: int
    attempt: int
    opened_at: float
    train_seconds: dict[str, float] = field(default_factory=dict)  # by node
    losses: dict[int, tuple[int, float]] = field(default_factory=dict)  # examples and loss


@dataclass
class Account:
    """All totals, as of one moment; plain, so that the journal can keep them.

    Attributes:
        now: the run's clock when they were saved.
        num_resumed: how often the coordinator came back.
        num_rejected: by reason.
        scores: round and score.
        round: the open one, or the last.
        losses: mean training loss of each committed round.
        peaks: phase -> highest resident bytes of any node.
        over_inference: the highest peak in training over the node's probe batch, in bytes.
        inference: node -> resident peak of its probe batch.
        nodes: what each said of itself at its last login.
        client_rounds: updates that were committed.
        seconds: with a round open.
        train_seconds: by node, in committed rounds.
        phase_seconds, joules: by phase, of all updates; no joules where nothing meters them.
        payload, message, around, traffic: the meter's.
        compared: how often a node's bytes of a round, one way, were held against the kernel's.
        unexplained: by node and direction, see ``coordinator.reconcile``.
    """

    now: float = 0.0
    num_resumed: int = 0
    num_rejected: dict[str, int] = field(default_factory=dict)
    num_resyncs: int = 0
    scores: list[tuple[int, Score]] = field(default_factory=list)
    round: Round | None = None
    losses: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    over_inference: int | None = None
    inference: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluators: set[str] = field(default_factory=set)
    client_rounds: int = 0
    seconds: float = 0.0
    train_seconds: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    payload: list[tuple[Key, int]] = field(default_factory=list)
    message: list[tuple[Key, int]] = field(default_factory=list)
    around: list[tuple[Around, int]] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    compared: int = 0
    unexplained: dict[str, dict[str, Unexplained]] = field(default_factory=dict)

    def take(self, meter: Meter, now: float) -> None:
        """Take the meter's counts and the clock."""
        self.now, self.traffic = now, dict(meter.traffic)
        self.payload, self.message = list(meter.payload.items()), list(meter.message.items())
        self.around = list(meter.around.items())

    def give(self, meter: Meter) -> None:
        """Have a new meter go on from these counts."""
        meter.payload.update(dict(self.payload))
        meter.message.update(dict(self.message))
        meter.around.update(dict(self.around))
        meter.traffic.update(self.traffic)


def add(counts: dict[str, Any], key: str, amount: float = 1) -> None:
    """Count up, from 0."""
    counts[key] = counts.get(key, 0) + amount
