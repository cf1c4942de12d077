"""Finished runs as they are compared: from a run directory, or from a JSON file of a report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.status import Reader
from protocol.errors import ExperimentError

Table = dict[str, Any]
PHASES = ("bare", "load", "inference", "catch-up", "train", "encode", "reduce")


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        summary: as in ``summary.json``.
        points: what it had reached and cost at each evaluation: ``round``, ``metric``,
            ``loss``, ``bytes`` (of messages, both ways), ``seconds``, ``joules``; the last
            three null where they are not known.
        experiment: as resolved; empty if not known.
        nodes: per training node: ``node``, ``host``, ``clients``, ``updates``,
            ``seconds`` and ``memory_bytes`` by phase, ``joules``, ``bytes`` by level,
            ``celsius``, ``throttled``; ``labels`` of its host, if it has any.
        payload_by_kind: payload bytes by kind and direction; empty if not known.
    """

    summary: Table
    points: list[Table]
    experiment: Table = field(default_factory=dict)
    nodes: list[Table] = field(default_factory=list)
    payload_by_kind: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def joules(self) -> float | None:
        return total(node.get("joules") for node in self.nodes)

    @property
    def tcp_bytes(self) -> int | None:
        """Both ways, as the kernels count; None unless known of every node."""
        whole = self.summary.get("bytes", {})
        if "tcp_up" in whole:
            return int(whole["tcp_up"]) + int(whole["tcp_down"])
        counted = [node.get("bytes", {}).get("tcp") for node in self.nodes]
        if not counted or None in counted:
            return None
        return sum(int(ways["up"]) + int(ways["down"]) for ways in counted if ways)

    def entry(self) -> Table:
        """For a JSON file."""
        return {
            **self.summary,
            "curve": self.points,
            "experiment": self.experiment,
            "per_node": self.nodes,
            "payload_by_kind": self.payload_by_kind,
        }


# --- reading ---------------------------------------------------------------------


def read(path: Path) -> list[Result]:
    """The run of a directory, or the runs of a JSON file.

    Raises:
        ExperimentError: it is neither.
    """
    try:
        if path.is_dir():
            return [_of_directory(path)]
        return [_of_entry(entry) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ExperimentError(f"{path} is not a finished run: {why}") from error


def _of_directory(path: Path) -> Result:
    summary = json.loads((path / "summary.json").read_bytes())
    s = Reader(path).status()
    costs = _lines(path / "costs.jsonl")
    spent = _joules_by_round(costs)
    points = [
        {
            "round": line["round"],
            "metric": line["metric"],
            "loss": line.get("test_loss"),
            "bytes": line["bytes"]["message_up"] + line["bytes"]["message_down"],
            "seconds": line["seconds_total"],
            "joules": sum(spent[r] for r in spent if r <= line["round"]) if spent else None,
        }
        for line in s["evaluations"]
    ]
    here = [node for node in s["nodes"] if node.get("role") != "evaluate"]
    nodes = [_node(node, [c for c in costs if c["node"] == node["node"]]) for node in here]
    labels = path / "labels.json"
    found = json.loads(labels.read_bytes()) if labels.exists() else {}
    nodes = [n | {"labels": found[n["node"]]} if n["node"] in found else n for n in nodes]
    return Result(summary, points, Reader(path).experiment, nodes, _payload_by_kind(here))


def _of_entry(entry: Table) -> Result:
    rest = {"curve", "experiment", "per_node", "payload_by_kind"}
    summary = {key: value for key, value in entry.items() if key not in rest}
    name = summary["metric"]["name"]
    points = [
        {
            "round": p["round"],
            "metric": p["metric"] if "metric" in p else p[name],
            "loss": p["loss"],
            **{key: p.get(key) for key in ("bytes", "seconds", "joules")},
        }
        for p in entry.get("curve", [])
    ]
    parts = entry.get("experiment", {}), entry.get("per_node", [])
    return Result(summary, points, *parts, entry.get("payload_by_kind", {}))


def _lines(path: Path) -> list[Table]:
    """Of bytes: a text may hold what ends a line of text alone, as U+2028."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _phases(cost: Table) -> dict[str, Table]:
    """The phases of a line of costs.jsonl, which has other tables too."""
    return {k: v for k, v in cost.items() if isinstance(v, dict) and "seconds" in v}


def _joules_by_round(costs: Iterable[Table]) -> dict[int, float]:
    """Empty unless every phase of every update was metered."""
    found: dict[int, float] = defaultdict(float)
    for cost in costs:
        for phase in _phases(cost).values():
            if phase.get("joules") is None:
                return {}
            found[cost["round"]] += phase["joules"]
    return found


def _node(told: Table, costs: list[Table]) -> Table:
    """What one node did, from its updates and from what the live file says of it."""
    seconds: dict[str, float] = defaultdict(float)
    memory: dict[str, int] = dict(told.get("memory_bytes", {}))
    for cost in costs:
        for name, phase in _phases(cost).items():
            seconds[name] += phase["seconds"]
            if phase.get("rss") is not None:
                memory[name] = max(memory.get(name, 0), phase["rss"])
    levels = {
        level: {way: sum(kind.get(way, 0) for kind in kinds.values()) for way in ("up", "down")}
        for level, kinds in told.get("bytes", {}).items()
    }
    if "tcp" in told:
        levels["tcp"] = told["tcp"]
    joules = _joules_by_round(costs)
    return {
        **{key: told[key] for key in ("node", "host", "clients") if key in told},
        "updates": len(costs),
        "seconds": dict(seconds),
        "memory_bytes": memory,
        "joules": sum(joules.values()) if joules else None,
        "bytes": levels,
        **_health([cost["vitals"] for cost in costs if cost.get("vitals")]),
    }


def _health(vitals: list[Table]) -> Table:
    """How hot the machine was at most, and why it was slowed down; null if it does not say."""
    heat = [v["celsius"] for v in vitals if v.get("celsius") is not None]
    said = [v["throttled"] for v in vitals if v.get("throttled") is not None]
    why = ", ".join(dict.fromkeys(filter(None, said)))
    return {"celsius": max(heat, default=None), "throttled": why if said else None}


def _payload_by_kind(nodes: list[Table]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for node in nodes:
        for kind, ways in node.get("bytes", {}).get("payload", {}).items():
            row = table.setdefault(kind, {"up": 0, "down": 0})
            for way, count in ways.items():
                row[way] += count
    return table


def total(values: Iterable[float | None]) -> float | None:
    """The sum; None if there is nothing to add, or if part of it is not known."""
    found = list(values)
    return None if not found or None in found else sum(v for v in found if v is not None)
