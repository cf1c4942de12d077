"""What a person meets at the command line: exit codes, and errors in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import seedwire
from node.options import checked_name, parse_clients

pytestmark = pytest.mark.usefixtures("signal_handlers")

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner()
TABLE = """
[run]
name = "test"
[model]
id = "random:bert-tiny"
[data]
id = "x.csv"
[method]
name = "fedavg"
[rounds]
count = 1
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "e.toml"
    path.write_text(TABLE)
    return path


def fails(*arguments: object) -> tuple[int, str]:
    """Exit code, and what it says on standard error."""
    result = RUNNER.invoke(seedwire.app, [str(a) for a in arguments])
    assert result.exit_code
    return result.exit_code, result.stderr


def one_line(said: str) -> str:
    (line,) = said.splitlines()
    assert line.startswith("seedwire: ")
    return line


# --- clients and names -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clients"),
    [
        ("", ()),
        ("3", (3,)),
        ("0-3", (0, 1, 2, 3)),
        ("0,2,5-7", (0, 2, 5, 6, 7)),
        ("7, 2 ,2", (2, 7)),
        ("5-5", (5,)),
        ("1,", (1,)),
    ],
)
def test_clients_are_numbers_and_spans(text: str, clients: tuple[int, ...]) -> None:
    assert parse_clients(text) == clients


@pytest.mark.parametrize(
    "text", ["a", "-1", "1-", "1--2", "3-1", "0,5-3", "1-2-3", "1.5", "²", "0-99999999", "1;2"]
)
def test_other_clients_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="want numbers as in 3 or 0-3 or 0,2,5-7"):
        parse_clients(text)


def test_a_name_that_the_coordinator_would_drop_is_refused_here() -> None:
    assert checked_name("pi-4.local_2") == "pi-4.local_2"
    for bad in ("", "my node", "-x", "x" * 64, "ä", "x\n"):
        with pytest.raises(typer.BadParameter, match="--name"):
            checked_name(bad)


def test_a_node_says_what_it_lacks() -> None:
    code, said = fails("node", "--coordinator", "tcp://127.0.0.1:1")
    assert code == 2
    assert "which clients this node hosts" in " ".join(said.replace("│", " ").split())
    code, said = fails("node", "--coordinator", "tcp://127.0.0.1:1", "--clients", "x")
    assert code == 2
    assert "--clients x: want numbers" in said


# --- experiments -----------------------------------------------------------------


def test_a_typo_is_named_with_its_path(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(TABLE.replace("count = 1", "counts = 1"))
    code, said = fails("coordinator", "--experiment", experiment, "--runs", tmp_path / "runs")
    assert code == 3
    assert str(experiment) in one_line(said)
    assert "$.rounds" in said
    assert not (tmp_path / "runs").exists()


def test_a_typo_in_the_method_is_found_before_anything_starts(
    experiment: Path, tmp_path: Path
) -> None:
    experiment.write_text(TABLE.replace('"fedavg"', '"fedavgg"'))
    code, said = fails("coordinator", "--experiment", experiment, "--runs", tmp_path / "runs")
    assert code == 3
    assert "[method]" in one_line(said)


@pytest.mark.parametrize(
    ("override", "why"),
    [("rounds", "want section.key=value"), ("run.nmae=x", "nmae"), ("rounds.count=0", "count")],
)
def test_a_bad_override_is_named(experiment: Path, tmp_path: Path, override: str, why: str) -> None:
    runs = tmp_path / "runs"
    code, said = fails("coordinator", "--experiment", experiment, "--runs", runs, "--set", override)
    assert code == 3
    assert why in one_line(said)


def test_a_missing_experiment_is_an_error_of_one_line(tmp_path: Path) -> None:
    code, said = fails("coordinator", "--experiment", tmp_path / "none.toml")
    assert (code, one_line(said)) == (
        3,
        f"seedwire: {tmp_path / 'none.toml'}: No such file or directory",
    )


def test_a_directory_that_cannot_be_made_is_an_error_of_one_line(
    experiment: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--directory", "--runs"):
        place = tmp_path / "file" / "below"
        code, said = fails("coordinator", "--experiment", experiment, option, place)
        assert code == 3
        assert str(place) in one_line(said)


@pytest.mark.net
def test_a_port_in_use_is_an_error_of_one_line(experiment: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, said = fails(
            "coordinator", "--experiment", experiment, "--directory", tmp_path, "--bind", where
        )
    assert code == 6
    assert where in one_line(said)
    assert "port in use" in said
    assert not (tmp_path / "coordinator.json").exists()


def test_an_address_that_is_none_is_an_error_of_one_line(experiment: Path, tmp_path: Path) -> None:
    code, said = fails(
        "coordinator", "--experiment", experiment, "--directory", tmp_path, "--bind", "here"
    )
    assert code == 6
    assert "cannot listen on here" in one_line(said)


def test_a_node_with_an_address_that_is_none_ends_with_the_networks_code() -> None:
    code, said = fails("node", "--coordinator", "nowhere", "--clients", "0", "--insecure")
    assert code == 6
    assert "bad address nowhere" in one_line(said)


def test_a_report_on_what_is_no_run_is_an_error_of_one_line(tmp_path: Path) -> None:
    code, said = fails("report", tmp_path)
    assert code == 3
    assert "is not a finished run" in one_line(said)


# --- processes -------------------------------------------------------------------


def seedwire_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "seedwire", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_shell_sees_the_code_and_no_traceback(tmp_path: Path) -> None:
    done = seedwire_process("coordinator", "--experiment", "none.toml", cwd=tmp_path)
    assert done.returncode == 3
    assert one_line(done.stderr) == "seedwire: none.toml: No such file or directory"


def test_run_passes_on_what_the_coordinator_ended_with(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(TABLE.replace("count", "counts"))
    done = seedwire_process("run", "e.toml", cwd=tmp_path)
    assert done.returncode == 3
    assert "$.rounds" in one_line(done.stderr)


def test_an_announcement_of_an_earlier_run_is_not_believed(tmp_path: Path) -> None:
    """--directory may hold what an earlier coordinator said; ours has not spoken yet."""
    (tmp_path / "e.toml").write_text(TABLE.replace("count", "counts"))
    old = tmp_path / "old"
    old.mkdir()
    announced = '{"endpoint": "tcp://127.0.0.1:1", "pid": 1, "run": "old", "clients": 1}'
    (old / "coordinator.json").write_text(announced)
    done = seedwire_process("run", "e.toml", "--directory", "old", cwd=tmp_path)
    assert done.returncode == 3
    assert not (old / "pids.json").exists()  # no node was started


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "give either --experiment or --resume"),
        (["--experiment", "e.toml", "--resume", "run"], "give either --experiment or --resume"),
        (["--resume", "run", "--set", "run.seed=1"], "takes the run as it is"),
        (["--resume", "run", "--directory", "other"], "takes the run as it is"),
    ],
)
def test_a_run_is_begun_or_resumed_and_not_both(options: list[str], why: str) -> None:
    result = RUNNER.invoke(seedwire.app, ["coordinator", *options])
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("│", " ").split())


def test_help_names_every_command_without_loading_torch() -> None:
    result = RUNNER.invoke(seedwire.app, ["--help"])
    assert result.exit_code == 0
    for command in ("run", "demo", "coordinator", "node", "report", "fetch"):
        assert command in result.stdout
    code = "import sys, seedwire; sys.exit(any(m in sys.modules for m in ('torch', 'zmq')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_version_is_a_line() -> None:
    result = RUNNER.invoke(seedwire.app, ["--version"])
    assert result.stdout.startswith("seedwire ")
