"""What is shown of a run while it goes on: the live file, the status, the terminal view."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

import seedwire
from coordinator import processes, totals
from coordinator.live import Live, spans
from coordinator.log import clock
from coordinator.state import Training
from coordinator.status import Reader, sentence, status
from coordinator.view import View, render
from protocol.errors import ExperimentError
from protocol.messages import Beat, Failed
from protocol.parts import Progress
from protocol.tcp import Traffic
from tests.test_server import Peer, Run, two_nodes

WALL = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    (tmp_path / "r").mkdir()
    run = Run(tmp_path / "r")
    yield run
    run.open.close()


def live(run: Run) -> Live:
    return Live(run.server, run.recorder, lambda: WALL)


def in_training(run: Run) -> tuple[Peer, Peer, Peer]:
    """Round 1 is open, a's updates are in, b's client 2 and 3 are waited for."""
    a, b, evaluator = two_nodes(run)
    b.answer = lambda task: []

    def is_there() -> bool:
        phase = run.server.state.phase
        return isinstance(phase, Training) and len(phase.refs) == 2

    run.until(is_there)
    return a, b, evaluator


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's coordinator is taken to be alive."""
    monkeypatch.setattr(processes, "coordinator_of", lambda directory: psutil.Process())


def test_the_live_file_says_who_is_waited_for_and_until_when(run: Run) -> None:
    in_training(run)
    assert live(run).update()
    said = json.loads((run.directory / "status.json").read_text())
    assert (said["at"], said["phase"], said["round"], said["rounds"]) == (WALL, "training", 0, 2)
    assert said["waiting"] == [{"client": 2, "node": "b"}, {"client": 3, "node": "b"}]
    assert said["arrived"] == 2
    assert said["deadline_seconds"] == 10.0
    assert 0 < said["seconds"] < 10
    assert said["bytes"] == totals.nbytes(run.recorder.account, run.recorder.meter)
    assert not list(run.directory.glob("*.part"))


def test_before_the_first_round_it_says_what_is_lacking(run: Run) -> None:
    assert live(run).snapshot()["lacks"] == "the evaluation worker to load model and data"
    Peer(run, "evaluator").login()
    run.until(lambda: run.server.state.evaluator)
    assert live(run).snapshot()["lacks"] == "nodes that host clients 0-3"
    a = Peer(run, "a", 0, 1)
    a.delay = 5.0
    a.login()
    run.until(lambda: any(m.name == "a" for m in run.server.desk.roster))
    assert live(run).snapshot()["lacks"] == "a to load model and data"


def test_bytes_by_node_kind_and_level_add_up_to_the_account(run: Run) -> None:
    two_nodes(run)
    summary = run.finish()
    nodes = {node["node"]: node for node in live(run).snapshot()["nodes"]}
    assert set(nodes) == {"a", "b", "evaluator"}
    for level in ("payload", "message"):
        for way in ("up", "down"):
            counted = sum(
                kind.get(way, 0) for n in "ab" for kind in nodes[n]["bytes"][level].values()
            )
            assert counted == summary["bytes"][f"{level}_{way}"] > 0
    assert nodes["a"]["memory_bytes"]["train"] == 7_500_000
    assert "tcp" not in nodes["a"]  # not counted is absent, not zero
    run.recorder.meter.traffic["a"] = Traffic(sent=7, received=5, resent=None, connections=2)
    (a,) = (n for n in live(run).snapshot()["nodes"] if n["node"] == "a")
    assert a["tcp"] == {"up": 5, "down": 7, "resent": None, "rtt_seconds": 0.0, "connections": 2}


def test_a_node_that_has_left_is_shown_as_gone_with_its_bytes(run: Run) -> None:
    in_training(run)
    (b,) = (m for m in run.server.desk.roster if m.name == "b")
    run.server.desk.drop(b)
    (gone,) = (n for n in live(run).snapshot()["nodes"] if n["node"] == "b")
    assert gone["doing"] == "gone"
    assert gone["bytes"]["message"]["control"]["up"] > 0
    live(run).update()
    (shown,) = (n for n in status(run.directory)["nodes"] if n["node"] == "b")
    assert (shown["doing"], shown["clients"]) == ("gone", [2, 3])  # from nodes.json


def test_the_file_is_written_once_a_second_and_at_the_end(run: Run) -> None:
    path = run.directory / "status.json"
    with live(run) as it:
        assert it.update()
        assert not it.update()
        run.net.now += 0.99
        assert not it.update()
        run.net.now += 0.02
        assert it.update()
        path.unlink()
    assert json.loads(path.read_text())["phase"] == "gathering"


