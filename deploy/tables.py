"""What the commands of a cluster show, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from deploy.check import Report
from deploy.nodes import Status

BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def size(nbytes: float | None) -> str:
    """Bytes for a person; "" where they are not known."""
    if nbytes is None:
        return ""
    for unit, name in BYTES:
        if nbytes >= 0.9995 * unit:  # three digits are up to 999
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B"


def time(seconds: float) -> str:
    """A time for a person."""
    for unit, name in TIMES:
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def checks(reports: Sequence[Report], console: Console) -> None:
    """A line per host, and below what is to be done."""
    table = Table(box=None, pad_edge=False)
    for head in ("host", "Python", "torch", "CPU", "memory", "disk free", "clock", "slowed"):
        table.add_column(head)
    table.add_column("port")
    table.add_column("Seedwire")
    for report in reports:
        table.add_row(report.host, *_cells(report))
    console.print(table)
    for report in reports:
        for finding in report.findings:
            mend = f": {finding.mend}" if finding.mend else ""
            line = f"{report.host}: {finding.what}{mend}"
            style = "red" if finding.level == "fail" else "yellow"
            console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def _cells(report: Report) -> list[str]:
    facts = report.facts
    if facts is None:
        return ["[red]not reached[/]"]
    software, venv = facts.software, facts.venv
    cuda = f" (CUDA {software.cuda})" if software and software.cuda else ""
    return [
        software.python if software else "[red]none[/]",
        f"{(software and software.torch) or 'none'}{cuda}",
        f"{facts.cores} x {facts.machine}",
        size(facts.memory),
        size(facts.disk),
        f"{report.offset:+.2f} ± {report.uncertainty:.2f} s",
        {None: "not said", "": "no"}.get(facts.throttled, "[yellow]yes[/]"),
        "reached" if facts.port == "" else f"[red]{facts.port}[/]",
        (venv and venv.seedwire) or "none",
    ]


def checks_json(reports: Sequence[Report]) -> str:
    """One object per host."""
    return msgspec.json.encode(reports).decode()


def statuses(found: Mapping[str, Status], failed: Mapping[str, Exception], out: Console) -> None:
    """A line per host."""
    table = Table(box=None, pad_edge=False)
    for head in ("host", "node", "pid", "since", "memory"):
        table.add_column(head)
    table.add_column("last line of its log", no_wrap=True, overflow="ellipsis")
    for name, status in found.items():
        state = status.state if status.code is None else f"{status.state} ({status.code})"
        since = time(status.seconds) if status.is_running else ""
        pid = str(status.pid or "")
        table.add_row(name, state, pid, since, size(status.memory), status.line)
    for name, error in failed.items():
        table.add_row(name, "[red]not reached[/]", "", "", "", str(error))
    out.print(table)


def statuses_json(found: Mapping[str, Status], failed: Mapping[str, Exception]) -> str:
    """One object per host."""
    keys = ("state", "code", "pid", "seconds", "memory", "line")
    rows = [{"host": n, **{key: getattr(s, key) for key in keys}} for n, s in found.items()]
    rows += [{"host": name, "state": "unreachable", "line": str(e)} for name, e in failed.items()]
    return msgspec.json.encode(rows).decode()
