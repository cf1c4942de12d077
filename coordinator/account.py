"""The running totals of a run: what its summary is made of, and what a restart must not lose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.events import Commit
from coordinator.limits import MAX_GONE, MAX_REASONS
from coordinator.reconcile import Excess, Unexplained
from protocol.messages import Hello, Score, Update
from protocol.meter import Around, Key, Meter
from protocol.parts import Cost
from protocol.tcp import Traffic

IDLE = ("wait", "transfer", "upload", "reduce")  # phases in which a node does not compute


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
        scores: round and score of the first evaluation and of the last.
        round: the open one, or the last.
        num_rounds: that were committed.
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
    num_rounds: int = 0
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

    # --- nodes -------------------------------------------------------------------

    def join(self, hello: Hello) -> None:
        """A node has logged in."""
        if hello.role == "evaluate":
            self.evaluators.add(hello.node)
        self.nodes.pop(hello.node, None)  # the last to log in are at the end
        self.nodes[hello.node] = {
            "host": hello.host,
            "pid": hello.pid,
            "role": hello.role,
            "clients": list(hello.clients),
            "memory_limit": hello.memory_limit,
            "limits": msgspec.to_builtins(hello.limits),
        }

    def forget(self, here: Collection[str]) -> list[str]:
        """Let go of nodes that have long been gone: who, if they are too many."""
        if len(self.nodes) <= len(here) + MAX_GONE:
            return []
        gone = [name for name in self.nodes if name not in here][:-MAX_GONE]
        for name in gone:
            del self.nodes[name]
            self.inference.pop(name, None)
            self.unexplained.pop(name, None)
        return gone

    def raise_peaks(self, peaks: Mapping[str, int]) -> None:
        """Of a training node: resident bytes by phase."""
        for phase, peak in peaks.items():
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak)

    def charge(self, node: str, costs: tuple[Cost, ...]) -> None:
        """What an answer cost."""
        for cost in costs:
            add(self.phase_seconds, cost.phase, cost.seconds)
            if cost.joules is not None:
                add(self.joules, cost.phase, cost.joules)
            if cost.phase == "train" and cost.rss and node in self.inference:
                over = max(0, cost.rss - self.inference[node])
                self.over_inference = max(self.over_inference or 0, over)

    # --- rounds ------------------------------------------------------------------

    def scored(self, round: int, score: Score) -> None:
        """The parameters were evaluated after a round."""
        self.scores = [*self.scores[:1], (round, score)]

    def has_opened(self, round: int, attempt: int) -> bool:
        """Whether this is the round that is being measured."""
        r = self.round
        return r is not None and (r.number, r.attempt) == (round, attempt)

    def open(self, opened: Round, folds_late: bool) -> None:
        """A round begins; with ``folds_late`` what came since the last commit counts in it."""
        past, self.round = self.round, opened
        if past is not None and folds_late:
            opened.losses, opened.train_seconds = past.losses, past.train_seconds

    def take_update(self, node: str, update: Update, folds_late: bool) -> None:
        """Count an update in the round, once; ``folds_late``: in the open one, whose it is."""
        r, is_open = self.round, self.has_opened(update.round, update.attempt)
        if r is not None and (is_open or folds_late) and update.client not in r.losses:
            busy = (c.seconds for c in update.costs if c.phase not in IDLE)
            add(r.train_seconds, node, sum(busy))
            r.losses[update.client] = (update.examples, update.loss)

    def close(self, commit: Commit, now: float) -> tuple[float, float]:
        """A round is done: its mean training loss, and its seconds."""
        r, seconds = self._stop(now)
        counted = [r.losses[c] for c, _ in commit.refs if c in r.losses]
        loss = sum(n * value for n, value in counted) / max(1, sum(n for n, _ in counted))
        self.num_rounds += 1
        self.client_rounds += len(commit.refs)
        for node, spent in r.train_seconds.items():
            add(self.train_seconds, node, spent)
        r.losses, r.train_seconds = {}, {}
        return loss, seconds

    def abandon(self, now: float, num_updates: int) -> None:
        """A round came to nothing, and neither did the updates that it had."""
        self._stop(now)
        if num_updates:
            add(self.num_rejected, "round abandoned", num_updates)

    def _stop(self, now: float) -> tuple[Round, float]:
        """The open round, and for how long it was."""
        assert self.round is not None  # noqa: S101 - it was opened
        seconds = now - self.round.opened_at
        self.seconds += seconds
        return self.round, seconds

    def reject(self, reason: str) -> None:
        """Something did not count; what stands behind a colon is one case's own."""
        key = reason.split(":")[0]
        if key not in self.num_rejected and len(self.num_rejected) >= MAX_REASONS:
            key = "other"  # some quote what a peer made up
        add(self.num_rejected, key)

    def unexplain(self, round: int, excess: Excess) -> bool:
        """Bytes that nothing explains; says whether they are a node's first, in this direction."""
        ways = self.unexplained.setdefault(excess.node, {})
        is_first = excess.way not in ways
        found = ways.setdefault(excess.way, Unexplained(round))
        found.rounds += 1
        found.bytes += excess.unexplained
        return is_first


def add(counts: dict[str, Any], key: str, amount: float = 1) -> None:
    """Count up, from 0."""
    counts[key] = counts.get(key, 0) + amount
