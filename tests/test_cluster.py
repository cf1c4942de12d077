"""``seedwire cluster`` over a real sshd: two hosts that are this machine, in two directories."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.sshd import inventory, sshd
from tests.test_run import written

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(400)]

PATIENCE_SECONDS = 300.0
UNREACHABLE = 13


class Site:
    """A place with an sshd, an inventory and an experiment, and the commands run in it."""

    def __init__(self, place: Path, config: Path) -> None:
        self.place, self.config = place, config
        self.keys = place / "keys"
        written(place)

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
    file = inventory(site.place, site.config, "a", "b")
    file.write_text(file.read_text() + 'labels = { board = "pi 4" }\n')  # of the last
    done = site.cluster("run", "tiny.toml", "--directory", "out")
    labels = json.loads((site.place / "out" / "labels.json").read_text())
    assert labels == {"b": {"board": "pi 4"}}
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


def test_ctrl_c_leaves_nothing_running_and_brings_home_what_there_is(site: Site) -> None:
    """The coordinator is on a host, too."""
    inventory(site.place, site.config, "a", "b", coordinator="a")
    words = ["run", "tiny.toml", "--directory", "out", "--set", "rounds.count=100000"]
    with (site.place / "said").open("w") as said:
        process = subprocess.Popen(
            site.command("cluster", *words), **site.surroundings, stdout=said, stderr=said
        )
    try:
        metrics = site.place / "a" / "runs" / "out" / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None, (site.place / "said").read_text()
            assert time.monotonic() < deadline, (site.place / "said").read_text()
            time.sleep(0.2)  # a poll of another process
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 130
    finally:
        process.kill()
        process.wait()
    assert not site.processes()
    assert (site.place / "out" / "metrics.jsonl").read_text()
    for name in "ab":
        assert "logged in to run" in (site.place / "out" / "logs" / f"{name}.log").read_text()


def test_one_host_that_is_not_reached_hides_no_other(site: Site) -> None:
    file = inventory(site.place, site.config, "a", "b")
    file.write_text(file.read_text().replace('address = "b"', 'address = "b"\nport = 1'))
    done = site.cluster("check", "--format", "json", rc=UNREACHABLE)
    a, b = json.loads(done.stdout)
    assert a["facts"]["port"] == ""
    assert abs(a["offset"]) <= a["uncertainty"]
    assert b["facts"] is None
    assert "Connection refused" in b["findings"][0]["what"]
    rows = json.loads(site.cluster("status", "--format", "json", rc=UNREACHABLE).stdout)
    assert [(row["host"], row["state"]) for row in rows] == [("a", "absent"), ("b", "unreachable")]
    done = site.cluster("down", rc=UNREACHABLE)
    assert "a: nothing ran" in done.stderr
    assert "seedwire: b: " in done.stderr


def test_a_node_without_a_coordinator_is_told_and_ended(site: Site) -> None:
    inventory(site.place, site.config, "a")
    done = site.cluster("up", "--clients", "2", "--within", "8", rc=UNREACHABLE)
    assert "a: runs, but has not logged in within 8 s" in done.stderr
    rows = site.statuses()
    assert rows["a"]["state"] == "running"
    assert rows["a"]["memory"] > 0
    assert "a: stopped" in site.cluster("down").stderr
    assert "a: nothing ran" in site.cluster("down").stderr
    assert not site.processes()


def test_a_file_that_is_wrong_is_one_line(site: Site) -> None:
    done = site.cluster("status", rc=12)
    assert done.stderr == "seedwire: cluster.toml: No such file or directory\n"
