"""Groups of real processes: a worker with followers, a node in a run, torchrun; and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from node.engine import Outcome, Ranks, Setup
from node.lead import Lead
from node.worker import Worker
from protocol import experiment as experiments
from protocol.messages import Failed, Ready, Task, Update
from protocol.payload import Flat, decode
from tests import test_run
from tests.test_run import committed, experiment, family, run, started, wait_for, written
from tests.test_worker import step_to, told

__all__ = ["experiment", "started"]  # fixtures

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(600)]

CAUSAL = {"task": "causal", "template": "{prompt}: {text}", "prompt": "text", "text": "answer"}
PATIENCE_SECONDS = 300.0
TASK = Task(round=1, client=0, version=0)


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of one to four words, so that rows differ in what they count."""
    path = tmp_path_factory.mktemp("data") / "answers.csv"
    rows = [f"it was number {i},{'so ' * (i % 4)}{'fine' if i % 2 else 'poor'}" for i in range(48)]
    path.write_text("text,answer\n" + "\n".join(rows) + "\n")
    return path


def causal(csv: Path, **method: Any) -> experiments.Experiment:
    table = {
        "run": {"name": "test", "seed": 1},
        "model": {"id": "random:llama-tiny"},
        "data": {"id": str(csv), "max_length": 24, "test": 8, **CAUSAL},
        "partition": {"clients": 2},
        "peft": {"rank": 2},
        "rounds": {"count": 1},
        "method": {"batch_size": 5, "steps": 2} | method,
    }
    return experiments.convert(table, "test")


ALONE = Setup((0, 1), threads=1)


@contextmanager
def led(experiment: experiments.Experiment, size: int) -> Iterator[tuple[Lead, Ready]]:
    lead = Lead(experiment, ALONE, Ranks(size, patience_seconds=PATIENCE_SECONDS))
    try:
        yield lead, told(lead.ready(), Ready)
    finally:
        lead.close()


def sent(outcome: Outcome | None) -> Flat:
    update = told(outcome, Update)
    assert outcome is not None
    assert outcome.data is not None
    assert update.payload is not None
    return decode(update.payload, bytes(outcome.data)).values


