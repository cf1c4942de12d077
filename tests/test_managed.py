"""Nodes under a host's systemd: the real shell commands, with a stand-in for ``systemctl``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from typer.testing import CliRunner

from deploy import nodes
from deploy.cluster_cli import cluster_app
from deploy.errors import HostError
from deploy.hosts import Host, Limits
from deploy.nodes import Launch, NodeError
from deploy.ssh import Done, Remote, quote
from tests.sshd import ROOT, inventory, sshd

# It notes what it is asked; what it answers to `show` and `is-active` lies in files.
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$HOME/asked"
case "$*" in
  *show*) cat "$HOME/shown" ;;
  *is-active*) exit $(cat "$HOME/is-active") ;;
  *stop*) : > "$HOME/shown" ;;
esac
"""
ACTIVE = "ActiveState=active\nStatusText=run a/1: waiting for work\nMainPID=77\nMemoryCurrent=9\n"


def stand_ins(tools: Path) -> None:
    """A directory for PATH."""
    tools.mkdir()
    sudo = '#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n'
    for name, text in {"systemctl": SYSTEMCTL, "loginctl": SYSTEMCTL, "sudo": sudo}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)


class Board(Remote):
    """A host whose commands run here, by a shell, in a home of their own."""

    def __init__(self, home: Path, host: Host) -> None:
        super().__init__(host)
        self.home = home
        stand_ins(home / "tools")
        self.says(ACTIVE, 0)

    def says(self, shown: str, is_active: int) -> None:
        (self.home / "shown").write_text(shown)
        (self.home / "is-active").write_text(str(is_active))

    def was_started_by(self, whose: str) -> None:
        (self.home / ".seedwire/run").mkdir(parents=True)
        (self.home / ".seedwire/run/pi-1.systemd").write_text(whose)

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        check: bool = False,
    ) -> Done:
        line = " ".join(quote(word) for word in command)
        tools = f"{self.home / 'tools'}:{os.environ['PATH']}"
        env = os.environ | {"HOME": str(self.home), "PATH": tools}
        done = subprocess.run(
            ["/bin/sh", "-c", line], input=stdin or b"", env=env, capture_output=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def text(self, path: str) -> str:
        return (self.home / path).read_text()


def board(
    home: Path,
    limits: Limits | None = None,
    systemd: Literal["", "user", "system"] = "user",
) -> Board:
    host = Host(
        name="pi-1",
        address="a",
        directory="~/.seedwire",
        python=sys.executable,
        systemd=systemd,
        limits=limits or Limits(),
    )
    return Board(home, host)


LAUNCH = Launch("tcp://192.0.2.1:5555", {"pi-1": "0-3"}, None)
UNIT = ".config/systemd/user/seedwire-node@"


def test_up_writes_the_unit_its_variables_and_the_limit_and_starts_it(tmp_path: Path) -> None:
    pi, said = board(tmp_path, Limits(memory="1.5GB", seconds=60.0)), list[str]()
    status = nodes.start(pi, LAUNCH, said.append, within=5.0)
    assert (status.is_running, status.pid, status.memory) == (True, 77, 9)
    assert status.line == "run a/1: waiting for work"
    assert said == ["starting", "logged in, clients 0-3"]
    variables = pi.text(".seedwire/run/pi-1.env")
    assert 'COORDINATOR="tcp://192.0.2.1:5555"\nCLIENTS="0-3"\n' in variables
    assert "--max-memory 1.5GB --max-seconds 60.0 --insecure" in variables
    assert "--state" not in variables
    assert f"{tmp_path}/.seedwire/venv/bin/seedwire node" in pi.text(f"{UNIT}.service")
    local = pi.text(f"{UNIT}pi-1.service.d/host.conf")
    assert "MemoryMax=1500000000\n" in local
    assert f"append:{tmp_path}/.seedwire/logs/pi-1.log" in local
    asked = pi.text("asked").splitlines()
    wanted = ["enable-linger", "--user daemon-reload"]
    wanted += ["--user start --no-block seedwire-node@pi-1.service"]
    assert [line for line in asked if "show" not in line][:3] == wanted
    assert pi.text(".seedwire/run/pi-1.systemd") == "user"


def test_a_node_that_ends_at_once_or_does_not_log_in_is_named(tmp_path: Path) -> None:
    pi = board(tmp_path)
    pi.says("ActiveState=failed\nExecMainCode=1\nExecMainStatus=10\n", 3)
    with pytest.raises(NodeError, match="ended with exit code 10") as caught:
        nodes.start(pi, LAUNCH, lambda text: None, within=0.0)
    assert caught.value.code == 10
    pi.says("ActiveState=activating\nStatusText=looking for a coordinator\n", 3)
    with pytest.raises(HostError, match="has not logged in within 0 s: looking for"):
        nodes.start(pi, LAUNCH, lambda text: None, within=0.0)


@pytest.mark.parametrize(
    ("shown", "state", "code"),
    [
        ("ActiveState=inactive\nExecMainCode=0\n", "absent", None),
        ("ActiveState=inactive\nExecMainCode=1\nExecMainStatus=0\n", "ended", 0),
        ("ActiveState=failed\nExecMainCode=2\nExecMainStatus=9\n", "ended", 137),
        ("ActiveState=activating\nExecMainCode=2\nExecMainStatus=9\n", "running", None),
    ],
)
def test_what_systemd_says_is_what_the_cluster_sees(
    tmp_path: Path, shown: str, state: str, code: int | None
) -> None:
    pi = board(tmp_path)
    pi.was_started_by("user")
    pi.says(shown, 0)
    status = nodes.status(pi)
    assert (status.state, status.code) == (state, code)


def test_down_stops_what_was_started_and_asks_for_nothing_where_nothing_was(tmp_path: Path) -> None:
    pi, said = board(tmp_path), list[str]()
    pi.was_started_by("user")
    assert nodes.stop(pi, said.append).was == "running"
    assert "--user stop seedwire-node@pi-1.service" in pi.text("asked")
    assert nodes.stop(pi, said.append).was == "absent"
    assert said == ["stopped", "nothing ran"]
    assert pi.text("asked").count("--user stop") == 1


def test_who_looks_later_need_not_know_that_it_was_systemd(tmp_path: Path) -> None:
    """``up --systemd`` says so for one command; the inventory says nothing of it."""
    pi = board(tmp_path, systemd="")
    pi.was_started_by("system")
    assert (nodes.status(pi).pid, nodes.status(pi).systemd) == (77, "system")
    assert nodes.start(pi, LAUNCH, lambda text: None, within=5.0).systemd == "system"
    nodes.stop(pi, lambda text: None)
    assert "stop seedwire-node@pi-1.service" in pi.text("asked").splitlines()
    assert nodes.status(pi).systemd == ""


def test_a_node_that_runs_without_systemd_is_not_started_a_second_time(tmp_path: Path) -> None:
    python = tmp_path / ".seedwire/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho {nodes.LOGGED_IN} r/1\nexec sleep 1000\n")
    python.chmod(0o755)
    pi, said = board(tmp_path, systemd=""), list[str]()
    first = nodes.start(pi, LAUNCH, lambda text: None, within=30.0)
    try:
        pi.host = msgspec.structs.replace(pi.host, systemd="user")
        again = nodes.start(pi, LAUNCH, said.append, within=30.0)
        assert (again.pid, again.systemd, said[-1]) == (first.pid, "", "ran already")
        assert not (tmp_path / "asked").exists()
    finally:
        assert nodes.stop(pi, lambda text: None).was == "running"