@pytest.mark.usefixtures("alive")
def test_status_joins_the_live_file_and_the_curves(run: Run) -> None:
    in_training(run)
    live(run).update()
    s = status(run.directory)
    assert (s["state"], s["reason"], s["run"], s["seed"]) == ("running", None, "test", 4)
    assert (s["method"], s["model"], s["data"]) == ("fedmezo", "random:x", "x.csv")
    assert [line["metric"] for line in s["evaluations"]] == [0.5]
    assert s["commits"] == []
    assert s["summary"] is None
    spent = f"{s['seconds']:.0f} s of at most 10"
    assert sentence(s) == f"round 1, {spent}: waiting for client 2 (b), client 3 (b)"


def test_status_of_a_run_that_is_over_and_of_one_that_was_killed(run: Run) -> None:
    in_training(run)
    live(run).update()
    assert status(run.directory)["state"] == "stopped"
    assert "its coordinator has ended" in sentence(status(run.directory))
    (run.directory / "summary.json").write_text('{"status": "failed: round 1: no: quorum"}')
    s = status(run.directory)
    assert (s["state"], s["reason"]) == ("failed", "round 1: no: quorum")
    assert sentence(s) == "failed: round 1: no: quorum"


def test_status_of_a_run_without_a_live_file(run: Run) -> None:
    two_nodes(run)
    run.finish()
    s = status(run.directory)
    assert (s["state"], s["round"], s["age_seconds"]) == ("completed", 2, None)
    assert [node["node"] for node in s["nodes"]] == ["a", "b", "evaluator"]
    render(s, 80)


def test_a_reader_reads_only_what_is_new_and_no_half_line(run: Run) -> None:
    path = run.directory / "metrics.jsonl"
    reader = Reader(run.directory)
    assert reader.status()["commits"] == []
    line = '{"round": 1, "train_loss": 0.5, "bytes": {"message_up": 1, "message_down": 2}}\n'
    path.write_text(line + line[:20])
    assert len(reader.status()["commits"]) == 1
    with path.open("a") as file:
        file.write(line[20:])
    assert len(reader.status()["commits"]) == 2
    path.write_text(line)  # a resumed run lost a line
    assert len(reader.status()["commits"]) == 1
    other = line.replace("0.5", "0.25")
    path.write_text(other + other + other)  # and has committed others since we last looked
    assert [c["train_loss"] for c in reader.status()["commits"]] == [0.25] * 3


def test_a_reader_lets_go_of_old_commits_and_of_no_evaluation(run: Run) -> None:
    two_nodes(run)
    run.finish()
    whole, last = Reader(run.directory), Reader(run.directory, most_commits=1)
    all_of, kept = whole.status(), last.status()
    assert len(all_of["commits"]) > 1
    assert kept["commits"] == all_of["commits"][-1:]
    assert kept["evaluations"] == all_of["evaluations"]
    assert last.news == whole.lines
    last.status()
    assert last.news == []


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="holds no run"):
        status(tmp_path)


def shown(s: dict[str, Any], width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(render(s, width))
    return out.getvalue().splitlines()


@pytest.mark.usefixtures("alive")
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_picture_fits_its_width_and_shows_nodes_as_text(run: Run, width: int) -> None:
    a, _, _ = in_training(run)
    progress = Progress(round=1, client=0, done=3, total=4)
    a.say(Beat(busy="[i]now[/]", progress=progress))
    run.until(lambda: any(m.busy.startswith("[i]") for m in run.server.desk.roster))
    live(run).update()
    lines = shown(status(run.directory), width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "0/2 rounds" in text
    assert "accuracy 50.0%" in text
    assert "[i]now[/], 75 %" in text  # what a node says is not markup
    assert ("host" in text) == (width >= 100)


@pytest.mark.usefixtures("alive")
def test_in_a_pipe_the_view_says_each_piece_of_news_once(run: Run) -> None:
    out = io.StringIO()
    two_nodes(run)
    with live(run) as it, View(Console(file=out, width=80), run.directory) as view:
        while run.server.finished is None:
            run.server.turn(0.25)
            it.update(is_last=True)
            view.update()
    run.finish()
    said = [line[9:] for line in out.getvalue().splitlines()]
    assert sum(line.startswith("round 1/2: training loss") for line in said) == 1
    assert sum(line.startswith("after round 2: loss 2.0000, accuracy 50.0%") for line in said) == 1
    assert len(said) == len(set(said))


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.96, 3725.5)] == ["0:00:00.0", "0:01:00.0", "1:02:05.5"]


