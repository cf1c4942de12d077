"""The comparison as a table: for a terminal, as Markdown, and for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from coordinator.groups import Group, tasks
from coordinator.measures import axes, fronts, measures, shown

ABREAST = 4  # runs beside each other in a terminal
ENDS = ("mean", "low", "high")


def rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each measure that any of the groups has, and its text for each."""
    seeds = [", ".join(map(str, g.seeds)) for g in groups]
    found = [(m.label, [m.text(g) for g in groups]) for m in shown(groups)]
    several = any(len(g.results) > 1 for g in groups)
    best = [", ".join(_best_at(groups, i)) or "-" for i in range(len(groups))]
    return [*([("seeds", seeds)] if several else []), *found, ("best for its", best)]


def _best_at(groups: Sequence[Group], index: int) -> list[str]:
    """The costs of which this group is on the Pareto front of its task."""
    mine = groups[index]
    peers = next(found for found in tasks(groups).values() if mine in found)
    place = peers.index(mine)
    return [axis.key for axis in axes(peers) if place in fronts(peers, axis)]


def table(groups: Sequence[Group], title: str) -> Stack:
    """The comparison for a terminal: a column per group, as many as fit into 80 places."""
    texts, parts = rows(groups), []
    for start in range(0, len(groups), ABREAST):
        out = _frame(None if start else title)
        out.add_column("", no_wrap=True)
        for g in groups[start : start + ABREAST]:
            out.add_column(Text(g.label), justify="right", overflow="fold")
        for name, cells in texts:
            out.add_row(
                name, *(Text(c.replace(" to ", "-")) for c in cells[start : start + ABREAST])
            )
        parts.append(out)
    return Stack(*parts)


def plain(lines: Sequence[Sequence[str]]) -> Table:
    """Rows of cells, the first of them headings, for a terminal."""
    out = _frame(None)
    for i, name in enumerate(lines[0]):
        out.add_column(name, justify="right" if i else "left", overflow="fold")
    for cells in lines[1:]:
        out.add_row(*map(Text, cells))
    return out


def _frame(title: str | None) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD,
                 pad_edge=False)  # fmt: skip


def markdown(groups: Sequence[Group]) -> str:
    """The comparison as a Markdown table, a row per group."""
    texts = rows(groups)
    lines = [["run", *(name for name, _ in texts)], ["---"] * (len(texts) + 1)]
    lines += [[g.label, *(_one_line(cells[i]) for _, cells in texts)] for i, g in enumerate(groups)]
    return as_markdown(lines)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, with their rule, as a Markdown table."""
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |\n" for cells in lines)


def _one_line(text: str) -> str:
    mean, _, spread = text.partition("\n")
    return f"{mean} ({spread})" if spread else mean


def records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The comparison for machines: plain units, null for what was not measured."""
    return [_record(groups, i) for i in range(len(groups))]


def _record(groups: Sequence[Group], index: int) -> dict[str, Any]:
    g = groups[index]
    s = g.summary
    out: dict[str, Any] = {"label": g.label, "run": s["run"]}
    out["seeds"] = " ".join(map(str, g.seeds))
    out |= {key: s[key] for key in ("method", "model", "data", "rounds", "clients", "nodes")}
    for m in measures(groups):
        if m.before is not None:
            first = g.spread(m.before)
            out[f"{m.key}_before"] = first and first.mean
        spread = g.spread(m.get)
        for end, value in (asdict(spread) if spread else {}).items() or dict.fromkeys(ENDS).items():
            out[m.key if end == "mean" else f"{m.key}_{end}"] = value
    best = _best_at(groups, index)
    return out | {f"is_best_{axis.key}": axis.key in best for axis in axes(groups)}


def as_csv(groups: Sequence[Group]) -> str:
    found = records(groups)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()