def test_a_host_without_systemd_is_left_as_it_is(tmp_path: Path) -> None:
    pi = board(tmp_path)
    (tmp_path / "tools/systemctl").write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    with pytest.raises(HostError, match="systemctl show: no bus"):
        nodes.start(pi, LAUNCH, lambda text: None, within=0.0)
    assert not (tmp_path / ".config").exists()
    assert nodes.stop(pi, lambda text: None).was == "absent"


@pytest.mark.net
@pytest.mark.slow
def test_the_flag_is_needed_only_to_start(tmp_path: Path) -> None:
    """The commands, over a real sshd, of an inventory that says nothing of systemd."""
    tools, home = tmp_path / "tools", tmp_path / "ssh/home"
    stand_ins(tools)
    env = {"PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}"}
    with sshd(tmp_path / "ssh", env) as config:
        file = inventory(tmp_path, config, "a")
        (home / "shown").write_text(ACTIVE)
        (home / "is-active").write_text("0")

        def cluster(*words: str) -> str:
            done = CliRunner().invoke(cluster_app, [*words, "--inventory", str(file)])
            assert done.exit_code == 0, done.output
            return done.stdout + done.stderr

        said = cluster("up", "--clients", "2", "--insecure", "--systemd", "user")
        assert "a: logged in, clients 0-1" in said
        assert (home / ".config/systemd/user/seedwire-node@.service").exists()
        (row,) = json.loads(cluster("status", "--format", "json"))
        assert (row["state"], row["pid"]) == ("running", 77)
        assert "a: stopped" in cluster("down")
        assert "--user stop seedwire-node@a.service" in (home / "asked").read_text()
        assert "a: nothing ran" in cluster("down")
