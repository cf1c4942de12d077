"""The pictures of a report: SVG that takes the page's colours, and one PNG on white."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from coordinator.groups import Group
from coordinator.measures import Axis, axes, fronts, message_bytes
from coordinator.results import PHASES
from coordinator.view import human_bytes

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8F6BC9",
    "#8A8A8A",
    "#A0522D",
)
DASHES, MARKERS = ("solid", "dashed", "dotted", "dashdot"), ("o", "s", "^", "D")
KINDS = (
    *("model", "step", "task", "update", "collective"),
    *("evaluate", "heartbeat", "handshake", "control"),
)
INK = "#010203"  # stands for the text colour of the page, which is put in its place
PANEL = (4.6, 3.3)  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "seedwire",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Look:
    """How a group is drawn, the same in all pictures."""

    colour: str
    dash: str
    marker: str


def look(index: int) -> Look:
    """Colours first; those after them are dashed, and have other markers."""
    turn = index // len(COLOURS)
    style = DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)]
    return Look(COLOURS[index % len(COLOURS)], *style)


# --- pictures --------------------------------------------------------------------


def svgs(groups: Sequence[Group], metric: str) -> list[tuple[str, str]]:
    """Title and inline SVG of each picture of a task."""
    found = [
        (f"{metric} against {axis.key}", _svg(PANEL, partial(_cost, groups, axis, metric)))
        for axis in axes(groups)
    ]
    tall = (PANEL[0], 1.3 + 0.25 * max(8, len(groups)))
    if any(_peaks(g) for g in groups):
        found.append(("Peak memory of a node by phase", _svg(tall, partial(_memory, groups))))
    if any(_kinds(g) for g in groups):
        found.append(("What the bytes were", _svg(tall, partial(_bytes, groups))))
    return found


def png(tasks: dict[str, list[Group]], path: Path) -> None:
    """One picture: a row of panels for each task, what is what below it."""
    with mpl.rc_context(STYLE | {"savefig.transparent": False, "font.size": 9}):
        shares = [1.0 + 0.06 * -(-len(groups) // 4) for groups in tasks.values()]
        fig = Figure(figsize=(13, 3.9 * sum(shares)), layout="constrained")
        rows = fig.subfigures(len(tasks), 1, height_ratios=shares, squeeze=False)[:, 0]
        for row, (name, groups) in zip(rows, tasks.items(), strict=True):
            metric = str(groups[0].summary["metric"]["name"])
            known = axes(groups)
            panels = row.subplots(1, max(1, len(known)), squeeze=False)[0]
            for panel, axis in zip(panels, known, strict=False):
                _cost(groups, axis, metric, panel)
            if len(tasks) > 1:
                row.suptitle(name)
            handles, labels = panels[0].get_legend_handles_labels()
            row.legend(handles, labels, loc="outside lower center", ncols=4, handlelength=3)
        fig.savefig(path, dpi=130, facecolor="white")


def _svg(size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=size, layout="constrained")
        draw(fig.subplots())
        out = io.StringIO()
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest  # the page sizes it


# --- panels ----------------------------------------------------------------------


def _cost(groups: Sequence[Group], axis: Axis, metric: str, ax: Axes) -> None:
    """The metric against a cost: lines with bands, or points with bars, and the front."""
    for i, g in enumerate(groups):
        style, points = look(i), axis.points(g)
        x, y = [cost for cost, _ in points], [100 * m.mean for _, m in points]
        low, high = [100 * m.low for _, m in points], [100 * m.high for _, m in points]
        kind: dict[str, Any] = {"color": style.colour, "linestyle": style.dash, "label": g.label}
        ax.plot(x, y, marker=style.marker, markersize=4, linewidth=1.6, **kind)
        if len(points) > 1:
            ax.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)
        elif low != high:
            ax.vlines(x, low, high, color=style.colour, linewidth=1.6)
    kept = sorted(point for points in fronts(groups, axis).values() for point in points)
    x, y = [cost for cost, _ in kept], [100 * quality for _, quality in kept]
    ax.plot(x, y, drawstyle="steps-post", color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
    start = {round(100 * g.summary["metric"]["before"], 6) for g in groups}
    if len(start) == 1:
        ax.axhline(start.pop(), color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
    ax.set(xlabel=axis.label, ylabel=f"{metric}, %")
    ax.grid(color=INK, alpha=0.12, linewidth=0.8)
    if axis.is_log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=_steps(*ax.get_xlim())))
        ax.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.margins(x=0.06)
        if axis.curve is not None:
            ax.set_xlim(0, ax.get_xlim()[1])
        ax.xaxis.set_major_locator(MaxNLocator(6))


def _steps(low: float, high: float) -> tuple[int, ...]:
    """Which multiples of a power of ten are labelled, so that labels do not meet."""
    decades = math.log10(high / low)
    return (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.6 else (1,)


def _peaks(group: Group) -> dict[str, float]:
    """Highest resident bytes of any node by phase; the mean over the seeds."""
    found = {}
    for phase in PHASES:
        spread = group.spread(lambda r, phase=phase: r.summary["memory_bytes"].get(phase))  # type: ignore[misc]
        if spread is not None:
            found[phase] = spread.mean
    return found


def _memory(groups: Sequence[Group], ax: Axes) -> None:
    """A row for each group, a mark for each phase."""
    phases = [p for p in PHASES if any(p in _peaks(g) for g in groups)]
    marks = dict(zip(PHASES, ("P", "s", "o", "v", "D", "^", "X"), strict=True))
    for colour, phase in zip(COLOURS, phases, strict=False):
        lift = 0.3 * (phases.index(phase) / max(1, len(phases) - 1) - 0.5)  # they coincide a lot
        known = [(y, _peaks(g)[phase]) for y, g in enumerate(groups) if phase in _peaks(g)]
        x, y = [peak / 1e9 for _, peak in known], [row + lift for row, _ in known]
        ax.plot(x, y, marks[phase], color=colour, markersize=5, alpha=0.9, label=phase)
    _rows(ax, groups)
    ax.margins(x=0.06)
    ax.set_xlim(0, ax.get_xlim()[1])
    ax.set_xlabel("GB, resident")
    ax.grid(axis="x", color=INK, alpha=0.12, linewidth=0.8)


def _kinds(group: Group) -> dict[str, float]:
    """Message bytes by kind, both ways, all seeds."""
    table: dict[str, float] = {}
    for result in group.results:
        for kind, ways in result.summary.get("bytes_by_kind", {}).items():
            table[kind] = table.get(kind, 0.0) + ways["up"] + ways["down"]
    return table


def _bytes(groups: Sequence[Group], ax: Axes) -> None:
    """A bar of shares for each group: the totals are orders of magnitude apart."""
    tables = [_kinds(g) for g in groups]
    present = [kind for kind in KINDS if any(kind in table for table in tables)]
    left = [0.0] * len(groups)
    for colour, kind in zip(COLOURS, present, strict=False):
        share = [100 * t.get(kind, 0.0) / (sum(t.values()) or 1) for t in tables]
        ax.barh(range(len(groups)), share, left=left, color=colour, height=0.7, label=kind)
        left = [a + b for a, b in zip(left, share, strict=True)]
    for y, g in enumerate(groups):
        sent = g.spread(message_bytes)
        ax.text(101.5, y, human_bytes(sent.mean) if sent else "", va="center", fontsize=9)
    _rows(ax, groups)
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of message bytes; at the right, the total")


def _rows(ax: Axes, groups: Sequence[Group]) -> None:
    ax.set_yticks(range(len(groups)), [g.label for g in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, handlelength=1.2)