def test_spans() -> None:
    assert spans([5, 0, 1, 2]) == "0-2,5"
    assert spans([]) == ""


# --- commands --------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(seedwire.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.usefixtures("signal_handlers")
class TestCommands:
    def test_list_has_a_row_for_each_run_and_ignores_the_rest(self, run: Run) -> None:
        two_nodes(run)
        summary = run.finish()
        root = run.directory.parent
        (root / "other").mkdir()
        (row,) = json.loads(invoke("list", root, "--format", "json"))
        sent = summary["bytes"]["message_up"] + summary["bytes"]["message_down"]
        assert (row["name"], row["state"], row["value"]) == ("r", "completed", 0.5)
        assert (row["round"], row["rounds"], row["bytes"]) == (2, 2, sent)
        assert "completed" in invoke("list", root)
        assert invoke("list", root / "other").startswith("no runs in")
        assert "cannot list" in invoke("list", root / "gone", code=3)

    def test_watch_ends_with_the_run_and_its_code_tells_how(self, run: Run) -> None:
        two_nodes(run)
        assert "stopped: its coordinator has ended" in invoke("watch", run.directory, code=8)
        assert "after round" not in invoke("watch", run.directory, "--once")
        run.finish()
        assert "after round 2: loss 2.0000" in invoke("watch", run.directory)
        (line,) = invoke("watch", run.directory, "--format", "json").splitlines()
        said = json.loads(line)
        assert (said["state"], len(said["commits"]), len(said["evaluations"])) == (
            *("completed", 2, 3),
        )

    def test_log_tells_events_and_what_the_machine_made_of_them(self, run: Run) -> None:
        a, _, _ = two_nodes(run)
        a.answer = lambda task: (
            [(Failed(round=task.round, attempt=0, client=task.client, reason="no memory"), None)]
            if (task.round, task.client) == (1, 0)
            else [a.update(task)]
        )
        run.finish()
        run.open.commit()
        told = [line.split(" ", 1)[1] for line in invoke("log", run.directory).splitlines()]
        assert "node a is ready, with clients 0-1" in told
        assert "round 1: asking clients 0-3" in told
        assert "round 1: client 0 failed: no memory" in told
        assert "round 1 is committed, 3 updates; client 0 is missing: no memory" in told
        assert told[-2:] == ["the parameters after round 2 are evaluated", "the run is complete"]
        lines = invoke("log", run.directory, "--format", "json").splitlines()
        assert [json.loads(line)["text"] for line in lines] == told
        times = [json.loads(line)["seconds"] for line in lines]
        assert times == sorted(times)
        assert "holds no run" in invoke("log", run.directory.parent, code=3)
        (run.directory / "journal.sqlite").unlink()
        assert "cannot be read" in invoke("log", run.directory, code=3)

    def test_stop_and_down_of_a_run_that_is_over_end_nothing(self, run: Run) -> None:
        for command in ("stop", "down"):
            assert "nothing of it runs on this machine" in invoke(command, run.directory)
            assert json.loads(invoke(command, run.directory, "--format", "json"))["ended"] == {}
            assert "holds no run" in invoke(command, run.directory.parent, code=3)

    def test_a_process_is_the_runs_only_if_it_has_the_runs_log_open(self, run: Run) -> None:
        logs = run.directory / "logs"
        logs.mkdir()
        wait = [sys.executable, "-c", "input()"]
        with (logs / "coordinator.log").open("w") as log, (logs / "a.log").open("w") as other:
            mine = subprocess.Popen(wait, stdin=subprocess.PIPE, stderr=log)
            node = subprocess.Popen(wait, stdin=subprocess.PIPE, stderr=other)
        stranger = subprocess.Popen(wait, stdin=subprocess.PIPE)
        try:
            pids = {"coordinator": mine.pid, "a": node.pid, "b": stranger.pid}
            (run.directory / "pids.json").write_text(json.dumps(pids))
            announced = run.directory / "coordinator.json"
            announced.write_text(json.dumps({"pid": stranger.pid}))
            assert "nothing" in invoke("stop", run.directory)  # its id was used again
            announced.write_text(json.dumps({"pid": mine.pid}))
            assert status(run.directory)["state"] == "running"
            said = json.loads(invoke("down", run.directory, "--format", "json"))
            assert said["ended"] == {"coordinator": mine.pid, "a": node.pid}
            assert None not in (mine.poll(), node.poll())
            assert stranger.poll() is None
        finally:
            for process in (mine, node, stranger):
                process.kill()
                process.communicate()
