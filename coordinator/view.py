"""What a person sees of a run: a live table, or plain lines in a file or a pipe.

All of it is read from the run directory, so the coordinator's own terminal and
``seedwire watch`` in another one show the same picture.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.live import spans
from coordinator.status import Reader, sentence

WIDE = 100  # columns from which on a node's host is shown too
BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 40
STYLES = {"running": "cyan", "completed": "green", "failed": "red", "stopped": "yellow"}


def human_bytes(count: float) -> str:
    """1234567 as "1.23 MB"; decimal units, as networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # three digits are up to 999
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class View:
    """Shows a run directory; decides nothing.

    Args:
        from_start: in plain lines, also say what had happened before.
    """

    def __init__(self, console: Console, directory: Path, from_start: bool = False) -> None:
        self._console, self._reader = console, Reader(directory, most_commits=1)
        self.status = self._reader.status()
        self._news = self._reader.news if from_start else []  # to be said
        self._said = ""
        self._live: Live | None = None

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.__enter__()
            self._show()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.update()
        if self._live is not None:
            self._live.__exit__(*exc)

    def update(self) -> None:
        """Read the directory again and show what has changed."""
        self.status = self._reader.status()
        self._news += self._reader.news
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._news = []
            self._live.update(render(self.status, self._console.width), refresh=True)
            return
        for line in self._news:
            self._say(_told(line, self.status))
        self._news = []
        waits = sentence(self.status)
        is_news = self.status["phase"] == "gathering" or self.status["state"] != "running"
        if is_news and waits != self._said:
            self._said = waits
            self._say(waits)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._console.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


def _told(line: dict[str, Any], s: dict[str, Any]) -> str:
    """A line of metrics.jsonl in words."""
    if "metric" in line:
        return f"after round {line['round']}: {', '.join(map(' '.join, scores(line, s)))}"
    sent = human_bytes(sent_bytes(line))
    loss = f"training loss {line['train_loss']:.4f}"
    return f"round {line['round']}/{s['rounds']}: {loss}, {sent} so far"


def sent_bytes(line: dict[str, Any]) -> int:
    """Message bytes both ways, all nodes, up to a line of metrics.jsonl."""
    return int(line["bytes"]["message_up"] + line["bytes"]["message_down"])


def scores(line: dict[str, Any], s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What an evaluation measured: names and values, the loss first."""
    yield "loss", f"{line['test_loss']:.4f}"
    if line.get("perplexity") is not None:
        yield "perplexity", f"{line['perplexity']:.4g}"
    yield s["metric"], f"{line['metric']:.1%}"
    if line.get("rouge_l") is not None:
        yield "Rouge-L", f"{line['rouge_l']:.1%}"


# --- the live table --------------------------------------------------------------


def render(s: dict[str, Any], width: int) -> Group:
    """A status as a person reads it in a terminal of this width."""
    state = Text(sentence(s), style=STYLES.get(s["state"], ""))
    if s["state"] == "running" and (s["age_seconds"] or 0) > 10:
        state.append(f" (as of {s['age_seconds']:.0f} s ago)", style="yellow")
    parts: list[RenderableType] = [
        _heading(s),
        state,
        *(Text(text) for text in _results(s)),
        _nodes(s, width >= WIDE),
    ]
    return Group(*parts)


def _heading(s: dict[str, Any]) -> Table:
    done, total = s["round"], s["rounds"] or 1
    out = Table.grid(padding=(0, 1), expand=True)
    out.add_column(no_wrap=True, overflow="ellipsis")
    out.add_column(ratio=1)
    out.add_column(no_wrap=True)
    name = Text(s["name"], style="bold")
    out.add_row(name, ProgressBar(total=total, completed=done), Text(f"{done}/{total} rounds"))
    return out


def _results(s: dict[str, Any]) -> Iterator[str]:
    """How good the model is, and what it has cost."""
    if s["evaluations"]:
        first, last = s["evaluations"][0], s["evaluations"][-1]
        before = dict(scores(first, s))
        texts = [
            f"{name} {value}" + (f" (first {before[name]})" if name in before else "")
            for name, value in scores(last, s)
        ]
        yield f"after round {last['round']}: {', '.join(texts)}"
    if len(s["evaluations"]) > 2:
        yield f"{s['metric']} {_bars([line['metric'] for line in s['evaluations']])}"
    parts = []
    if s["commits"]:
        parts.append(f"training loss {s['commits'][-1]['train_loss']:.4f}")
    if s["bytes"]:
        up, down = (human_bytes(s["bytes"][f"message_{way}"]) for way in ("up", "down"))
        parts.append(f"{up} up, {down} down")
    parts += [f"{count} x {why}" for why, count in s["rejected"].items()]
    if parts:
        yield "; ".join(parts)


def _bars(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low or 1.0)
    return "".join(BARS[round((value - low) * scale)] for value in values[-NUM_BARS:])


def _nodes(s: dict[str, Any], is_wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["node", *(["host"] if is_wide else []), "clients", "doing", "memory", "up", "down"]
    for column in columns:
        right = column in ("memory", "up", "down")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for node in s["nodes"]:
        clients = "evaluator" if node.get("role") == "evaluate" else spans(node.get("clients", []))
        cells = [
            node["node"],
            *([node.get("host", "-")] if is_wide else []),
            clients,
            doing(node) if s["state"] == "running" else "-",
            memory(node),
            *(human_bytes(node_bytes(node, way)) if "bytes" in node else "-" for way in WAYS),
        ]
        table.add_row(*map(Text, cells))  # as text: what a node says is not markup
    return table


WAYS = ("up", "down")


def doing(node: dict[str, Any]) -> str:
    """What a node is busy with, and how far it is."""
    said, progress = str(node.get("doing", "-")), node.get("progress")
    return f"{said}, {100 * progress['done'] / progress['total']:.0f} %" if progress else said


def memory(node: dict[str, Any]) -> str:
    """A node's highest resident peak, as far as it said one."""
    peak = max(node.get("memory_bytes", {}).values(), default=0)
    return human_bytes(peak) if peak else "-"


def node_bytes(node: dict[str, Any], way: str, level: str = "message") -> int:
    """A node's bytes of one level and direction, all kinds together."""
    return sum(kind.get(way, 0) for kind in node["bytes"].get(level, {}).values())
