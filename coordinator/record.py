"""The run directory: what was asked, what happened, and what it cost.

experiment.toml  versions.json  events.jsonl  nodes.json
metrics.jsonl    one line per evaluation and one per committed round
costs.jsonl      one line per update: seconds and memory by phase
catch-up.jsonl   one line per node that was behind: what it was sent, and what each way costs
summary.json     written at the end; its keys are a public promise (docs/summary.md)
"""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from coordinator.central import Central
from coordinator.events import Abandon, Assign, Commit, Event
from coordinator.history import CatchUp
from coordinator.quality import Quality
from coordinator.roster import Member
from protocol import experiment as experiments
from protocol.experiment import Experiment
from protocol.messages import Score, Update
from protocol.meter import Meter

SUMMARY_VERSION = 1
PACKAGES = (
    *("seedwire", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets"),
    *("flwr-datasets", "pyarrow", "pyzmq", "msgpack", "msgspec", "numpy"),
)


@dataclass
class Round:
    """A round as it is measured, from its first task to its commit."""

    number: int
    attempt: int
    opened_at: float
    train_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by node
    losses: dict[int, tuple[int, float]] = field(default_factory=dict)  # examples and loss


class RunRecorder:
    """Writes the run directory as the run goes on.

    Args:
        directory: of the run; exists.
        experiment: as resolved.
    """

    def __init__(self, directory: Path, experiment: Experiment) -> None:
        self.directory = directory
        self.experiment = experiment
        self.quality = Quality.of(experiment)
        self.meter = Meter()  # replaced by the desk's once there is one
        self.num_rejected: Counter[str] = Counter()
        self.num_resyncs = 0
        self.scores: list[tuple[int, Score]] = []  # round and score
        self.round: Round | None = None
        self.losses: list[float] = []  # mean training loss of each committed round
        self.peaks: dict[str, int] = {}  # phase -> highest resident bytes of any node
        self.over_inference: int | None = None
        self._digest = b""
        self._inference: dict[str, int] = {}  # node -> resident peak of its probe batch
        self._nodes: dict[str, dict[str, Any]] = {}
        self._evaluators: set[str] = set()
        self._client_rounds = 0
        self._seconds = 0.0  # with a round open
        self._train_seconds: dict[str, float] = defaultdict(float)  # by node, in committed rounds
        self._events: IO[str] = (directory / "events.jsonl").open("a")
        (directory / "experiment.toml").write_text(experiments.dump(experiment))
        _write(directory / "versions.json", versions())

    # --- as it happens -----------------------------------------------------------

    def event(self, event: Event) -> None:
        line = {"event": type(event).__name__, **asdict(event)}
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()

    def caught_up(self, member: Member, known: int, version: int, catch_up: CatchUp) -> None:
        """A node that was behind is brought up: what was sent, and what each way costs."""
        line: dict[str, Any] = {"node": member.name, "from": known}
        line |= {"to": version, "sent": "snapshot" if catch_up.is_snapshot else "steps"}
        line |= {"steps": 0 if catch_up.is_snapshot else len(catch_up.kept)}
        line |= {"steps_bytes": catch_up.steps_nbytes, "steps_seconds": catch_up.steps_seconds}
        line |= {"snapshot_bytes": catch_up.snapshot_nbytes}
        line |= {"sent_bytes": sum(kept.nbytes for kept in catch_up.kept)}
        _append(self.directory / "catch-up.jsonl", line)

    def joined(self, member: Member) -> None:
        hello = member.hello
        if not member.trains:
            self._evaluators.add(hello.node)
        self._nodes[hello.node] = {
            "host": hello.host,
            "pid": hello.pid,
            "role": hello.role,
            "clients": list(hello.clients),
        }
        _write(self.directory / "nodes.json", self._nodes)

    def opened(self, assign: Assign, now: float) -> None:
        self.round = Round(assign.round, assign.attempt, now)

    def ready(self, member: Member) -> None:
        """A node has loaded; its probe batch is the yardstick of its later peaks."""
        if member.trains and "inference" in member.peaks:
            self._inference[member.name] = member.peaks["inference"]
        self._raise_peaks(member)

    def updated(self, member: Member, update: Update) -> None:
        """An update was accepted for aggregation, or at least could have been."""
        line: dict[str, Any] = {"round": update.round, "client": update.client}
        line |= {"node": member.name, "examples": update.examples, "loss": update.loss}
        for cost in update.costs:  # catch-up may come several times
            past = line.setdefault(cost.phase, {"seconds": 0.0, "rss": None, "cuda": None})
            past["seconds"] += cost.seconds
            for level in ("rss", "cuda"):
                peaks = [v for v in (past[level], getattr(cost, level)) if v is not None]
                past[level] = max(peaks, default=None)
            if cost.phase == "train" and cost.rss and member.name in self._inference:
                over = max(0, cost.rss - self._inference[member.name])
                self.over_inference = max(self.over_inference or 0, over)
        _append(self.directory / "costs.jsonl", line)
        r = self.round
        is_open = r is not None and (r.number, r.attempt) == (update.round, update.attempt)
        if r is not None and is_open and update.client not in r.losses:  # else a duplicate
            r.train_seconds[member.name] += sum(c.seconds for c in update.costs)
            r.losses[update.client] = (update.examples, update.loss)
        self._raise_peaks(member)

    def committed(self, commit: Commit, now: float, metrics: Mapping[str, float]) -> None:
        """A round is done; ``metrics`` are the method's own figures."""
        assert self.round is not None  # noqa: S101 - it was opened
        seconds = now - self.round.opened_at
        counted = [self.round.losses[c] for c, _ in commit.refs if c in self.round.losses]
        loss = sum(n * value for n, value in counted) / max(1, sum(n for n, _ in counted))
        self.losses.append(loss)
        self._client_rounds += len(commit.refs)
        self._seconds += seconds
        for node, spent in self.round.train_seconds.items():
            self._train_seconds[node] += spent
        self._line(
            commit.round,
            train_loss=loss,
            seconds=seconds,
            attempt=commit.attempt,
            cohort=list(commit.cohort),
            missing={str(client): why for client, why in commit.missing},
            **metrics,
        )

    def abandoned(self, abandon: Abandon, now: float) -> None:
        assert self.round is not None  # noqa: S101 - it was opened
        self._seconds += now - self.round.opened_at
        if abandon.refs:
            self.num_rejected["round abandoned"] += len(abandon.refs)

    def scored(self, round: int, score: Score, digest: bytes) -> None:
        self.scores.append((round, score))
        self._digest = digest
        self._line(round, test_loss=score.loss, metric=score.metric, **self.quality.more(score))

    def rejected(self, reason: str) -> None:
        self.num_rejected[reason.split(":")[0]] += 1

    def resynced(self, member: Member, reason: str) -> None:
        del member, reason
        self.num_resyncs += 1

    # --- the account -------------------------------------------------------------

    def bytes(self) -> dict[str, int]:
        """Payload and message bytes of the training nodes so far, both ways."""
        levels = {"payload": self.meter.payload, "message": self.meter.message}
        return {
            f"{level}_{way}": sum(
                count
                for key, count in counter.items()
                if key.way == way and key.node not in self._evaluators
            )
            for level, counter in levels.items()
            for way in ("up", "down")
        }

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Message bytes by kind and direction."""
        table: dict[str, dict[str, int]] = {}
        for key, count in sorted(self.meter.message.items()):
            if key.node not in self._evaluators:
                row = table.setdefault(key.kind, {"up": 0, "down": 0})
                row[key.way] += count
        return table

    def finish(self, central: Central, reason: str | None) -> dict[str, Any]:
        """Write ``summary.json`` and return it."""
        (_, before), (_, after) = self.scores[0], self.scores[-1]
        trained = len(self._train_seconds) or 1
        train = sum(self._train_seconds.values()) / trained
        total, per = self.bytes(), max(1, self._client_rounds)
        e = self.experiment
        summary = {
            "version": SUMMARY_VERSION,
            "run": e.run.name,
            "status": "completed" if reason is None else f"failed: {reason}",
            "method": e.method["name"],
            "model": e.model.id,
            "data": e.data.id,
            "seed": e.run.seed,
            "rounds": len(self.losses),
            "clients": e.partition.clients,
            "nodes": sum(node["role"] == "train" for node in self._nodes.values()),
            "trained_parameters": central.space.size,
            "metric": {"name": self.quality.name, "before": before.metric, "after": after.metric},
            "loss": {"before": before.loss, "after": after.loss},
            **self.quality.summary(before, after),
            "bytes": total | {"per_client_round": {k: v / per for k, v in total.items()}},
            "bytes_by_kind": self.by_kind(),
            "memory_bytes": self.peaks | {"over_inference": self.over_inference},
            "seconds": {
                "total": self._seconds,
                "train": train,
                "wait": max(0.0, self._seconds - train),
            },
            "digest": central.digest.hex(),
            "rejected": dict(self.num_rejected),
            "resyncs": self.num_resyncs,
        }
        _write(self.directory / "summary.json", summary)
        return summary

    def close(self) -> None:
        self._events.close()

    def _raise_peaks(self, member: Member) -> None:
        if member.trains:
            for phase, peak in member.peaks.items():
                self.peaks[phase] = max(self.peaks.get(phase, 0), peak)

    def _line(self, round: int, **values: Any) -> None:
        """One line of metrics.jsonl, with the totals up to here."""
        totals = {"bytes": self.bytes(), "seconds_total": self._seconds}
        _append(self.directory / "metrics.jsonl", {"round": round, **values, **totals})


def versions() -> dict[str, str]:
    """Of Python, the machine and the packages that a result depends on."""
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    found = {name: installed.get(name, "absent") for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.platform()} | found


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _append(path: Path, value: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")
