"""``seedwire cluster`` over a real sshd: two hosts that are this machine, in two directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.sshd import inventory, sshd
from tests.test_run import EXPERIMENT

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(400)]

PATIENCE_SECONDS = 300.0
UNREACHABLE = 13


class Site:
    """A place with an sshd, an inventory and an experiment, and the commands run in it."""

    def __init__(self, place: Path, config: Path) -> None:
        self.place, self.config = place, config
        self.keys = place / "keys"
        rows = [f"it was {'fine' if i % 2 else 'poor'} number {i},{i % 2}" for i in range(64)]
        (place / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        (place / "tiny.toml").write_text(EXPERIMENT.format(data=place / "data.csv"))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "seedwire", *words]

    def cluster(self, verb: str, *words: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command("cluster", verb, *words),
            **self.surroundings,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == rc, done.stdout + done.stderr
        return done

    @property
    def surroundings(self) -> dict[str, Any]:
        env = os.environ | {"SEEDWIRE_KEYS": str(self.keys), "COLUMNS": "200"}
        return {"cwd": self.place, "env": env, "text": True}

    def statuses(self) -> dict[str, dict[str, Any]]:
        rows = json.loads(self.cluster("status", "--format", "json").stdout)
        return {row["host"]: row for row in rows}

    def processes(self) -> list[psutil.Process]:
        """Nodes and coordinators of this place that run, whoever started them."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if {"node", "coordinator"} & set(process.info["cmdline"] or ())
            and any(str(self.place) in word for word in process.info["cmdline"])
        ]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with sshd(tmp_path / "sshd") as config:
        made = Site(tmp_path, config)
        yield made
        left = made.processes()
        for process in left:
            process.kill()
        assert not left


def test_an_experiment_runs_on_two_hosts_and_its_results_come_home(site: Site) -> None:
    inventory(site.place, site.config, "a", "b")
    done = site.cluster("run", "tiny.toml", "--directory", "out")
    summary = json.loads((site.place / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", 2)
    nodes = json.loads((site.place / "out" / "nodes.json").read_text())
    assert {name: nodes[name]["clients"] for name in "ab"} == {"a": [0, 1], "b": [2, 3]}
    for name in "ab":
        assert "logged in to run" in (site.place / "out" / "logs" / f"{name}.log").read_text()
        key = site.place / name / "keys" / f"{name}.key"  # made there, and nowhere else
        assert key.exists()
        assert list(site.place.rglob(key.name)) == [key]
        assert not list((site.place / name / "run").iterdir())
    assert not site.processes()
    assert "a: logged in, clients 0-1" in done.stderr
