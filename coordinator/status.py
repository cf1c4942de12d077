"""What a run is doing and what it has done, read from its directory and from nothing else.

One function for all who show a run: the coordinator's own view, ``seedwire watch``,
``serve`` and ``list``.  It works on a run that goes on, on one that is over, and on one
whose coordinator was killed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from coordinator import processes
from protocol.errors import ExperimentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def status(directory: Path) -> dict[str, Any]:
    """A run as it is now; see ``Reader.status``."""
    return Reader(directory).status()


class Reader:
    """Reads a run again and again; lines that it has read it does not read twice.

    Args:
        most_commits: keep the lines of no more than the last so many; None keeps all.

    Attributes:
        news: lines of ``metrics.jsonl`` that the last call of ``status`` was the first to see.

    Raises:
        ExperimentError: the directory holds no run.
    """

    def __init__(self, directory: Path, most_commits: int | None = None) -> None:
        self.directory, self._most_commits = directory, most_commits
        self.news: list[dict[str, Any]] = []
        try:
            self.experiment = tomllib.loads((directory / "experiment.toml").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ExperimentError(f"{directory} holds no run: {error}") from error
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl
        self._read_bytes, self._last = 0, b""  # so far, and of it the last line

    def status(self) -> dict[str, Any]:
        """A run as it is now, in types that JSON has.

        Returns:
            What ``status.json`` says (``docs/summary.md``), and: ``directory``, ``run``,
            ``method``, ``model``, ``data``, ``seed``; ``state``, which is ``running``,
            ``completed``, ``failed`` or ``stopped``, and its ``reason``; ``metric``, the
            metric's name; ``evaluations`` and ``commits``, the lines of
            ``metrics.jsonl``; ``summary``, null while there is none; and ``age_seconds``
            since ``status.json`` was written, null if there is none.
        """
        live = _json(self.directory / "status.json") or {}
        summary = _json(self.directory / "summary.json")
        self._read_lines()
        commits = [line for line in self.lines if "train_loss" in line]
        state, reason = self._state(live, summary)
        return {
            "rounds": self._given("rounds", "count"),
            "clients": self._given("partition", "clients"),
            "round": commits[-1]["round"] if commits else 0,
            "phase": "finished" if summary else "unknown",
            "bytes": self.lines[-1]["bytes"] if self.lines else None,
            "rejected": {},
            "resyncs": 0,
            **live,
            "nodes": self._nodes(live),
            "directory": str(self.directory),
            "name": self.directory.resolve().name,
            "run": self._given("run", "name"),
            "method": self._given("method", "name"),
            "model": self._given("model", "id"),
            "data": self._given("data", "id"),
            "seed": self._given("run", "seed"),
            "metric": "token accuracy" if self._is_causal else "accuracy",
            "state": state,
            "reason": reason,
            "evaluations": [line for line in self.lines if "metric" in line],
            "commits": commits,
            "summary": summary,
            "age_seconds": max(0.0, time.time() - live["at"]) if "at" in live else None,
        }

    @property
    def _is_causal(self) -> bool:
        return bool(self._given("data", "task") == "causal")

    def _given(self, section: str, key: str) -> Any:
        return self.experiment.get(section, {}).get(key)

    def _state(
        self, live: dict[str, Any], summary: dict[str, Any] | None
    ) -> tuple[str, str | None]:
        """Running, completed, failed or stopped, and why."""
        is_over = summary is not None and live.get("phase", "finished") == "finished"
        if not is_over and processes.coordinator_of(self.directory):
            return "running", live.get("reason")
        if summary is None:
            return "stopped", "its coordinator has ended, or runs on another machine"
        what, _, why = str(summary["status"]).partition(": ")
        return what, why or summary.get("ended")

    def _nodes(self, live: dict[str, Any]) -> list[dict[str, Any]]:
        """The nodes of the live file over those of ``nodes.json``, which have less."""
        known = _json(self.directory / "nodes.json") or {}
        told = {node["node"]: node for node in live.get("nodes", ())}
        names = sorted({*known, *told})
        return [{"node": n, **known.get(n, {}), **told.get(n, {})} for n in names]

    def _read_lines(self) -> None:
        """Read what has been added to metrics.jsonl; a line still being written waits.

        A resumed run writes the file anew, from its last commit: then it is read anew.
        """
        self.news, is_anew = [], False
        try:
            with (self.directory / "metrics.jsonl").open("rb") as file:
                file.seek(self._read_bytes - len(self._last))
                if is_anew := file.read(len(self._last)) != self._last:
                    self._read_bytes, self._last, self.lines = 0, b"", []
                    file.seek(0)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        if newline:
            self._read_bytes += len(whole) + 1
            self._last = whole.splitlines()[-1] + b"\n"
            lines = [json.loads(line) for line in whole.splitlines()]
            self.lines += lines
            self.news = [] if is_anew else lines
            self._let_go()

    def _let_go(self) -> None:
        """Of old commits, where nobody wants them: they are as many as rounds."""
        if self._most_commits is None:
            return
        commits = [n for n, line in enumerate(self.lines) if "train_loss" in line]
        old = set(commits[: -self._most_commits])
        self.lines = [line for n, line in enumerate(self.lines) if n not in old]


def _json(path: Path) -> Any:
    """A JSON file, or None if it is not there or not whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def sentence(s: dict[str, Any]) -> str:
    """One line: what the run does, or how it ended."""
    if s["state"] != "running":
        return ": ".join(filter(None, (s["state"], s["reason"])))
    match s["phase"]:
        case "training":
            waiting = [f"client {w['client']} ({w['node'] or 'node lost'})" for w in s["waiting"]]
            more = f" and {len(waiting) - 6} more" if len(waiting) > 6 else ""
            spent = f"{s['seconds']:.0f} s of at most {s['deadline_seconds']:.0f}"
            whom = ", ".join(waiting[:6]) + more or "nobody"
            return f"round {s['round'] + 1}, {spent}: waiting for {whom}"
        case "evaluating":
            return f"evaluating after round {s['round']}"
        case "gathering":
            return f"waiting for {s['lacks']}"
        case "finished":
            if s["reason"]:
                return f"the run failed: {s['reason']}"
            return ": ".join(filter(None, ("the run is complete", s.get("ended"))))
        case phase:
            return str(phase)
