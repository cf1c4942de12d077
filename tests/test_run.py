"""Whole runs: real processes on loopback, a tiny model, real faults."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from coordinator.place import secret_of
from fedalgos.privacy import SECRET_BYTES

pytestmark = [pytest.mark.net, pytest.mark.slow]

PATIENCE_SECONDS = 90.0
EXPERIMENT = """
[run]
name = "tiny"
seed = 3
[model]
id = "random:llama-tiny"
[peft]
rank = 2
[data]
id = "{data}"
task = "prompt"
template = "{{text}} It was"
words = [" terrible", " great"]
max_length = 48
test = 16
[partition]
clients = 4
[method]
name = "fedavg"
batch_size = 4
steps = 2
local = {{ kind = "adamw", lr = 0.01 }}
[rounds]
count = 2
evaluate_every = 2
"""


def written(place: Path) -> Path:
    """The experiment and its data, in a directory."""
    rows = [f"it was {'fine' if i % 2 else 'poor'} number {i},{i % 2}" for i in range(64)]
    (place / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    path = place / "tiny.toml"
    path.write_text(EXPERIMENT.format(data=place / "data.csv"))
    return path


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return written(tmp_path)


def command(experiment: Path, directory: Path, *overrides: str, nodes: int = 2) -> list[str]:
    line = [sys.executable, "-m", "seedwire", "run", str(experiment), "--nodes", str(nodes)]
    line += ["--directory", str(directory), "--threads", "1"]
    for override in overrides:
        line += ["--set", override]
    return line


def run(experiment: Path, directory: Path, *overrides: str, nodes: int = 2) -> dict[str, Any]:
    """A run that must succeed; its summary.  Each node, and the evaluator, loads torch."""
    done = subprocess.run(
        command(experiment, directory, *overrides, nodes=nodes),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [*directory.glob("state/node-*")]  # each of the size of all that is trained
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)  # a poll of another process, not a guess at its speed


def pids(directory: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((directory / "pids.json").read_text())
    return found


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes, and makes sure that none outlives the test."""
    mine: list[subprocess.Popen[str]] = []

    def start(line: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
        mine.append(process)
        return process

    yield start
    for process in mine:
        if process.poll() is None:
            for child in family(process):
                child.kill()
            process.kill()
        process.communicate()


def test_the_same_digest_comes_of_separate_processes_though_one_is_killed_and_comes_back(
    experiment: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    overrides = ["method.steps=100", "nodes.return_seconds=600.0"]
    calm = run(experiment, tmp_path / "calm", *overrides)
    assert calm["status"] == "completed"
    assert calm["rounds"] == 2
    assert calm["loss"]["before"] != calm["loss"]["after"]
    assert len(set(pids(tmp_path / "calm").values())) == 3
    nodes = json.loads((tmp_path / "calm" / "nodes.json").read_text())
    assert nodes["node-1"]["pid"] == pids(tmp_path / "calm")["node-1"]
    counted = sum(both["up"] for both in calm["bytes_by_kind"].values())
    assert calm["bytes"]["message_up"] == counted > calm["bytes"]["payload_up"] > 0
    killed = tmp_path / "killed"
    process = started(command(experiment, killed, *overrides))
    wait_for(lambda: bool(committed(killed)), "round 1 is committed")
    os.kill(pids(killed)["node-1"], signal.SIGKILL)  # round 2 has just been opened
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert "node-1 was killed by signal 9; starting it again" in output
    assert [r["missing"] for r in committed(killed)] == [{}, {}]
    assert json.loads((killed / "summary.json").read_text())["digest"] == calm["digest"]


def test_fedmezo_as_scalars_and_as_weights_ends_with_the_same_digest(
    experiment: Path, tmp_path: Path
) -> None:
    method = 'method={name="fedmezo", lr=0.05, eps=0.01, steps=3, batch_size=4, wire="%s", '
    method += 'signal="round-wise"}'
    ends = {}
    (tmp_path / "scalars" / "state" / "mine").mkdir(parents=True)  # what is not ours stays
    for wire in ("scalars", "weights"):
        ends[wire] = run(experiment, tmp_path / wire, method % wire, "rounds.count=3", nodes=1)
    scalars, weights = ends["scalars"], ends["weights"]
    assert scalars["digest"] == weights["digest"]
    assert scalars["loss"] == weights["loss"]
    assert (tmp_path / "scalars" / "state" / "mine").is_dir()
    assert not (tmp_path / "weights" / "state").exists()
    lora = load_file(tmp_path / "scalars" / "model" / "adapter_model.safetensors")
    moved = [np.abs(x).max() for name, x in lora.items() if "lora_B" in name]
    assert max(moved) > 1e-3  # B starts at zero: the two did not agree by standing still
    assert scalars["bytes"]["payload_up"] == 3 * 4 * 3 * 4  # rounds, clients, steps, bytes
    assert weights["bytes"]["payload_up"] > 50 * scalars["bytes"]["payload_up"]


REAL = {  # what only a real model's derivatives and buffers can show; every kind: tests/faults
    "spry": ('local={kind="sgd", lr=0.01}', '{kind="lora", rank=2}'),
    "fedkseed": ("steps=2, candidates=16, lr=0.01, pro=true", '{kind="full"}'),
}


@pytest.mark.parametrize("name", REAL)
def test_every_replica_of_a_real_model_agrees(experiment: Path, tmp_path: Path, name: str) -> None:
    settings, peft = REAL[name]
    method = f'method={{name="{name}", batch_size=4, {settings}}}'
    summary = run(experiment, tmp_path / name, method, f"peft={peft}")
    assert summary["resyncs"] == 0
    assert summary["rejected"] == {}
    assert summary["loss"]["before"] != summary["loss"]["after"]


def test_a_runs_secret_is_its_owners_alone_and_stays(tmp_path: Path) -> None:
    first = secret_of(tmp_path)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert secret_of(tmp_path) == first
    assert len(first) == SECRET_BYTES
    (tmp_path / "other").mkdir()
    assert secret_of(tmp_path / "other") != first


def test_a_causal_run_reports_perplexity_and_rouge_l(experiment: Path, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    rows = [f"s{i % 3},which {i},number {i}" for i in range(64)]
    (tmp_path / "said.csv").write_text("who,asked,text\n" + "\n".join(rows) + "\n")
    data = f'data={{id="{tmp_path / "said.csv"}", task="causal", prompt="asked", '
    data += 'template="{prompt}? {text}", max_length=32, test=16, generate=4}'
    deal = 'partition={clients=3, kind="natural", column="who"}'
    summary = run(experiment, tmp_path / "a", data, deal, nodes=1)
    assert summary["metric"]["name"] == "token accuracy"
    assert summary["loss"]["after"] < summary["loss"]["before"]
    for end in ("before", "after"):
        assert summary["perplexity"][end] == pytest.approx(math.exp(summary["loss"][end]))
    assert 0 <= summary["rouge_l"] <= 1
    scored = [line for line in lines(tmp_path / "a" / "metrics.jsonl") if "metric" in line]
    assert [("perplexity" in line, "rouge_l" in line) for line in scored] == [
        (True, False), (True, True)
    ]  # fmt: skip


def committed(directory: Path) -> list[dict[str, Any]]:
    return [line for line in lines(directory / "metrics.jsonl") if "missing" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ending_the_launcher_leaves_no_process_behind(
    experiment: Path,
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
) -> None:
    directory = tmp_path / "ended"
    process = started(command(experiment, directory, "rounds.count=1000"))
    wait_for(lambda: bool(committed(directory)), "round 1 is committed")
    children = family(process)
    assert len(children) == 4  # coordinator, its evaluator, two nodes
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == (130 if number != signal.SIGKILL else -9)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert len(gone) == 4


def test_sigterm_leaves_no_process_and_no_secret_where_others_look(
    experiment: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """Command lines while it runs, the run directory after it: the keys are in neither."""
    directory, temporary = tmp_path / "kept", tmp_path / "temporary"
    temporary.mkdir()
    line = command(experiment, directory, "rounds.count=1000")
    process = started(["env", f"TMPDIR={temporary}", *line])
    wait_for(lambda: bool(committed(directory)), "round 1 is committed")
    (store,) = temporary.glob("seedwire-keys-*")
    assert store.stat().st_mode & 0o077 == 0
    secrets = [path.read_text().split()[1] for path in store.glob("*.key")]
    secrets.append((store / "token").read_text().strip())
    assert len(secrets) == 4  # coordinator, two nodes, the token
    children = family(process)
    shown = [" ".join(child.cmdline()) for child in children]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not store.exists()
    shown += [p.read_text(errors="replace") for p in directory.rglob("*") if p.is_file()]
    assert not [secret for secret in secrets for text in shown if secret in text]


def fails(line: list[str], cwd: Path) -> tuple[int, str]:
    """Exit code and standard error of a command that must end by itself."""
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, cwd=cwd
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("override", "code", "why"),
    [
        ("method.lerning_rate=1", 3, "unknown field `lerning_rate`"),
        ("runn.seed=1", 3, "unknown field `runn`"),
        ('model.id="./no/such/model"', 4, "no/such/model"),
        ('data.label="lable"', 5, "lable"),
        ('data.id="./gone.csv"', 5, "gone.csv"),
        ('peft.targets=["q_prj"]', 4, "q_prj"),
    ],
)
def test_bad_experiment_is_one_clear_line_and_a_documented_code(
    experiment: Path, tmp_path: Path, override: str, code: int, why: str
) -> None:
    line = [sys.executable, "-m", "coordinator", "--experiment", str(experiment)]
    line += ["--bind", "tcp://127.0.0.1:*", "--set", override]
    got, error = fails(line, tmp_path)
    assert got == code, error
    assert error.startswith("seedwire: ")
    assert why in error
    assert len(error.splitlines()) == 1


WITHOUT_TORCH = """
import sys
from pathlib import Path
from node.engine import Setup
from node.worker import Worker
from protocol import experiment as experiments
from protocol.errors import SeedwireError
for override in sys.argv[2:]:
    try:
        Worker(experiments.load(Path(sys.argv[1]), [override]), Setup((0,)))
    except SeedwireError as error:
        print(error.exit_code, "torch" in sys.modules)
"""


def test_what_is_not_there_is_told_before_torch_is_loaded(experiment: Path, tmp_path: Path) -> None:
    wrong = ['model.id="./no/such/model"', 'data.id="./gone.csv"', 'data.label="lable"']
    line = [sys.executable, "-c", WITHOUT_TORCH, str(experiment), *wrong]
    assert subprocess.check_output(line, cwd=tmp_path, text=True) == "4 False\n5 False\n5 False\n"


def test_port_in_use_is_one_clear_line(experiment: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = [sys.executable, "-m", "coordinator", "--experiment", str(experiment)]
        got, error = fails([*line, "--bind", f"tcp://127.0.0.1:{port}"], tmp_path)
    assert got == 6
    assert "port in use" in error
    assert len(error.splitlines()) == 1


def test_node_with_another_protocol_version_is_told_so(
    experiment: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    directory = tmp_path / "run"
    line = [sys.executable, "-m", "coordinator", "--experiment", str(experiment), "--insecure"]
    started([*line, "--bind", "tcp://127.0.0.1:*", "--directory", str(directory), "--no-evaluator"])
    wait_for((directory / "coordinator.json").exists, "the coordinator listens")
    endpoint = json.loads((directory / "coordinator.json").read_text())["endpoint"]
    older = "import protocol.wire; protocol.wire.VERSION = 9; from node.cli import main; main()"
    arguments = ["--coordinator", endpoint, "--clients", "0", "--give-up", "60", "--insecure"]
    got, error = fails([sys.executable, "-c", older, *arguments], tmp_path)
    assert got == 7
    assert "protocol 9" in error
    assert "install the same seedwire" in error.splitlines()[-1]


def test_stop_ends_a_run_in_order_and_leaves_no_process_behind(
    experiment: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    directory = tmp_path / "stopped"
    process = started(command(experiment, directory, "rounds.count=1000"))
    wait_for(lambda: bool(committed(directory)), "round 1 is committed")
    children = family(process)
    seedwire = [sys.executable, "-m", "seedwire"]

    def listed() -> dict[str, Any]:
        told = subprocess.check_output([*seedwire, "list", tmp_path, "--format", "json"])
        (row,) = json.loads(told)
        return dict(row)

    wait_for(lambda: listed()["round"] >= 1, "round 1 is listed")
    row = listed()
    assert (row["state"], row["rounds"]) == ("running", 1000)
    said = json.loads(subprocess.check_output([*seedwire, "stop", directory, "--format", "json"]))
    assert said["ended"] == {"coordinator": pids(directory)["coordinator"]}
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert not psutil.wait_procs(children, timeout=20)[1]
    live = json.loads((directory / "status.json").read_text())
    assert {"node-0", "node-1", "evaluator"} == {node["node"] for node in live["nodes"]}
    assert listed()["state"] == "stopped"
    assert (directory / "state" / "node-0").is_dir()  # it can be resumed
