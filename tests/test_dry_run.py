"""``seedwire node --dry-run``: what it finds, in real processes and at a real port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import enrolled
from protocol import keys
from tests.centre import Centre, centre

__all__ = ["centre"]  # the fixture

ROOT = Path(__file__).parent.parent
MOST_BYTES = 60_000_000  # of memory that a node takes before torch
NOWHERE = "tcp://127.0.0.1:1"

pytestmark = pytest.mark.net


def dry_run(*options: str, environment: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a process of its own."""
    command = [sys.executable, "-m", "seedwire", "node", "--dry-run", "--format", "json", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    assert report["is_ready"] == (done.returncode == 0) == (not report["problems"])
    return done.returncode, report


@pytest.fixture
def unvisited(centre: Centre) -> Iterator[Centre]:
    yield centre
    centre.close()
    assert centre.arrivals == [], "a dry run logs in nowhere"


def test_a_node_takes_at_most_60_mb_before_torch_and_says_so(
    unvisited: Centre, tmp_path: Path
) -> None:
    token = unvisited.token()
    store = tmp_path / "board"
    pair = keys.make(store, "board")
    keys.pin(store, token.coordinator)
    enrolled.change(unvisited.store, lambda e: e.enroll("board", pair.public))
    at = ("--coordinator", unvisited.endpoint, "--name", "board", "--clients", "0-3")
    rest = ("--keys", str(store), "--max-memory", "1GB", "--state", str(tmp_path / "state"))
    code, report = dry_run(*at, *rest, "--energy", "echo 7")
    assert (code, report["problems"]) == (0, [])
    assert report["admitted"] is True
    assert report["energy"] == "command"
    assert (report["clients"], report["limits"]["memory"]) == ([0, 1, 2, 3], 10**9)
    assert report["torch"]  # found, and not loaded:
    assert 10_000_000 < report["resident"] <= report["resident_peak"] <= MOST_BYTES
    assert not (tmp_path / "state").exists()


def test_a_dry_run_loads_neither_torch_nor_the_compiled_kernels() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import seedwire\n"
        f"line = ['node', '--dry-run', '--insecure', '--coordinator', '{NOWHERE}']\n"
        "done = CliRunner().invoke(seedwire.app, [*line, '--clients', '0'])\n"
        "assert done.exit_code == 6 and 'resident' in done.stdout, done.output\n"
        "heavy = {'torch', 'transformers', 'peft', 'numba', 'pyarrow', 'datasets'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_each_fault_is_named_and_the_first_one_gives_the_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    at = ("--coordinator", NOWHERE, "--name", "board", "--clients", "0")
    code, report = dry_run(
        *at, "--keys", str(tmp_path), "--energy", "echo no", "--state", str(tmp_path / "file" / "s")
    )
    assert code == 3
    energy, state, key = report["problems"]
    assert "--energy echo no: it prints no number" in energy
    assert "cannot keep state" in state
    assert "no key of board" in key
    assert report["admitted"] is None
    assert report["resident"]


def test_a_key_that_is_not_enrolled_is_a_refusal_and_with_a_token_is_not(
    unvisited: Centre, tmp_path: Path
) -> None:
    token = unvisited.token()
    store = tmp_path / "board"
    keys.make(store, "board")
    keys.pin(store, token.coordinator)
    at = ("--coordinator", unvisited.endpoint, "--name", "board", "--clients", "0")
    code, report = dry_run(*at, "--keys", str(store))
    assert code == 7
    assert "is not enrolled there yet" in report["problems"][0]
    code, report = dry_run(*at, "--keys", str(store), environment={"SEEDWIRE_TOKEN": token.text})
    assert (code, report["admitted"]) == (0, None)
    assert enrolled.read(unvisited.store).nodes == {}  # it is still good


def test_nobody_at_the_port_is_the_networks_code() -> None:
    at = ("--coordinator", NOWHERE, "--clients", "0", "--insecure")
    code, report = dry_run(*at)
    assert code == 6
    assert "no coordinator answers" in report["problems"][0]


def test_the_report_for_people_names_what_is_not_known() -> None:
    from node.dry_run import Report, describe

    report = Report(
        node="pi-1",
        coordinator=NOWHERE,
        clients=[0],
        limits=None,
        python="3.11.7",
        system="Linux 6.1",
        architecture="aarch64",
        seedwire="0.1.0",
        torch=None,
        numba=None,
        resident=41_500_000,
        problems=["torch is not installed here"],
        is_ready=False,
    )
    lines = describe(report).splitlines()
    assert lines[:2] == ["not ready: node pi-1", "problem: torch is not installed here"]
    assert "resident       41.5 MB" in lines
    assert "energy         unknown" in lines
