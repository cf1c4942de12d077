"""Sweeps: which runs they are, and that one which was cut short goes on."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import seedwire
from deploy import local
from deploy.sweep import Sweep, parse_over, run_sweep

A, B = Path("a.toml"), Path("b.toml")


def sweep(tmp_path: Path, *over: str, files: tuple[Path, ...] = (A,)) -> Sweep:
    return Sweep(files, parse_over(over), ("rounds.count=1",), 2, tmp_path / "sweep")


def test_every_file_runs_with_every_combination(tmp_path: Path) -> None:
    plans = sweep(tmp_path, "peft.rank=4,16", "run.seed=1,2", files=(A, B)).plans()
    assert [(p.experiment, *p.overrides[1:]) for p in plans] == [
        (file, f"peft.rank={rank}", f"run.seed={seed}")
        for file in (A, B)
        for rank in (4, 16)
        for seed in (1, 2)
    ]
    assert plans[0].directory == tmp_path / "sweep" / "a-rank=4-seed=1"
    assert len({p.directory for p in plans}) == len(plans)
    assert all(p.overrides[0] == "rounds.count=1" and p.nodes == 2 for p in plans)


def test_keys_that_end_alike_are_told_apart_in_the_names(tmp_path: Path) -> None:
    (plan,) = sweep(tmp_path, "method.local.lr=0.1", "method.server.lr=1.0").plans()
    assert plan.directory.name == "a-method.local.lr=0.1-method.server.lr=1.0"


@pytest.mark.parametrize(
    ("over", "files"),
    [((), (Path("x/a.toml"), Path("y/a.toml"))), (("model.id=x/y,x:y",), (A,))],
)
def test_two_runs_in_one_directory_are_refused_before_any_starts(
    tmp_path: Path, over: tuple[str, ...], files: tuple[Path, ...]
) -> None:
    """The second would be taken for done."""
    with pytest.raises(typer.BadParameter, match="2 runs would be in a"):
        sweep(tmp_path, *over, files=files).plans()


def test_a_sweep_over_nothing_is_its_files(tmp_path: Path) -> None:
    assert [p.directory.name for p in sweep(tmp_path, files=(A, B)).plans()] == ["a", "b"]


def test_values_may_be_lists(tmp_path: Path) -> None:
    assert parse_over(["method.densities=[0.1, 0.2],[0.3]"]) == {
        "method.densities": ("[0.1, 0.2]", "[0.3]")
    }


@pytest.mark.parametrize("text", ["peft.rank", "peft.rank=", "=4", "peft.rank=4,", "run.seed=1,1"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--over"):
        parse_over([text])


class Runs:
    """Stands for ``local.run`` and the report: what was started, and with which result."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.ran: list[str] = []
        self.reported: list[str] = []

    def run(self, plan: local.Plan, say: local.Say) -> int:
        del say
        self.ran.append(plan.directory.name)
        assert not (plan.directory / "summary.json").exists()  # a coordinator takes no used one
        if plan.directory.name == self.failing:
            return 8
        (plan.directory / "summary.json").write_text(json.dumps({}))
        return 0

    def report(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        del check
        self.reported = [Path(c).name for c in command[4 : command.index("--out")]]
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(local, "run", made.run)
    monkeypatch.setattr("deploy.sweep.subprocess.run", made.report)
    return made


def test_one_that_fails_stops_no_other_and_gives_the_exit_code(tmp_path: Path, runs: Runs) -> None:
    runs.failing = "a-seed=2"
    said: list[str] = []
    assert run_sweep(sweep(tmp_path, "run.seed=1,2,3"), said.append) == 8
    assert runs.ran == ["a-seed=1", "a-seed=2", "a-seed=3"]
    assert runs.reported == ["a-seed=1", "a-seed=3"]
    assert "[2/3] a-seed=2: ended with exit code 8; going on with the next" in said


def test_a_second_time_only_what_is_missing_runs_and_nothing_is_lost(
    tmp_path: Path, runs: Runs
) -> None:
    plan = sweep(tmp_path, "run.seed=1,2")
    runs.failing = "a-seed=2"
    assert run_sweep(plan, lambda text: None) == 8
    (plan.directory / "a-seed=2" / "log").write_text("kept")
    runs.ran, runs.failing = [], ""
    assert run_sweep(plan, lambda text: None) == 0
    assert runs.ran == ["a-seed=2"]
    assert runs.reported == ["a-seed=1", "a-seed=2"]
    assert (plan.directory / "a-seed=2.earlier-1" / "log").read_text() == "kept"


def test_results_of_another_file_or_other_settings_are_no_answer(
    tmp_path: Path, runs: Runs
) -> None:
    file = tmp_path / "a.toml"
    file.write_text("x = 1")
    plan = sweep(tmp_path, "run.seed=1", files=(file,))
    other = replace(plan, overrides=("rounds.count=2",))
    for asked, expected in ((plan, 1), (plan, 1), (other, 2), (other, 2), (plan, 3)):
        assert run_sweep(asked, lambda text: None) == 0
        assert len(runs.ran) == expected
    file.write_text("x = 2")
    assert run_sweep(plan, lambda text: None) == 0
    assert len(runs.ran) == 4
    kept = sorted(p.name for p in plan.directory.glob("*earlier*"))
    assert kept == [f"a-seed=1.earlier-{i}" for i in (1, 2, 3)]


def test_the_command_says_what_is_wrong_with_its_options() -> None:
    told = CliRunner().invoke(seedwire.app, ["sweep", "a.toml", "--over", "x"])
    assert told.exit_code == 2
    assert "KEY=VALUE,VALUE" in told.output