METHODS: Mapping[str, dict[str, Any]] = {
    "decomfl": {"perturbations": 3},
    "spry": {"perturbations": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_send_what_one_sends(csv: Path, name: str) -> None:
    wanted = causal(csv, name=name, **METHODS[name])
    alone = Worker(wanted, ALONE)
    alone.ready()
    want = sent(alone.run(TASK, None))
    with led(wanted, 2) as (lead, _):
        got = sent(lead.run(TASK, None))
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    if name == "decomfl":
        assert got.tobytes() == want.tobytes()


def following() -> list[psutil.Process]:
    """The ranks that this process has started; other tests in it have left children of theirs."""
    return [p for p in psutil.Process().children() if "node.follower" in p.cmdline()]


def test_gradients_of_three_processes_and_the_death_of_one(csv: Path) -> None:
    """Five rows of 1 to 4 answer words, by micro-batches of 1, are 1, 2 and 2 to a rank."""
    wanted = msgspec.structs.replace(
        causal(csv, name="fedavg", local={"kind": "sgd", "lr": 0.1}),
        compute=experiments.Compute(micro_batch=1),
    )
    alone = Worker(wanted, ALONE)
    alone.ready()
    want = sent(alone.run(TASK, None))
    with led(wanted, 3) as (lead, ready):
        by_phase = {cost.phase: cost for cost in ready.costs}
        own = psutil.Process().memory_info().rss
        assert by_phase["inference"].rss is None or by_phase["inference"].rss > 1.5 * own
        assert np.abs(want - alone.x).max() > 1e-3
        np.testing.assert_allclose(sent(lead.run(TASK, None)), want, rtol=1e-6, atol=1e-6)

        def kill(done: int, total: int) -> None:
            if done == 1:
                followers[0].kill()

        followers = following()
        assert len(followers) == 2
        failed = told(lead.run(TASK, None, kill), Failed)
        assert "killed by signal 9" in failed.reason
        assert not any(f.is_running() for f in followers)
        x = alone.x + np.float32(0.01)
        assert lead.run(*step_to(x)) is None  # while nobody follows
        assert alone.run(*step_to(x)) is None
        second = msgspec.structs.replace(TASK, version=1, round=2)
        want = sent(alone.run(second, None))
        outcome = lead.run(second, None)
        np.testing.assert_allclose(sent(outcome), want, rtol=1e-6, atol=1e-6)
        assert {"catch-up", "train"} <= {cost.phase for cost in told(outcome, Update).costs}
        others = following()
        assert len(others) == 2
    assert not psutil.wait_procs(others, timeout=20)[1]


# --- whole runs -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of a group loads torch, all at once."""
    monkeypatch.setattr(test_run, "PATIENCE_SECONDS", PATIENCE_SECONDS)


MEZO = 'method={name="fedmezo", lr=0.05, eps=0.01, steps=3, batch_size=4}'


def coordinator(start: Callable[..., Any], experiment: Path, directory: Path, *set_: str) -> str:
    line = [sys.executable, "-m", "coordinator", "--experiment", str(experiment), "--insecure"]
    line += ["--bind", "tcp://127.0.0.1:*", "--directory", str(directory)]
    for override in set_:
        line += ["--set", override]
    start(line)
    wait_for((directory / "coordinator.json").exists, "the coordinator listens")
    endpoint: str = json.loads((directory / "coordinator.json").read_text())["endpoint"]
    return endpoint


def node(endpoint: str, *more: str) -> list[str]:
    line = ["node", "--coordinator", endpoint, "--insecure", "--clients", "0-3", "--threads", "1"]
    return ["-m", *line, *more]


def finished(directory: Path) -> dict[str, Any]:
    wait_for((directory / "summary.json").exists, "the run is over")
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run of single processes."""
    place = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_run, "PATIENCE_SECONDS", PATIENCE_SECONDS)
        return run(written(place), place / "run", MEZO)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("launcher", "options"),
    [((), ("--ranks", "2")), (TORCHRUN, ()), (TORCHRUN, ("--fsdp",))],
    ids=["ranks", "torchrun", "fsdp"],
)
def test_a_run_of_a_group_ends_with_the_digest_of_single_processes(
    experiment: Path,
    tmp_path: Path,
    started: Callable[..., Any],
    alone: dict[str, Any],
    launcher: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    endpoint = coordinator(started, experiment, tmp_path / "group", MEZO)
    process = started([sys.executable, *launcher, *node(endpoint, *options)])
    assert finished(tmp_path / "group")["digest"] == alone["digest"]
    assert process.wait(60) == 0


def test_a_follower_that_is_killed_fails_its_task_and_not_the_node(
    experiment: Path, tmp_path: Path, started: Callable[..., Any]
) -> None:
    long = ("method.steps=100", "rounds.count=2", "partition.clients=2")
    soon = "nodes.heartbeat_seconds=0.2"  # is it known that a task has begun
    endpoint = coordinator(started, experiment, tmp_path / "run", *long, soon)
    process = started([sys.executable, *node(endpoint, "--ranks", "2", "--clients", "0-1")])
    wait_for(lambda: in_a_task(tmp_path / "run" / "status.json"), "a task has begun")
    (follower,) = family(process)
    follower.kill()
    summary = finished(tmp_path / "run")
    assert (summary["status"], summary["rounds"]) == ("completed", 2)
    assert summary["rejected"] == {"task failed": 1}
    why = [line["missing"] for line in committed(tmp_path / "run")]
    assert any("rank 1 was killed by signal 9" in str(missing) for missing in why)
    assert process.wait(60) == 0


def in_a_task(status: Path) -> bool:
    """By what the nodes' beats have said."""
    nodes = json.loads(status.read_text())["nodes"] if status.exists() else []
    return any(node["doing"].startswith("round") for node in nodes)


def test_followers_end_with_rank_0(
    experiment: Path, tmp_path: Path, started: Callable[..., Any]
) -> None:
    endpoint = coordinator(started, experiment, tmp_path / "run", "rounds.count=1000")
    process = started([sys.executable, *node(endpoint, "--ranks", "2")])
    wait_for(lambda: bool(committed(tmp_path / "run")), "round 1 is committed")
    followers = family(process)
    os.kill(process.pid, signal.SIGKILL)
    assert len(followers) == 1
    assert not psutil.wait_procs(followers, timeout=20)[1]


def test_a_node_says_in_one_line_what_it_cannot_be() -> None:
    def fails(*more: str, **env: str) -> str:
        line = [sys.executable, *node("tcp://127.0.0.1:1", *more)]
        done = subprocess.run(
            line, capture_output=True, text=True, env=os.environ | env, timeout=300, check=False
        )
        assert done.returncode == 2
        return done.stderr

    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert "an evaluator is one process" in fails("--ranks", "2", "--evaluate")
    assert "torchrun has started the ranks" in fails("--ranks", "2", **launched)
    assert "it takes ranks to deal a model" in fails("--fsdp")
    assert "want 1 to 10^6" in fails("--rank-patience", "0")
