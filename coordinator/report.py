"""Comparing runs: a table, a plot, and one HTML page that needs nothing else.

Everything shown is read from ``summary.json`` and ``metrics.jsonl`` of the runs.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from coordinator.view import human_bytes
from protocol.errors import ExperimentError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


@dataclass(frozen=True)
class Curve:
    """A finished run: its summary, and what it had cost at each evaluation."""

    summary: dict[str, Any]
    points: list[dict[str, Any]]  # the lines of metrics.jsonl that have a metric

    @property
    def label(self) -> str:
        return str(self.summary["run"])


def read(directory: Path) -> Curve:
    """Read a run directory.

    Raises:
        ExperimentError: it is not the directory of a finished run.
    """
    try:
        summary = json.loads((directory / "summary.json").read_text())
        lines = (directory / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{directory} is not a finished run: {error}") from error
    return Curve(summary, [p for p in map(json.loads, lines) if "metric" in p])


def measures(s: dict[str, Any]) -> dict[str, str]:
    """A summary as text, by measure, in the order in which they are shown."""
    per, memory = s["bytes"]["per_client_round"], s["memory_bytes"]
    over = memory["over_inference"]
    return {
        "trained": f"{s['trained_parameters']:,}",
        **_quality(s),
        "up per update": human_bytes(per["message_up"]),
        "down per update": human_bytes(per["message_down"]),
        "bytes in all": human_bytes(s["bytes"]["message_up"] + s["bytes"]["message_down"]),
        "peak memory": human_bytes(memory["train"]) if "train" in memory else "absent",
        "over inference": human_bytes(over) if over is not None else "absent",
        "seconds": f"{s['seconds']['total']:.0f}",
    }


def _quality(s: dict[str, Any]) -> dict[str, str]:
    """How good the model was and is; which measures there are depends on the task."""
    metric, loss, perplexity = s["metric"], s["loss"], s.get("perplexity")
    out = {
        f"{metric['name']}, %": f"{100 * metric['before']:.1f}→{100 * metric['after']:.1f}",
        "loss": f"{loss['before']:.3f}→{loss['after']:.3f}",
    }
    if perplexity is not None:
        ends = (perplexity["before"], perplexity["after"])
        out["perplexity"] = "→".join("absent" if end is None else f"{end:.4g}" for end in ends)
    if s.get("rouge_l") is not None:
        out["Rouge-L, %"] = f"{100 * s['rouge_l']:.1f}"
    return out


def rows(curves: list[Curve]) -> list[tuple[str, list[str]]]:
    """Each measure that any of the runs has, and its text for each run."""
    columns = [measures(curve.summary) for curve in curves]
    quality = dict.fromkeys(name for curve in curves for name in _quality(curve.summary))
    first, *others = dict.fromkeys(name for column in columns for name in column)
    names = [first, *quality, *(name for name in others if name not in quality)]
    return [(n, [column.get(n, "absent") for column in columns]) for n in names]


def table(curves: list[Curve], title: str) -> Table:
    """The comparison for a terminal: a column per run, so that four fit into 80 places."""
    out = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    out.add_column("", no_wrap=True)
    for curve in curves:
        out.add_column(curve.label, justify="right")
    for name, cells in rows(curves):
        out.add_row(name, *cells)
    return out


def figure(curves: list[Curve]) -> Figure:
    """The metric against bytes, the metric against seconds, memory per method."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        fig = Figure(figsize=(12, 3.8), layout="constrained")
        against_bytes, against_seconds, memory = fig.subplots(1, 3)
        for curve, colour in zip(curves, _colours(len(curves)), strict=True):
            metric = [100 * p["metric"] for p in curve.points]
            sent = [_sent(p) for p in curve.points]
            style = {"color": colour, "marker": "o", "markersize": 3.5, "label": curve.label}
            against_bytes.plot(sent[1:], metric[1:], **style)
            against_seconds.plot([p["seconds_total"] for p in curve.points], metric, **style)
        start = 100 * curves[0].points[0]["metric"]
        against_bytes.axhline(start, color="#888888", linewidth=0.8, linestyle=":")
        name = f"{metric_names(curves)}, %"
        against_bytes.set(xscale="log", xlabel="bytes, both ways, all clients", ylabel=name)
        against_seconds.set(xlabel="seconds with a round open", ylabel=name)
        against_bytes.legend(frameon=False)
        _bars(memory, curves)
        return fig


def metric_names(curves: list[Curve]) -> str:
    """What the runs' metrics are; of several tasks that is more than one thing."""
    return " or ".join(dict.fromkeys(str(curve.summary["metric"]["name"]) for curve in curves))


def _sent(point: dict[str, Any]) -> int:
    return int(point["bytes"]["message_up"] + point["bytes"]["message_down"])


def _bars(axes: Axes, curves: list[Curve]) -> None:
    """Peak resident memory of a node in training, and the part over one inference batch."""
    labels = [curve.label for curve in curves]
    peaks = [curve.summary["memory_bytes"].get("train", 0) / 1e9 for curve in curves]
    over = [(curve.summary["memory_bytes"]["over_inference"] or 0) / 1e9 for curve in curves]
    base = [max(0.0, peak - extra) for peak, extra in zip(peaks, over, strict=True)]
    axes.barh(labels, base, color="#BBBBBB", label="inference")
    axes.barh(labels, over, left=base, color=_colours(len(curves)))
    for row, (peak, extra) in enumerate(zip(peaks, over, strict=True)):
        axes.text(peak, row, f" +{1000 * extra:.0f} MB", va="center", fontsize=8)
    axes.set(xlabel="peak memory of a node, GB; colour: over inference")
    axes.set_xlim(0, 1.18 * max([*peaks, 0.001]))
    axes.invert_yaxis()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def write(curves: list[Curve], out: Path, title: str) -> None:
    """Write ``comparison.png``, ``comparison.html`` and ``comparison.json`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    fig = figure(curves)
    fig.savefig(out / "comparison.png", dpi=150)
    picture = base64.b64encode((out / "comparison.png").read_bytes()).decode()
    summaries = [curve.summary for curve in curves]
    (out / "comparison.json").write_text(json.dumps(summaries, indent=2) + "\n")
    shown = rows(curves)
    cells = zip(*(texts for _, texts in shown), strict=True)
    environment = Environment(
        loader=PackageLoader("coordinator", ""), autoescape=select_autoescape()
    )
    page = environment.get_template("report.html").render(
        title=title,
        metric=metric_names(curves),
        measures=[name for name, _ in shown],
        runs=list(zip([curve.label for curve in curves], cells, strict=True)),
        picture=picture,
        summaries=summaries,
        alt="; ".join(f"{c.label}: {_described(c.summary)}" for c in curves),
    )
    (out / "comparison.html").write_text(page)


def _described(s: dict[str, Any]) -> str:
    name, text = next(iter(_quality(s).items()))
    return f"{name} {text}"
