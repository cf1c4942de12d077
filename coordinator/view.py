"""What a person sees while a run goes on: a live table, or plain lines in a file or a pipe."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coordinator import rounds
from coordinator.record import RunRecorder
from coordinator.rounds import Evaluating, Gathering, Training
from coordinator.server import Server

WIDE = 100  # columns from which on a node's host is shown too


def human_bytes(count: float) -> str:
    """1234567 as "1.23 MB"; decimal units, as networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class View:
    """Shows a server's state; decides nothing."""

    def __init__(self, console: Console, server: Server, recorder: RunRecorder) -> None:
        self._console, self._server, self._recorder = console, server, recorder
        self._lines_shown = self._scores_shown = 0
        self._last_status = ""
        self._live: Live | None = None
        policy = server.settings.policy
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bar = self._progress.add_task(server.settings.run_id, total=policy.rounds)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.__exit__(*exc)

    def update(self) -> None:
        """Show what has changed; cheap enough for every turn of the loop."""
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._print_news()

    def _print_news(self) -> None:
        r = self._recorder
        status = self.status(with_time=False)
        if isinstance(self._server.state.phase, Gathering) and status != self._last_status:
            self._last_status = status
            self._say(status)
        for number in range(self._lines_shown, len(r.losses)):
            total = sum(count for level, count in r.bytes().items() if level.startswith("message"))
            self._say(
                f"round {number + 1}/{self._server.settings.policy.rounds}: "
                f"training loss {r.losses[number]:.4f}, {human_bytes(total)} so far"
            )
        for number, score in r.scores[self._scores_shown :]:
            texts = [f"{name} {text}" for name, text in r.quality.texts(score)]
            self._say(f"after round {number}: {', '.join(texts)}")
        self._lines_shown, self._scores_shown = len(r.losses), len(r.scores)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._console.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)

    def status(self, with_time: bool = True) -> str:
        """One line: what the run waits for, and for how long."""
        state, policy = self._server.state, self._server.settings.policy
        now = self._server.now()
        match state.phase:
            case Training(opened_at=opened, closes_at=closes) as phase:
                waiting = rounds.waited_for(state, phase, policy, now)
                names = ", ".join(self._client(c) for c in sorted(waiting)[:6])
                more = f" and {len(waiting) - 6} more" if len(waiting) > 6 else ""
                spent = f" for {now - opened:.0f} s of {closes - opened:.0f}" if with_time else ""
                return f"round {state.round + 1}: waiting{spent} for {names}{more}"
            case Evaluating():
                return f"evaluating after round {state.round}"
            case Gathering():
                return self._missing(state, policy)
            case _:
                return type(state.phase).__name__.lower()

    def _missing(self, state: rounds.State, policy: rounds.Policy) -> str:
        absent = sorted(set(range(policy.clients)) - state.hosted)
        loading = [m.name for m in self._server.desk.roster if m.trains and m.version is None]
        if not state.evaluator:
            return "waiting for the evaluation worker to load model and data"
        if loading:
            return f"waiting for {', '.join(sorted(loading))} to load model and data"
        if absent:
            return f"waiting for nodes that host clients {', '.join(map(str, absent[:12]))}"
        return "between rounds"

    def _client(self, client: int) -> str:
        host = self._server.desk.roster.host_of(client)
        return f"client {client} ({host.name if host else 'node lost'})"

    def _render(self) -> Group:
        r, state = self._recorder, self._server.state
        self._progress.update(self._bar, completed=state.round)
        return Group(self._progress, Text(self.status()), self._results(r), self._nodes(r))

    def _results(self, r: RunRecorder) -> Text:
        parts = []
        if r.losses:
            parts.append(f"training loss {r.losses[-1]:.4f}")
        if r.scores:
            number, score = r.scores[-1]
            first = dict(r.quality.texts(r.scores[0][1]))
            texts = [
                f"{name} {text}" + (f" (first {first[name]})" if name in first else "")
                for name, text in r.quality.texts(score)
            ]
            parts.append(f"test {', '.join(texts)} after round {number}")
        total = r.bytes()
        up, down = human_bytes(total["message_up"]), human_bytes(total["message_down"])
        parts.append(f"{up} up, {down} down")
        if r.num_rejected:
            parts.append(", ".join(f"{n} x {why}" for why, n in r.num_rejected.items()))
        return Text("; ".join(parts))

    def _nodes(self, r: RunRecorder) -> Table:
        wide = self._console.width >= WIDE
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = ["node", *(["host"] if wide else []), "clients", "doing", "memory", "up", "down"]
        for column in columns:
            right = column in ("memory", "up", "down")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        for member in sorted(self._server.desk.roster, key=lambda m: m.name):
            peak = max(member.peaks.values(), default=0)
            sums = {
                way: sum(
                    count
                    for key, count in r.meter.message.items()
                    if key.node == member.name and key.way == way
                )
                for way in ("up", "down")
            }
            clients = _spans(member.hello.clients) if member.trains else "evaluator"
            cells = [
                member.name,
                *([member.hello.host] if wide else []),
                clients,
                member.busy or "waiting",
                human_bytes(peak) if peak else "-",
                human_bytes(sums["up"]),
                human_bytes(sums["down"]),
            ]
            table.add_row(*map(Text, cells))  # as text: what a node says is not markup
        return table


def _spans(clients: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as "0-2,5"."""
    spans: list[list[int]] = []
    for client in sorted(clients):
        if spans and client == spans[-1][1] + 1:
            spans[-1][1] = client
        else:
            spans.append([client, client])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
