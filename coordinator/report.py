"""Comparing runs: tables for people and for machines, a picture, and one page that needs no other.

Everything shown is read from run directories, or from the JSON of an earlier report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from coordinator import figures
from coordinator.groups import Group, tasks
from coordinator.results import PHASES, Result
from coordinator.tables import as_csv, markdown, records, rows
from coordinator.view import human_bytes


def write(groups: Sequence[Group], out: Path, title: str) -> None:
    """Write ``comparison`` as html, png, json, csv, parquet and md into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    results = [result for g in groups for result in g.results]
    text = json.dumps([result.entry() for result in results], indent=1)
    (out / "comparison.json").write_text(text + "\n")
    (out / "comparison.csv").write_text(as_csv(groups))
    (out / "comparison.md").write_text(markdown(groups))
    pq.write_table(pa.Table.from_pylist(records(groups)), out / "comparison.parquet")
    figures.png(tasks(groups), out / "comparison.png")
    (out / "comparison.html").write_text(page(groups, title))


def page(groups: Sequence[Group], title: str) -> str:
    """The whole report as one HTML page that loads nothing."""
    environment = Environment(
        loader=PackageLoader("coordinator", ""),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html").render(
        title=title,
        tasks=[_task(name, found) for name, found in tasks(groups).items()],
        nodes=[
            {"label": f"{g.label}, seed {result.summary['seed']}", "rows": list(_nodes(result))}
            for g in groups
            for result in g.results
            if result.nodes
        ],
        throttled=[
            f"{node['node']} ({result.summary['run']}, seed {result.summary['seed']}): {why}"
            for g in groups
            for result in g.results
            for node in result.nodes
            if (why := node.get("throttled"))
        ],
        kinds=[{"label": g.label, "rows": list(_kinds(g))} for g in groups],
        summaries=[result.summary for g in groups for result in g.results],
    )


def _task(name: str, groups: list[Group]) -> dict[str, Any]:
    texts = rows(groups)
    return {
        "name": name,
        "legend": [(g.label, figures.look(i)) for i, g in enumerate(groups)],
        "pictures": figures.svgs(groups, str(groups[0].summary["metric"]["name"])),
        "measures": [label for label, _ in texts],
        "rows": [
            (g.label, figures.look(i), [cells[i].split("\n") for _, cells in texts])
            for i, g in enumerate(groups)
        ],
    }


def _nodes(result: Result) -> Iterator[dict[str, str]]:
    """What each node is, did and needed, as text."""
    labels = dict.fromkeys(key for node in result.nodes for key in node.get("labels", {}))
    for node in result.nodes:
        cells = {"node": node["node"], "host": node.get("host", "absent")}
        cells |= {f"{key} (label)": node.get("labels", {}).get(key, "") for key in labels}
        cells |= {"clients": str(len(node.get("clients", []))), "updates": str(node["updates"])}
        for phase in ("train", "catch-up"):
            seconds = node["seconds"].get(phase)
            cells[f"{phase}, s"] = "absent" if seconds is None else f"{seconds:.1f}"
        for phase in PHASES:
            peak = node["memory_bytes"].get(phase)
            cells[f"{phase} peak"] = "absent" if peak is None else human_bytes(peak)
        for level in ("payload", "message", "tcp"):
            ways = node["bytes"].get(level)
            both = "absent" if ways is None else "↑{} ↓{}".format(*map(human_bytes, _pair(ways)))
            cells[f"{level} bytes"] = both
        joules = node.get("joules")
        cells["joules"] = "absent" if joules is None else f"{joules:.4g}"
        celsius, throttled = node.get("celsius"), node.get("throttled")
        cells["hottest, °C"] = "absent" if celsius is None else f"{celsius:.0f}"
        cells["throttled"] = "absent" if throttled is None else throttled or "no"
        yield cells


def _pair(ways: dict[str, int]) -> tuple[int, int]:
    return ways["up"], ways["down"]


def _kinds(g: Group) -> Iterator[dict[str, str]]:
    """Bytes by kind and level of the first seed, as text, and their sums."""
    result = g.results[0]
    total = result.summary["bytes"]
    messages, payload = result.summary.get("bytes_by_kind", {}), result.payload_by_kind
    for kind, ways in sorted(messages.items()):
        own = payload.get(kind, {"up": 0, "down": 0}) if payload else None
        yield _levels(kind, _pair(own) if own else None, _pair(ways))
    of = {level: (total[f"{level}_up"], total[f"{level}_down"]) for level in ("payload", "message")}
    yield _levels("all", of["payload"], of["message"])
    if "tcp_up" in total:
        yield _levels("all, as the kernel counts", None, (total["tcp_up"], total["tcp_down"]))


def _levels(
    kind: str, payload: tuple[int, int] | None, messages: tuple[int, int]
) -> dict[str, str]:
    up, down = map(human_bytes, payload) if payload else ("absent", "absent")
    sent = dict(zip(("messages up", "messages down"), map(human_bytes, messages), strict=True))
    return {"kind": kind, "payload up": up, "payload down": down, **sent}
