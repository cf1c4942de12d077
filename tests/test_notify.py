"""What systemd is told: by hand, and by real processes over a real datagram socket."""

from __future__ import annotations

import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from protocol.notify import Notifier
from tests.test_run import experiment, lines

__all__ = ["experiment"]  # the fixture

pytestmark = [pytest.mark.net, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 240.0  # on a busy machine two processes load torch in minutes


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[[str], socket.socket]]:
    """Be the systemd of processes, each with a socket of its own."""
    made: list[socket.socket] = []

    def make(name: str) -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        made[-1].bind(str(tmp_path / name))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture
def manager(listen: Listen) -> socket.socket:
    return listen("notify")


Listen = Callable[[str], socket.socket]


def told(manager: socket.socket) -> list[str]:
    """The lines so far."""
    said: list[str] = []
    while True:
        try:
            said += manager.recv(4096, socket.MSG_DONTWAIT).decode().splitlines()
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
def process(arguments: list[str], manager: socket.socket, cwd: Path) -> Iterator[int]:
    """A process of ours as systemd would start it: its id."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SEEDWIRE")}
    env |= {"PYTHONSAFEPATH": "1", "GOMP_SPINCOUNT": "0"}
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
    """What processes have told so far, by the name of each; one that is not heard is held up."""

    def __init__(self, **managers: socket.socket) -> None:
        self.said: dict[str, list[str]] = {name: [] for name in managers}
        self._managers, self._selector = managers, selectors.DefaultSelector()
        for manager in managers.values():
            self._selector.register(manager, selectors.EVENT_READ)

    def hear(self) -> None:
        """Take all that is here."""
        for name, manager in self._managers.items():
            self.said[name] += told(manager)

    def until(self, who: str, words: str, what: str, times: int = 1) -> None:
        """Wait for lines with these words, those that came before included."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while sum(words in line for line in self.said[who]) < times:
            heard = self._selector.select(deadline - time.monotonic())
            assert heard, f"never happened: {what}"
            self.hear()

    def until_more(self, who: str, words: str, times: int, what: str) -> None:
        """Wait for so many from now on."""
        self.hear()
        self.until(who, words, what, times + sum(words in line for line in self.said[who]))

    def close(self) -> None:
        self._selector.close()


@pytest.mark.slow
def test_a_node_is_ready_once_logged_in_and_beats_also_while_a_long_task_runs(
    listen: Listen, experiment: Path, tmp_path: Path
) -> None:
    """Until it hangs: a stopped process is one whose loop does not turn."""
    run, managers = tmp_path / "run", {who: listen(who) for who in ("node", "centre")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    node = ["node", "--coordinator", endpoint, "--clients", "0-3", "--insecure", "--threads", "1"]
    centre = ["coordinator", "--experiment", str(experiment), "--directory", str(run)]
    centre += ["--bind", endpoint, "--insecure", "--set", "method.steps=100000"]
    with closing(Watch(**managers)) as watch, process(node, managers["node"], tmp_path) as pid:
        watch.until("node", "STATUS=looking for a coordinator", "the node looks")
        watch.until_more("node", "WATCHDOG=1", 3, "its loop turns meanwhile")
        assert "READY=1" not in watch.said["node"]
        with process(centre, managers["centre"], tmp_path):
            watch.until("node", "READY=1", "it logs in")
            watch.until("node", f"STATUS=run {run.name}", "it says which run")
            watch.until("node", "round 1, client", "it trains")
            watch.until_more("node", "WATCHDOG=1", 10, "its loop turns beside the task")
            with stopped(pid):
                watch.hear()  # what was told before it stopped
                before = len(watch.said["node"])
                watch.until_more("centre", "WATCHDOG=1", 5, "the coordinator's loop turns")
                assert len(watch.said["node"]) == before, "a node that hangs says nothing"
            watch.until_more("node", "WATCHDOG=1", 1, "it goes on")
            assert not lines(run / "metrics.jsonl")[1:], "all this was one task"
            os.kill(pid, signal.SIGTERM)
            watch.until("node", "STOPPING=1", "it is told to leave")
    assert watch.said["node"].count("READY=1") == 1


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A child of ours that stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "it has ended instead"
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_coordinator_is_ready_once_it_listens_and_says_how_far_it_is(
    manager: socket.socket, experiment: Path, tmp_path: Path
) -> None:
    centre = ["coordinator", "--experiment", str(experiment), "--directory", str(tmp_path / "run")]
    centre += ["--bind", "tcp://127.0.0.1:*", "--insecure", "--no-evaluator"]
    with closing(Watch(centre=manager)) as watch, process(centre, manager, tmp_path) as pid:
        watch.until("centre", "READY=1", "it listens")
        assert (tmp_path / "run" / "coordinator.json").exists()
        watch.until("centre", "STATUS=0 nodes, 0 of 2 rounds done", "it says so")
        watch.until_more("centre", "WATCHDOG=1", 2, "its loop turns")
        os.kill(pid, signal.SIGTERM)
        watch.until("centre", "STOPPING=1", "it ends")
