"""What is sent to hosts: it starts, knows and ends its own processes and no other."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import steward
from deploy.steward import Place

SCRIPTS = ("steward.py", "probe.py", "listener.py")
PATIENCE_SECONDS = 30.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path), "a")


def call(place: Place, do: str, **more: Any) -> dict[str, Any]:
    """As on a host: in a process that is gone afterwards."""
    wanted = {"do": do, "directory": str(place.directory), "name": "a", **more}
    words = [sys.executable, steward.__file__, json.dumps(wanted)]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE_SECONDS, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def start(place: Place, script: str) -> dict[str, Any]:
    words, env = ["sh", "-c", script], {"WORD": "ready"}
    return call(place, "start", command=words, env=env, until="ready", within=PATIENCE_SECONDS)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    while is_alive(process):
        time.sleep(0.01)  # a poll of another process


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_sent_is_read_by_an_old_python_and_needs_nothing(name: str) -> None:
    text = (Path(steward.__file__).with_name(name)).read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    names = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_a_process_is_started_known_and_ended(place: Place) -> None:
    said = start(place, "sleep 1; echo $WORD; echo more; sleep 600")  # it is waited for
    assert (said["state"], said["seen"]) == ("running", True)
    process = psutil.Process(said["pid"])
    assert process.cmdline()[:2] == ["sh", "-c"]
    assert place.status()["memory"] > 0
    assert 0 <= place.status()["seconds"] < PATIENCE_SECONDS
    again = start(place, "exit 1")
    assert (again["pid"], again["seen"]) == (said["pid"], True)
    ended = call(place, "stop")
    assert (ended["was"], ended["state"]) == ("running", "ended")
    assert not is_alive(process)
    assert place.status()["state"] == "absent"
    assert call(place, "stop")["was"] == "absent"


def test_one_that_ends_is_told_with_code_and_last_line(place: Place) -> None:
    said = start(place, "echo first; echo last; exit 7")
    assert (said["state"], said["code"], said["seen"]) == ("ended", 7, False)
    assert said["line"] == "last"
    assert place.status(after=0)["text"] == "first\nlast\n"
    assert place.status(after=-5)["text"] == "last\n"


def test_only_what_this_start_has_logged_is_looked_at(place: Place) -> None:
    assert start(place, "echo $WORD; exit 0")["seen"]
    said = start(place, "exit 0")
    assert (said["seen"], said["state"], said["code"]) == (False, "ended", 0)


def test_a_killed_one_is_told_as_killed(place: Place) -> None:
    said = start(place, "echo ready; exec sleep 600")
    kill(said["pid"])
    assert (place.status()["state"], place.status()["code"]) == ("ended", 137)


def test_one_whose_shell_is_late_is_not_taken_for_gone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be started again, or its code be written after it was stopped."""
    said = start(place, "echo ready; exec sleep 600")
    shell = psutil.Process(said["pid"]).parent()
    assert shell is not None
    shell.suspend()
    kill(said["pid"])
    monkeypatch.setattr("time.sleep", lambda seconds: shell.resume())
    assert (place.status()["state"], place.status()["code"]) == ("ended", 137)
    assert call(place, "stop")["was"] == "ended"
    assert not list(place.facts.parent.iterdir())


def test_one_that_does_not_listen_is_ended_by_force_with_its_children(place: Place) -> None:
    said = start(place, "trap '' TERM; sleep 600 & echo ready; wait; wait")
    process = psutil.Process(said["pid"])
    child = process.children()[0]
    assert call(place, "stop", within=0.5)["was"] == "running"
    assert not is_alive(process)
    child.wait(PATIENCE_SECONDS)


def test_what_it_started_ends_with_it(place: Place) -> None:
    said = start(place, "sleep 600 & echo ready; wait")
    child = psutil.Process(said["pid"]).children()[0]
    assert call(place, "stop")["was"] == "running"
    child.wait(PATIENCE_SECONDS)


def test_a_process_that_took_the_number_is_left_alone(place: Place) -> None:
    """The machine was restarted, or the number came round: another has it now."""
    with subprocess.Popen(["/bin/sleep", "600"]) as other:
        place.facts.parent.mkdir()
        facts = {"pid": other.pid, "identity": "another boot 1", "since": 0.0, "offset": 0}
        place.facts.write_text(json.dumps(facts))
        assert place.status()["state"] == "gone"
        assert call(place, "stop")["was"] == "gone"
        assert other.poll() is None
        other.kill()
    assert steward.identity(other.pid) is None


def test_a_process_keeps_its_identity() -> None:
    assert steward.identity(os.getpid()) == steward.identity(os.getpid())
    assert steward.identity(os.getpid()) != steward.identity(1)


def test_it_is_in_a_session_of_its_own(place: Place) -> None:
    said = start(place, "echo ready; sleep 600")
    assert os.getsid(said["pid"]) != os.getsid(0)
    assert call(place, "stop")["was"] == "running"
