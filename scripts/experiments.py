"""Run the miniatures of experiments again, and write the tables of their READMEs.

    python scripts/experiments.py experiments/decomfl experiments/ferret
    python scripts/experiments.py --table experiments/decomfl    # from its results.json alone

A miniature is a TOML file of the folder; ``paper.toml`` is of the paper's size and not run.
A run takes the place of the one with its name and seed in ``results.json``; others stay.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"
SAVING = re.compile(r"(<!-- saving than (\S+): begin -->\n).*?(<!-- saving: end -->)", re.DOTALL)
WITHIN = 0.01  # what is worse by a point of per cent is as good: the test sets are of hundreds
PAPER = "paper.toml"


def seedwire(*arguments: object) -> str:
    """What the command prints; it must succeed."""
    line = [sys.executable, "-m", "seedwire", *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(folder: Path, seed: int, runs: Path) -> list[Path]:
    """Every miniature of a folder, one after another."""
    made = []
    for file in sorted(folder.glob("*.toml")):
        if file.name != PAPER:
            directory = runs / f"{folder.name}-{file.stem}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
            print(f"{file}, seed {seed}: {directory}", flush=True)
            seedwire("run", file, "--directory", directory, "--set", f"run.seed={seed}")
            made.append(directory)
    return made


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old entries, but new ones in place of those with the same name and seed."""
    table = {(e["run"], e["seed"]): e for e in [*old, *new]}
    return [table[key] for key in sorted(table)]


def collect(folder: Path, made: list[Path], out: Path) -> None:
    """Put runs into the folder's results."""
    seedwire("report", *made, "--out", out, "--format", "json")
    path = folder / "results.json"
    old = json.loads(path.read_text()) if path.exists() else []
    entries = merged(old, json.loads((out / "comparison.json").read_text()))
    path.write_text(json.dumps(entries, indent=1) + "\n")


def write_table(folder: Path, out: Path) -> None:
    """Put the tables that ``seedwire`` makes of the results into the README."""
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme} has no place for a table: {BEGIN.strip()} and {END}")
    results = folder / "results.json"
    table = seedwire("report", results, "--out", out, "--format", "markdown")
    text = f"{before}{BEGIN}\n{table}\n{END}{after}"

    def compared(place: re.Match[str]) -> str:
        rest = ("--than", place[2], "--within", WITHIN, "--format", "markdown")
        return f"{place[1]}\n{seedwire('saving', results, *rest)}\n{place[3]}"

    readme.write_text(SAVING.sub(compared, text))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="run nothing, only write the tables")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        out = arguments.runs / f"report-{folder.name}"
        if not arguments.table:
            collect(folder, run(folder, arguments.seed, arguments.runs), out)
        write_table(folder, out)


if __name__ == "__main__":
    main()
