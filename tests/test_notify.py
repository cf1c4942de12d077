"""What systemd is told: by hand, and by real processes over a real datagram socket."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.notify import Notifier
from tests.test_run import experiment, lines

__all__ = ["experiment"]  # the fixture

pytestmark = [pytest.mark.net, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 240.0  # on a busy machine two processes load torch in minutes


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)  # a poll of another process, not a guess at its speed


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        yield manager


def told(manager: socket.socket) -> list[str]:
    """The lines so far."""
    said: list[str] = []
    while True:
        try:
            said += manager.recv(4096).decode().splitlines()
        except BlockingIOError:
            return said


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- by hand ---------------------------------------------------------------------


def test_readiness_and_status_are_told_once_and_beats_at_half_the_time(
    manager: socket.socket,
) -> None:
    clock = Clock()
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "10000000", "X": "1"}
    notifier = Notifier(environment, clock)
    assert environment == {"X": "1"}  # no child of ours is to be taken for us
    assert notifier.due == 100.0
    notifier.turn("looking", is_ready=False)
    assert told(manager) == ["WATCHDOG=1", "STATUS=looking"]
    assert notifier.due == 105.0
    clock.now = 104.9
    notifier.turn("looking", is_ready=True)
    assert told(manager) == ["READY=1"]
    clock.now = 105.0
    notifier.turn("two\nlines", is_ready=True)
    assert told(manager) == ["WATCHDOG=1", "STATUS=two lines"]
    notifier.turn("two\nlines", is_ready=False)  # lost for a while: ready is said once
    assert told(manager) == []
    notifier.stopping("told to")
    assert told(manager) == ["STOPPING=1", "STATUS=told to"]


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "1000"}])
def test_without_systemd_nothing_is_told_and_nothing_is_due(environment: dict[str, str]) -> None:
    notifier = Notifier(environment, Clock())
    notifier.turn("status", is_ready=True)
    notifier.stopping("")
    assert notifier.due == math.inf


def test_another_process_that_is_watched_is_not_us(manager: socket.socket) -> None:
    at = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    assert Notifier(at, Clock()).due == math.inf


def test_an_abstract_socket_and_one_whose_reader_is_gone() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0seedwire-test-{os.getpid()}")
        notifier = Notifier({"NOTIFY_SOCKET": f"@seedwire-test-{os.getpid()}"}, Clock())
        notifier.turn("a", is_ready=False)
        assert manager.recv(100) == b"STATUS=a"
    notifier.turn("b", is_ready=False)


# --- a real node and a real coordinator ------------------------------------------


@contextmanager
def process(arguments: list[str], manager: socket.socket | None, cwd: Path) -> Iterator[int]:
    """A process of ours as systemd would start it: its id."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SEEDWIRE")}
    env |= {"PYTHONSAFEPATH": "1", "GOMP_SPINCOUNT": "0"}
    if manager is not None:
        env |= {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"}
    with (cwd / f"{arguments[0]}.log").open("w") as log:
        line = [sys.executable, "-m", *arguments]
        child = subprocess.Popen(line, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Watch:
    """What has been told so far, with the time of each line."""

    def __init__(self, manager: socket.socket) -> None:
        self._manager, self.said = manager, list[str]()

    def has(self, words: str) -> Callable[[], bool]:
        """Whether a line with these words has come."""

        def look() -> bool:
            self.said += told(self._manager)
            return any(words in one for one in self.said)

        return look

    def counts(self, line: str, number: int) -> Callable[[], bool]:
        """Whether it has come so often from now on."""
        self.has("")()
        before = self.said.count(line)

        def look() -> bool:
            self.said += told(self._manager)
            return self.said.count(line) >= before + number

        return look


@pytest.mark.slow
def test_a_node_is_ready_once_logged_in_and_beats_also_while_a_long_task_runs(
    manager: socket.socket, experiment: Path, tmp_path: Path
) -> None:
    """Until it hangs: a stopped process is one whose loop does not turn."""
    watch, run = Watch(manager), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    node = ["node", "--coordinator", endpoint, "--clients", "0-3", "--insecure", "--threads", "1"]
    centre = ["coordinator", "--experiment", str(experiment), "--directory", str(run)]
    centre += ["--bind", endpoint, "--insecure", "--set", "method.steps=100000"]
    with process(node, manager, tmp_path) as pid:
        wait_for(watch.has("STATUS=looking for a coordinator"), "the node looks")
        wait_for(watch.counts("WATCHDOG=1", 3), "its loop turns meanwhile")
        assert "READY=1" not in watch.said
        with process(centre, None, tmp_path):
            wait_for(watch.has("READY=1"), "it logs in")
            wait_for(watch.has(f"STATUS=run {run.name}"), "it says which run")
            wait_for(watch.has("round 1, client"), "it trains")
            wait_for(watch.counts("WATCHDOG=1", 10), "its loop turns beside the task")
            os.kill(pid, signal.SIGSTOP)
            try:
                watch.has("")()  # what was told before it stopped
                silent_until = time.monotonic() + 1.0  # five times what a beat may take
                while time.monotonic() < silent_until:
                    assert not told(manager), "a node that hangs says nothing"
                    time.sleep(0.05)
            finally:
                os.kill(pid, signal.SIGCONT)
            wait_for(watch.counts("WATCHDOG=1", 1), "it goes on")
            assert not lines(run / "metrics.jsonl")[1:], "all this was one task"
            os.kill(pid, signal.SIGTERM)
            wait_for(watch.has("STOPPING=1"), "it is told to leave")
    assert watch.said.count("READY=1") == 1


@pytest.mark.slow
def test_a_coordinator_is_ready_once_it_listens_and_says_how_far_it_is(
    manager: socket.socket, experiment: Path, tmp_path: Path
) -> None:
    watch = Watch(manager)
    centre = ["coordinator", "--experiment", str(experiment), "--directory", str(tmp_path / "run")]
    centre += ["--bind", "tcp://127.0.0.1:*", "--insecure", "--no-evaluator"]
    with process(centre, manager, tmp_path) as pid:
        wait_for(watch.has("READY=1"), "it listens")
        assert (tmp_path / "run" / "coordinator.json").exists()
        wait_for(watch.has("STATUS=0 nodes, 0 of 2 rounds done"), "it says so")
        wait_for(watch.counts("WATCHDOG=1", 2), "its loop turns")
        os.kill(pid, signal.SIGTERM)
        wait_for(watch.has("STOPPING=1"), "it ends")
