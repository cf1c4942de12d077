"""From run directories to one JSON file, and from that to the table of the docs.

    python scripts/collect.py runs/A runs/B ... > experiments/shared-randomness.json
    python scripts/collect.py --table experiments/shared-randomness.json

An entry is the run's summary without the parts that are of one machine's processes, and
its curve: round, loss, the metric by its name, payload bytes and seconds at each
evaluation.  The table has one row for each experiment name: the mean over its seeds, and
the range.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

KEEP = (
    *("run", "status", "method", "model", "data", "seed", "rounds", "clients", "nodes"),
    *("trained_parameters", "metric", "loss", "bytes", "memory_bytes", "seconds", "digest"),
)
COLUMNS = (
    *("run", "seeds", "loss, before", "after", "{metric} %, before", "after"),
    *(
        "payload B up, client and round",
        "down",
        "message B, all",
        "MB over inference",
        "seconds in training",
    ),
)


def entry(directory: Path) -> dict[str, Any]:
    """What is kept of one run."""
    summary = json.loads((directory / "summary.json").read_text())
    if summary["status"] != "completed":
        raise SystemExit(f"{directory}: {summary['status']}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {
            "round": line["round"],
            "loss": line["test_loss"],
            summary["metric"]["name"]: line["metric"],
            "payload_bytes": line["bytes"]["payload_up"] + line["bytes"]["payload_down"],
            "seconds": line["seconds_total"],
        }
        for line in lines
        if "test_loss" in line
    ]
    return {key: summary[key] for key in KEEP} | {"curve": curve}


def check(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, unless a name stands for two experiments or a seed is there twice."""
    places = [(e["run"], e["seed"]) for e in entries]
    for place in places:
        if places.count(place) > 1:
            raise SystemExit(f"run {place[0]} with seed {place[1]} is there twice")
    for name in {e["run"] for e in entries}:
        kinds = {
            (e["rounds"], e["clients"], e["trained_parameters"])
            for e in entries
            if e["run"] == name
        }
        if len(kinds) > 1:
            raise SystemExit(f"run {name} stands for more than one experiment")
    return entries


def table(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, one row an experiment."""
    metric = " or ".join(dict.fromkeys(e["metric"]["name"] for e in entries))
    yield f"| {' | '.join(COLUMNS)} |".replace("{metric}", metric)
    yield "|---" * len(COLUMNS) + "|"
    for name in dict.fromkeys(e["run"] for e in entries):  # checked to be of one kind
        runs = [e for e in entries if e["run"] == name]
        per = [e["bytes"]["per_client_round"] for e in runs]
        cells = [
            name,
            str(len(runs)),
            _spread([e["loss"]["before"] for e in runs], ".3f"),
            _spread([e["loss"]["after"] for e in runs], ".3f"),
            _spread([100 * e["metric"]["before"] for e in runs], ".1f"),
            _spread([100 * e["metric"]["after"] for e in runs], ".1f"),
            _spread([p["payload_up"] for p in per], ",.0f"),
            _spread([p["payload_down"] for p in per], ",.0f"),
            _spread([e["bytes"]["message_up"] + e["bytes"]["message_down"] for e in runs], ",.0f"),
            _spread([(e["memory_bytes"].get("over_inference") or nan) / 1e6 for e in runs], ".0f"),
            _spread([e["seconds"]["train"] for e in runs], ".0f"),
        ]
        yield f"| {' | '.join(cells)} |"


def _spread(values: list[float], form: str) -> str:
    """Mean, and the range where there is one."""
    mean = sum(values) / len(values)
    low, high = (format(f(values), form) for f in (min, max))
    return format(mean, form) if low == high else f"{mean:{form}} ({low} to {high})"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="a file made by this script")
    parser.add_argument("directories", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(json.loads(arguments.table.read_text()))))
    else:
        print(json.dumps(check([entry(d) for d in sorted(arguments.directories)]), indent=1))


if __name__ == "__main__":
    main()
