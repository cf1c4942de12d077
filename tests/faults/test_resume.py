"""``seedwire coordinator --resume`` by hand: after a full disk, after the end, beside another."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import mounted
from tests.fakes import run as command
from tests.faults.cluster import CHUNKED, PATIENCE_SECONDS, POLL_SECONDS, Cluster, Plan

pytestmark = [pytest.mark.net, pytest.mark.slow]


def resume(directory: Path) -> tuple[int, str]:
    """Exit code of another coordinator on a run directory, and all that it says."""
    line = [sys.executable, "-m", "seedwire", "coordinator", "--no-evaluator", "--insecure"]
    line += ["--resume", str(directory), "--bind", "tcp://127.0.0.1:*"]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_disk_that_is_full_stops_the_run_with_one_line_and_it_goes_on_when_there_is_room(
    tmp_path: Path, undisturbed: Callable[[str, int], str]
) -> None:
    with Cluster(Plan("dense", CHUNKED), tmp_path / "it") as cluster:
        directory = tmp_path / "it" / "run"
        with mounted(directory, 3 << 20):
            for who in ("coordinator", "evaluator", "node-0", "node-1", "node-2"):
                cluster.start(who)
            assert cluster.exit_code("coordinator") == 9
            log = (tmp_path / "it" / "logs" / "coordinator.log").read_text()
            (told,) = (line for line in log.splitlines() if line.startswith("seedwire:"))
            assert "full" in told or "No space left" in told
            assert "Traceback" not in log
            command("mount", "-o", f"remount,size={64 << 20}", directory)
            cluster.start("coordinator")
            cluster.follow(lambda: cluster.processes["coordinator"].exitcode == 0)
            assert all(cluster.exit_code(who) == 0 for who in ("node-0", "node-1", "node-2"))
            summary = (directory / "summary.json").read_text()
    assert f'"digest": "{undisturbed("dense", CHUNKED)}"' in summary
    assert '"resumed": 1' in summary


def test_one_coordinator_at_a_time_has_a_run_and_none_after_its_end(tmp_path: Path) -> None:
    with Cluster(Plan(), tmp_path / "it") as cluster:
        directory = tmp_path / "it" / "run"
        cluster.start("coordinator")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (directory / "coordinator.json").exists():
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(POLL_SECONDS)  # a poll of another process, not a guess at its speed
        code, said = resume(directory)
        assert (code, said) == (9, f"seedwire: another coordinator is running {directory}\n")
        for who in ("evaluator", "node-0", "node-1", "node-2"):
            cluster.start(who)
        assert cluster.exit_code("coordinator") == 0
    assert resume(directory) == (0, "run: completed, nothing to resume\n")
    before = (directory / "journal.sqlite").read_bytes()
    (directory / "journal.sqlite").write_bytes(before[:4096] + b"\xff" * 64 + before[4160:])
    code, said = resume(directory)
    assert code == 9
    assert said.startswith(f"seedwire: {directory}/journal.sqlite: damaged")
    assert len(said.splitlines()) == 1


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    assert resume(tmp_path) == (
        9,
        f"seedwire: {tmp_path} holds no run to resume: it has no journal.sqlite\n",
    )
