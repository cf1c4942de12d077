"""A sweep: every file with every combination of values, one run after another, then the report.

A combination's directory is named after it, and says what it was made from; so a sweep that was cut
short goes on where it was, and nothing of another question is taken for an answer.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from deploy import local
from deploy.local import Say

_COMMA = re.compile(r",(?![^\[{]*[\]}])")  # none of a TOML list or table


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        over: for each key, the values that it takes.
        overrides: for all runs.
        directory: of all runs, and of the report.
    """

    files: tuple[Path, ...]
    over: dict[str, tuple[str, ...]]
    overrides: tuple[str, ...]
    nodes: int
    directory: Path

    def plans(self) -> list[local.Plan]:
        """A plan for each combination; the last key changes fastest.

        Raises:
            typer.BadParameter: two of them would have one directory.
        """
        plans = list(self._plans())
        for name, count in Counter(plan.directory.name for plan in plans).items():
            if count > 1:
                raise typer.BadParameter(
                    f"{count} runs would be in {name}: rename a file, or give the values apart"
                )
        return plans

    def _plans(self) -> Iterator[local.Plan]:
        for file in self.files:
            for values in itertools.product(*self.over.values()):
                chosen = [f"{key}={value}" for key, value in zip(self.over, values, strict=True)]
                short = [c.rpartition(".")[2] if _is_unlike(c, self.over) else c for c in chosen]
                name = re.sub(r"[^\w=.,+-]+", "_", "-".join([file.stem, *short]))
                overrides = (*self.overrides, *chosen)
                yield local.Plan(file, self.nodes, self.directory / name, overrides)


def _is_unlike(choice: str, over: dict[str, tuple[str, ...]]) -> bool:
    """Whether the key's last part is enough to tell it from the others."""
    last = choice.partition("=")[0].rpartition(".")[2]
    return sum(key.rpartition(".")[2] == last for key in over) == 1


def parse_over(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse "peft.rank=4,16" into {"peft.rank": ("4", "16")}."""
    table: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        values = tuple(value.strip() for value in _COMMA.split(rest))
        if not (key and equals and all(values)):
            raise typer.BadParameter(f"--over {text}: want KEY=VALUE,VALUE as in peft.rank=4,16")
        if key in table or len(set(values)) < len(values):
            raise typer.BadParameter(f"--over {text}: it is there twice")
        table[key] = values
    return table


def run_sweep(sweep: Sweep, say: Say) -> int:
    """Run what has not been run, and compare all; returns the first code that was not 0."""
    plans, codes = sweep.plans(), []
    for number, plan in enumerate(plans, 1):
        where = f"[{number}/{len(plans)}] {plan.directory.name}"
        asked = _asked(plan)
        if (plan.directory / "summary.json").exists() and _note(plan).exists():
            if _note(plan).read_text() == asked:
                say(f"{where}: done before")
                continue
            say(f"{where}: what was done before is of another file or other settings")
        _put_aside(plan.directory)
        say(where)
        plan.directory.mkdir(parents=True)
        _note(plan).write_text(asked)
        codes.append(local.run(plan, say))
        if codes[-1]:
            say(f"{where}: ended with exit code {codes[-1]}; going on with the next")
    done = [str(p.directory) for p in plans if (p.directory / "summary.json").exists()]
    if done:
        report = ["report", *done, "--out", str(sweep.directory / "report")]
        command = [sys.executable, "-m", "seedwire", *report]
        codes.append(subprocess.run(command, check=False).returncode)  # noqa: S603
    return next(filter(None, codes), 0)


def _note(plan: local.Plan) -> Path:
    """Where it says what a run of the sweep was made from."""
    return plan.directory / "sweep.json"


def _asked(plan: local.Plan) -> str:
    """What a run is made from; where it differs, an earlier result is of another question."""
    try:
        text = plan.experiment.read_text()
    except OSError:
        text = ""  # the coordinator says so
    return json.dumps({"experiment": text, "set": plan.overrides, "nodes": plan.nodes}, indent=1)


def _put_aside(directory: Path) -> None:
    """Make room for a run where another was cut short, or is of another file; that one is kept."""
    if directory.exists():
        names = (f"{directory.name}.earlier-{number}" for number in itertools.count(1))
        directory.rename(next(p for p in map(directory.with_name, names) if not p.exists()))
