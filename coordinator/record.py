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
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from coordinator import lines, totals
from coordinator.account import Account, Round
from coordinator.central import Central
from coordinator.events import Abandon, Assign, Commit
from coordinator.history import CatchUp
from coordinator.journal import Journal
from coordinator.quality import Quality
from coordinator.reconcile import Excess, Reconciler
from coordinator.roster import Member
from coordinator.summary import summarise
from coordinator.versions import versions
from protocol import experiment as experiments
from protocol.errors import JournalError
from protocol.experiment import Experiment
from protocol.messages import Reduced, Score, Update
from protocol.meter import OTHERS, Meter

log = logging.getLogger(__name__)

LINES = ("metrics.jsonl", "costs.jsonl", "bytes.jsonl", "catch-up.jsonl")


class RunRecorder:
    """Writes the run directory as the run goes on.

    Args:
        directory: of the run; exists.
        experiment: as resolved.
        journal: of the run; with something in it, the account goes on from there.

    Attributes:
        account: the running totals.
        meter: the desk's, once there is one.
        num_refused: the guard's, by reason, once there is one.
    """

    def __init__(self, directory: Path, experiment: Experiment, journal: Journal) -> None:
        self.directory = directory
        self.account = Account()
        self.meter = Meter()
        self.num_refused: Counter[str] = Counter()
        self._experiment, self._journal = experiment, journal
        self._quality = Quality.of(experiment)
        self._folds_late = experiment.rounds.late == "fold"
        self._reconciler = Reconciler(self.meter)
        self._are_nodes_new = False  # since nodes.json was written

    # --- beginning, saving, coming back ------------------------------------------

    def begin(self) -> None:
        """What was asked, and with what software."""
        _write(self.directory / "experiment.toml", experiments.dump(self._experiment))
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
            text = "".join(line + "\n" for line in self._journal.logged(name))
            _write(self.directory / name, text)
        self._write_nodes()

    def finish(
        self, central: Central, reason: str | None, ended: str | None = None
    ) -> dict[str, Any]:
        """Write ``summary.json`` and return it; see ``coordinator.summary``."""
        about = (self._experiment, central, self.account, self.meter)
        summary = summarise(*about, refused=self.num_refused, reason=reason, ended=ended)
        _write(self.directory / "summary.json", _pretty(summary))
        return summary

    # --- nodes -------------------------------------------------------------------

    def joined(self, member: Member) -> None:
        self.account.join(member.hello)
        self._are_nodes_new = True

    def ready(self, member: Member) -> None:
        """A node has loaded; its probe batch is the yardstick of its later peaks."""
        if member.trains and "inference" in member.peaks:
            self.account.inference[member.name] = member.peaks["inference"]
        self._raise_peaks(member)

    def caught_up(self, member: Member, known: int, version: int, catch_up: CatchUp) -> None:
        """A node that was behind is brought up: what was sent, and what each way costs."""
        line = lines.caught_up(member.name, known, version, catch_up)
        self._append("catch-up.jsonl", line)

    def resynced(self) -> None:
        """A node has lost its parameters, or has others than it should."""
        self.account.num_resyncs += 1

    def forget(self, here: Collection[str]) -> list[str]:
        """Count nodes that have long been gone among the others: who, if they are too many."""
        gone = self.account.forget(here)
        for name in gone:
            self.meter.merge(name)
            self._reconciler.forget(name)
        return gone

    def _write_nodes(self) -> None:
        self._are_nodes_new = False
        text = msgspec.json.format(msgspec.json.encode(self.account.nodes), indent=2)
        _write(self.directory / "nodes.json", text.decode() + "\n")

    # --- answers -----------------------------------------------------------------

    def updated(self, member: Member, update: Update) -> None:
        """An update was accepted for aggregation, or at least could have been."""
        self.account.charge(member.name, update.costs)
        self._append("costs.jsonl", lines.updated(member.name, update))
        self.account.take_update(member.name, update, self._folds_late)
        self._raise_peaks(member)

    def reduced(self, member: Member, answer: Reduced) -> None:
        """A node has ended its part of a collective, well or not."""
        self.account.charge(member.name, answer.costs)
        self._append("costs.jsonl", lines.reduced(member.name, answer))
        self._raise_peaks(member)

    def scored(self, round: int, score: Score) -> None:
        self.account.scored(round, score)
        self._line(round, test_loss=score.loss, metric=score.metric, **self._quality.more(score))

    def rejected(self, reason: str) -> None:
        self.account.reject(reason)

    def _raise_peaks(self, member: Member) -> None:
        if member.trains:
            self.account.raise_peaks(member.peaks)

    # --- rounds ------------------------------------------------------------------

    def opened(self, assign: Assign, now: float) -> None:
        self.account.open(Round(assign.round, assign.attempt, now), self._folds_late)

    def looked(self, idle: Collection[str], is_drained: bool) -> None:
        """The kernel's counts were just taken; ``idle`` nodes owe no answer."""
        self._reconciler.look(idle, is_drained)

    def committed(self, commit: Commit, now: float, metrics: Mapping[str, float]) -> None:
        """A round is done; ``metrics`` are the method's own figures."""
        loss, seconds = self.account.close(commit, now)
        about = {"train_loss": loss, "seconds": seconds} | lines.committed(commit)
        self._line(commit.round, **about, **metrics)
        self._reconcile(commit.round)

    def abandoned(self, abandon: Abandon, now: float) -> None:
        self.account.abandon(now, len(abandon.refs))

    def _reconcile(self, round: int) -> None:
        """Write down a round's bytes, and warn of the first that nothing explains."""
        nodes, compared, excesses = self._reconciler.close(self.account.evaluators | {OTHERS})
        self.account.compared += compared
        for excess in excesses:
            if self.account.unexplain(round, excess):
                _warn(round, excess)
        self._append("bytes.jsonl", {"round": round, "nodes": nodes})

    # --- files -------------------------------------------------------------------

    def _line(self, round: int, **values: Any) -> None:
        """One line of metrics.jsonl, with the totals up to here."""
        nbytes = totals.nbytes(self.account, self.meter)
        line = {"round": round, **values, "bytes": nbytes, "seconds_total": self.account.seconds}
        self._append("metrics.jsonl", line)

    def _append(self, name: str, value: object) -> None:
        line = msgspec.json.encode(value).decode()
        self._journal.log(name, line)
        _write(self.directory / name, line + "\n", "ab")


def _warn(round: int, excess: Excess) -> None:
    node, way, unexplained, kernel = excess
    what = f"{abs(unexplained)} bytes {'too many' if unexplained > 0 else 'too few'}"
    log.warning(
        "round %d, node %s %s: %s counted beside the kernel's %d",
        *(round, node, way, what, kernel),
    )


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(path: Path, text: str, mode: Literal["wb", "ab"] = "wb") -> None:
    try:
        with path.open(mode) as file:
            file.write(text.encode())
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error.strerror}") from error
