"""The run directory: what was asked, what happened, and what it cost.

experiment.toml  versions.json  nodes.json
metrics.jsonl    one line per evaluation and one per committed round
costs.jsonl      one line per update: seconds and memory by phase
bytes.jsonl      one line per committed round: each node's bytes, held against the kernel's
catch-up.jsonl   one line per node that was behind: what it was sent, and what each way costs
summary.json     written at the end; its keys are a public promise (docs/summary.md)

The lines and the running totals are in the journal too, as of each of its commits; after a
restart it is they that count, and the files are written anew from them.
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from coordinator.account import Account, Round, add
from coordinator.budget import Spent
from coordinator.central import Central
from coordinator.events import Abandon, Assign, Commit
from coordinator.history import CatchUp
from coordinator.journal import Journal
from coordinator.limits import MAX_GONE, MAX_REASONS
from coordinator.quality import Quality
from coordinator.reconcile import Reconciler, Unexplained
from coordinator.roster import Member
from protocol import experiment as experiments
from protocol.errors import JournalError
from protocol.experiment import Experiment
from protocol.messages import Cost, Reduced, Score, Update
from protocol.meter import OTHERS, Meter

log = logging.getLogger(__name__)

SUMMARY_VERSION = 1
PEAKS = ("rss", "cuda", "reserved")  # of a cost, in bytes
LINES = ("metrics.jsonl", "costs.jsonl", "bytes.jsonl", "catch-up.jsonl")
IDLE = ("wait", "transfer", "upload", "reduce")  # phases in which a node does not compute
PACKAGES = (
    *("seedwire", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets"),
    *("flwr-datasets", "pyarrow", "pyzmq", "msgpack", "msgspec", "numpy"),
)


class RunRecorder:
    """Writes the run directory as the run goes on.

    Args:
        directory: of the run; exists.
        experiment: as resolved.
        journal: of the run; with something in it, the account goes on from there.
    """

    def __init__(self, directory: Path, experiment: Experiment, journal: Journal) -> None:
        self.directory = directory
        self.experiment = experiment
        self.quality = Quality.of(experiment)
        self.meter = Meter()  # replaced by the desk's once there is one
        self._reconciler = Reconciler(self.meter)
        self.account = Account()
        self._journal = journal
        self._are_nodes_new = False  # since nodes.json was written
        self.num_refused: Counter[str] = Counter()  # the guard's, once there is one

    @property
    def losses(self) -> list[float]:
        return self.account.losses

    @property
    def scores(self) -> list[tuple[int, Score]]:
        return self.account.scores

    @property
    def num_rejected(self) -> dict[str, int]:
        return self.account.num_rejected

    @property
    def num_resyncs(self) -> int:
        return self.account.num_resyncs

    # --- beginning, saving, coming back ----------------------------------------------

    def begin(self) -> None:
        """What was asked, and with what software."""
        _write(self.directory / "experiment.toml", experiments.dump(self.experiment))
        _write(self.directory / "versions.json", _pretty(versions()))

    def attach(self, meter: Meter) -> None:
        """Have the desk's meter, which goes on from the account."""
        self.meter = meter
        self.account.give(meter)
        self._reconciler = Reconciler(meter)

    def save(self, now: float) -> None:
        """Put the account where the journal's next commit finds it."""
        if self._are_nodes_new:
            self._write_nodes()
        self.account.take(self.meter, now)
        self._journal.keep("account", "", msgspec.msgpack.encode(self.account))

    def resume(self) -> None:
        """Go on from the journal's last commit: what was written later never happened."""
        record = self._journal.record("account", "")
        if record is not None:
            self.account = msgspec.msgpack.decode(record.plain, type=Account)
        self.account.num_resumed += 1
        for name in LINES:
            lines = [line + "\n" for line in self._journal.logged(name)]
            _write(self.directory / name, "".join(lines))
        self._write_nodes()

    # --- as it happens -----------------------------------------------------------

    def caught_up(self, member: Member, known: int, version: int, catch_up: CatchUp) -> None:
        """A node that was behind is brought up: what was sent, and what each way costs."""
        line: dict[str, Any] = {"node": member.name, "from": known}
        line |= {"to": version, "sent": "snapshot" if catch_up.is_snapshot else "steps"}
        line |= {"steps": 0 if catch_up.is_snapshot else len(catch_up.kept)}
        line |= {"steps_bytes": catch_up.steps_nbytes, "steps_seconds": catch_up.steps_seconds}
        line |= {"snapshot_bytes": catch_up.snapshot_nbytes}
        line |= {"sent_bytes": sum(kept.nbytes for kept in catch_up.kept)}
        self._append("catch-up.jsonl", line)

    def joined(self, member: Member) -> None:
        hello = member.hello
        if not member.trains:
            self.account.evaluators.add(hello.node)
        self.account.nodes.pop(hello.node, None)  # the last to log in are at the end
        self.account.nodes[hello.node] = {
            "host": hello.host,
            "pid": hello.pid,
            "role": hello.role,
            "clients": list(hello.clients),
            "memory_limit": hello.memory_limit,
            "limits": msgspec.to_builtins(hello.limits),
        }
        self._are_nodes_new = True

    def forget(self, here: Collection[str]) -> list[str]:
        """Count nodes that have long been gone among the others: who, if they are too many."""
        nodes = self.account.nodes
        if len(nodes) <= len(here) + MAX_GONE:
            return []
        gone = [name for name in nodes if name not in here][:-MAX_GONE]
        for name in gone:
            del nodes[name]
            self.account.inference.pop(name, None)
            self.account.unexplained.pop(name, None)
            self.meter.merge(name)
            self._reconciler.forget(name)
        return gone

    def _write_nodes(self) -> None:
        self._are_nodes_new = False
        text = msgspec.json.format(msgspec.json.encode(self.account.nodes), indent=2)
        _write(self.directory / "nodes.json", text.decode() + "\n")

    def has_opened(self, round: int, attempt: int) -> bool:
        """Whether this is the round that is being measured."""
        r = self.account.round
        return r is not None and (r.number, r.attempt) == (round, attempt)

    def opened(self, assign: Assign, now: float) -> None:
        past, self.account.round = self.account.round, Round(assign.round, assign.attempt, now)
        if past is not None and self._folds_late:  # what came since its commit counts in this one
            self.account.round.losses = past.losses
            self.account.round.train_seconds = past.train_seconds

    def ready(self, member: Member) -> None:
        """A node has loaded; its probe batch is the yardstick of its later peaks."""
        if member.trains and "inference" in member.peaks:
            self.account.inference[member.name] = member.peaks["inference"]
        self._raise_peaks(member)

    def updated(self, member: Member, update: Update) -> None:
        """An update was accepted for aggregation, or at least could have been."""
        line: dict[str, Any] = {"round": update.round, "client": update.client}
        line |= {"node": member.name, "examples": update.examples, "loss": update.loss}
        self._add_costs(member, line, update.costs)
        if update.vitals is not None:
            line["vitals"] = msgspec.to_builtins(update.vitals)
        self._append("costs.jsonl", line)
        r, is_open = self.account.round, self.has_opened(update.round, update.attempt)
        counts = is_open or self._folds_late
        if r is not None and counts and update.client not in r.losses:  # else a duplicate
            busy = (c.seconds for c in update.costs if c.phase not in IDLE)
            add(r.train_seconds, member.name, sum(busy))
            r.losses[update.client] = (update.examples, update.loss)
        self._raise_peaks(member)

    def reduced(self, member: Member, answer: Reduced) -> None:
        """A node has ended its part of a collective, well or not."""
        line: dict[str, Any] = {"round": answer.round, "node": member.name}
        line["exchanged"] = msgspec.to_builtins(answer.exchanged)
        self._add_costs(member, line, answer.costs)
        self._append("costs.jsonl", line)
        self._raise_peaks(member)

    def _add_costs(self, member: Member, line: dict[str, Any], costs: tuple[Cost, ...]) -> None:
        """Put costs into a line, by phase, and into the totals."""
        for cost in costs:  # catch-up may come several times
            nothing = dict.fromkeys(("seconds", "joules"), 0.0) | dict.fromkeys(PEAKS)
            past = line.setdefault(cost.phase, nothing)
            past["seconds"] += cost.seconds
            lost = past["joules"] is None or cost.joules is None
            past["joules"] = None if lost else past["joules"] + cost.joules
            for level in PEAKS:
                peaks = [v for v in (past[level], getattr(cost, level)) if v is not None]
                past[level] = max(peaks, default=None)
            add(self.account.phase_seconds, cost.phase, cost.seconds)
            if cost.joules is not None:
                add(self.account.joules, cost.phase, cost.joules)
            if cost.phase == "train" and cost.rss and member.name in self.account.inference:
                over = max(0, cost.rss - self.account.inference[member.name])
                self.account.over_inference = max(self.account.over_inference or 0, over)

    def committed(self, commit: Commit, now: float, metrics: Mapping[str, float]) -> None:
        """A round is done; ``metrics`` are the method's own figures."""
        total, r = self.account, self.account.round
        assert r is not None  # noqa: S101 - it was opened
        seconds = now - r.opened_at
        counted = [r.losses[c] for c, _ in commit.refs if c in r.losses]
        loss = sum(n * value for n, value in counted) / max(1, sum(n for n, _ in counted))
        total.losses.append(loss)
        total.client_rounds += len(commit.refs)
        total.seconds += seconds
        for node, spent in r.train_seconds.items():
            add(total.train_seconds, node, spent)
        r.losses, r.train_seconds = {}, {}
        self._line(
            commit.round,
            train_loss=loss,
            seconds=seconds,
            attempt=commit.attempt,
            cohort=list(commit.cohort),
            missing={str(client): why for client, why in commit.missing},
            **({"stale": {str(c): s for c, s in commit.stale}} if commit.stale else {}),
            **metrics,
        )
        self._reconcile(commit.round)

    def looked(self, idle: Collection[str], is_drained: bool) -> None:
        """The kernel's counts were just taken; ``idle`` nodes owe no answer."""
        self._reconciler.look(idle, is_drained)

    def _reconcile(self, round: int) -> None:
        """Write down a round's bytes, and warn of the first that nothing explains."""
        hidden = self.account.evaluators | {OTHERS}
        nodes, compared, excesses = self._reconciler.close(hidden)
        self.account.compared += compared
        for node, way, unexplained, kernel in excesses:
            ways = self.account.unexplained.setdefault(node, {})
            if way not in ways:
                ways[way] = Unexplained(round)
                what = f"{abs(unexplained)} bytes {'too many' if unexplained > 0 else 'too few'}"
                log.warning(
                    "round %d, node %s %s: %s counted beside the kernel's %d",
                    *(round, node, way, what, kernel),
                )
            ways[way].rounds += 1
            ways[way].bytes += unexplained
        self._append("bytes.jsonl", {"round": round, "nodes": nodes})

    @property
    def _folds_late(self) -> bool:
        return self.experiment.rounds.late == "fold"

    def abandoned(self, abandon: Abandon, now: float) -> None:
        assert self.account.round is not None  # noqa: S101 - it was opened
        self.account.seconds += now - self.account.round.opened_at
        if abandon.refs:
            add(self.num_rejected, "round abandoned", len(abandon.refs))

    def scored(self, round: int, score: Score) -> None:
        self.scores.append((round, score))
        self._line(round, test_loss=score.loss, metric=score.metric, **self.quality.more(score))

    def rejected(self, reason: str) -> None:
        key = reason.split(":")[0]
        if key not in self.num_rejected and len(self.num_rejected) >= MAX_REASONS:
            key = "other"  # some quote what a peer made up
        add(self.num_rejected, key)

    def resynced(self, member: Member, reason: str) -> None:
        del member, reason
        self.account.num_resyncs += 1

    # --- the account -------------------------------------------------------------

    def bytes(self) -> dict[str, int]:
        """Bytes of the training nodes so far, both ways; of TCP if the kernel knows all nodes."""
        levels = {"payload": self.meter.payload, "message": self.meter.message}
        found = {
            f"{level}_{way}": sum(
                count
                for key, count in counter.items()
                if key.way == way and key.node not in self.account.evaluators
            )
            for level, counter in levels.items()
            for way in ("up", "down")
        }
        nodes = self.account.nodes.keys() - self.account.evaluators
        if nodes and nodes <= self.meter.traffic.keys():
            known = nodes | ({OTHERS} & self.meter.traffic.keys())
            traffic = [self.meter.traffic[node] for node in known]
            found["tcp_up"] = sum(t.received for t in traffic)
            found["tcp_down"] = sum(t.sent for t in traffic)
            resent = [t.resent for t in traffic if t.resent is not None]
            if len(resent) == len(traffic):
                found["tcp_resent_down"] = sum(resent)
        return found

    def spent(self) -> Spent:
        """What a budget is held against."""
        total, joules = self.bytes(), self.account.joules
        return Spent(
            total["message_up"] + total["message_down"],
            self.account.seconds,
            sum(joules.values()) if joules else None,
        )

    def own_over_kernel(self) -> dict[str, float]:
        """Message bytes over those of TCP: what our count is worth.  Empty if not known."""
        total = self.bytes()
        if not total.get("tcp_up") or not total.get("tcp_down"):
            return {}
        return {way: total[f"message_{way}"] / total[f"tcp_{way}"] for way in ("up", "down")}

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Message bytes by kind and direction."""
        table: dict[str, dict[str, int]] = {}
        for key, count in sorted(self.meter.message.items()):
            if key.node not in self.account.evaluators:
                row = table.setdefault(key.kind, {"up": 0, "down": 0})
                row[key.way] += count
        return table

    def finish(
        self, central: Central, reason: str | None, ended: str | None = None
    ) -> dict[str, Any]:
        """Write ``summary.json`` and return it.

        Args:
            central: with the final parameters.
            reason: why the run failed, or None.
            ended: why it has fewer rounds than it was to have, or None.
        """
        (_, before), (_, after) = self.scores[0], self.scores[-1]
        a, e = self.account, self.experiment
        train = sum(a.train_seconds.values()) / (len(a.train_seconds) or 1)
        total, per = self.bytes(), max(1, a.client_rounds)
        summary = {
            "version": SUMMARY_VERSION,
            "run": e.run.name,
            "status": "completed" if reason is None else f"failed: {reason}",
            **({"ended": ended} if ended else {}),
            "method": e.method["name"],
            "model": e.model.id,
            "data": e.data.id,
            "seed": e.run.seed,
            "rounds": len(a.losses),
            "clients": e.partition.clients,
            "nodes": sum(node["role"] == "train" for node in a.nodes.values()),
            "trained_parameters": central.space.size,
            "metric": {"name": self.quality.name, "before": before.metric, "after": after.metric},
            "loss": {"before": before.loss, "after": after.loss},
            **self.quality.summary(before, after),
            "bytes": total | {"per_client_round": {k: v / per for k, v in total.items()}},
            "bytes_by_kind": self.by_kind(),
            "own_over_kernel": self.own_over_kernel(),
            "compared": a.compared,
            "unexplained": msgspec.to_builtins(a.unexplained),
            "memory_bytes": a.peaks | {"over_inference": a.over_inference},
            "seconds": {
                "total": a.seconds,
                "train": train,
                "wait": max(0.0, a.seconds - train),
                "by_phase": a.phase_seconds,
            },
            **({"joules": a.joules} if a.joules else {}),
            "digest": central.digest.hex(),
            "rejected": a.num_rejected,
            "refused": dict(self.num_refused),
            "resyncs": a.num_resyncs,
            "resumed": a.num_resumed,
        }
        _write(self.directory / "summary.json", _pretty(summary))
        return summary

    def _raise_peaks(self, member: Member) -> None:
        if member.trains:
            for phase, peak in member.peaks.items():
                self.account.peaks[phase] = max(self.account.peaks.get(phase, 0), peak)

    def _line(self, round: int, **values: Any) -> None:
        """One line of metrics.jsonl, with the totals up to here."""
        totals = {"bytes": self.bytes(), "seconds_total": self.account.seconds}
        self._append("metrics.jsonl", {"round": round, **values, **totals})

    def _append(self, name: str, value: object) -> None:
        line = json.dumps(value)
        self._journal.log(name, line)
        _write(self.directory / name, line + "\n", "a")


def versions() -> dict[str, str]:
    """Of Python, the machine and the packages that a result depends on."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.platform()} | found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(path: Path, text: str, mode: Literal["w", "a"] = "w") -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error.strerror}") from error
