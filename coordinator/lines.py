"""What the lines of a run directory's files say: one JSON object for each thing that happened."""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.events import Commit
from coordinator.history import CatchUp
from protocol.messages import Reduced, Update
from protocol.parts import Cost

PEAKS = ("rss", "cuda", "reserved")  # of a cost, in bytes


def caught_up(node: str, known: int, version: int, catch_up: CatchUp) -> dict[str, Any]:
    """Of catch-up.jsonl: what a node that was behind was sent, and what each way costs."""
    return {
        "node": node,
        "from": known,
        "to": version,
        "sent": "snapshot" if catch_up.is_snapshot else "steps",
        "steps": 0 if catch_up.is_snapshot else len(catch_up.kept),
        "steps_bytes": catch_up.steps_nbytes,
        "steps_seconds": catch_up.steps_seconds,
        "snapshot_bytes": catch_up.snapshot_nbytes,
        "sent_bytes": sum(kept.nbytes for kept in catch_up.kept),
    }


def updated(node: str, update: Update) -> dict[str, Any]:
    """Of costs.jsonl."""
    return {
        "round": update.round,
        "client": update.client,
        "node": node,
        "examples": update.examples,
        "loss": update.loss,
        **_by_phase(update.costs),
        **({} if update.vitals is None else {"vitals": msgspec.to_builtins(update.vitals)}),
    }


def reduced(node: str, answer: Reduced) -> dict[str, Any]:
    """Of costs.jsonl, for a node's part of a collective."""
    exchanged = msgspec.to_builtins(answer.exchanged)
    about = {"round": answer.round, "node": node, "exchanged": exchanged}
    return about | _by_phase(answer.costs)


def committed(commit: Commit) -> dict[str, Any]:
    """Of metrics.jsonl: whose updates a round has, and whose not."""
    return {
        "attempt": commit.attempt,
        "cohort": list(commit.cohort),
        "missing": {str(client): why for client, why in commit.missing},
        **({"stale": {str(c): s for c, s in commit.stale}} if commit.stale else {}),
    }


def _by_phase(costs: tuple[Cost, ...]) -> dict[str, dict[str, float | None]]:
    """Seconds, joules and highest peaks; a phase may come several times, as catch-up does."""
    table: dict[str, dict[str, Any]] = {}
    for cost in costs:
        nothing = dict.fromkeys(("seconds", "joules"), 0.0) | dict.fromkeys(PEAKS)
        past = table.setdefault(cost.phase, nothing)
        past["seconds"] += cost.seconds
        lost = past["joules"] is None or cost.joules is None
        past["joules"] = None if lost else past["joules"] + cost.joules
        for level in PEAKS:
            peaks = [v for v in (past[level], getattr(cost, level)) if v is not None]
            past[level] = max(peaks, default=None)
    return table
