"""A real lab on this machine: hosts of their own, whose limits hold, and which leave nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from deploy.lab.host import PYTHON
from tests.lab.emulated import NETWORK, Emulated, is_alive, marks, processes

pytestmark = marks(300)
LAB = f"""
[lab]
network = "{NETWORK}"
[lab.inventory]
venv = "/opt/venv"
[hosts.pi]
profiles = ["pi4", "wifi"]
[hosts.slow]
down = "1mbit"
up = "2mbit"
[hosts.small]
memory = "100MB"
inventory = {{ limits = {{ memory = "80MB" }} }}
[hosts.quarter]
cpus = 0.25
"""
NAMES = ["pi", "slow", "small", "quarter"]
SECOND = 125_000  # bytes of 1 Mbit/s


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    emulated = Emulated(tmp_path_factory.mktemp("lab") / "lab.toml")
    emulated.file.write_text(LAB)
    up = emulated.seedwire("up")
    try:
        assert up.returncode == 0, up.stderr
        yield emulated
    finally:
        assert emulated.seedwire("down").returncode == 0


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Emulated]:
    """A lab that is not up, beside the one that is."""
    emulated = Emulated(tmp_path / "lab.toml")
    emulated.file.write_text(LAB.replace(NETWORK, "198.18.77.0/24"))
    yield emulated
    emulated.seedwire("down")


def test_each_host_has_a_name_a_home_an_address_and_a_key_of_its_own(lab: Emulated) -> None:
    ask = "hostname; echo ~; pwd; hostname -I; cat /run/host/key.pub"
    said = [lab.says(name, ask).splitlines() for name in NAMES]
    names, homes, places, addresses, keys = zip(*said, strict=True)
    assert list(names) == NAMES
    assert homes == places
    assert len(set(homes)) == len(set(addresses)) == len(set(keys)) == len(NAMES)
    lab.says("pi", "touch ~/mine")
    assert "mine" not in lab.says("slow", "ls ~")


def test_a_host_sees_its_own_processes_and_none_of_this_machines_daemons(lab: Emulated) -> None:
    assert lab.says("pi", "readlink /proc/1/exe").endswith("sshd")
    assert lab.says("pi", "ls /run").split() == ["host", "lock", "mount", "sshd"]


def test_a_hosts_python_finds_our_packages(lab: Emulated) -> None:
    ask = "import sys, msgspec; print(sys.prefix == sys.base_prefix, msgspec.__version__)"
    assert lab.says("pi", f"{PYTHON} -c '{ask}'") == f"True {msgspec.__version__}"


def test_hosts_know_each_other_by_name_and_us_by_address(lab: Emulated) -> None:
    here = NETWORK.replace(".0/24", ".1")
    said = "exec 3<>/dev/tcp/slow/22; head -c 4 <&3"
    assert lab.says("pi", f"bash -c '{said}'") == "SSH-"
    assert here in lab.says("pi", "ip route get " + here)


def test_a_host_with_another_key_is_refused(lab: Emulated) -> None:
    known = lab.directory / "known_hosts"
    right = known.read_text()
    lines = right.splitlines()
    addresses, keys = zip(*(line.split(" ", 1) for line in lines), strict=True)
    try:
        rolled = zip(addresses, [*keys[1:], keys[0]], strict=True)
        known.write_text("".join(f"{a} {k}\n" for a, k in rolled))
        assert "verification failed" in lab.ssh("pi", "true").stderr
    finally:
        known.write_text(right)


def test_the_inventory_names_every_host_and_what_was_said_of_it(lab: Emulated) -> None:
    from deploy.inventory import load

    inventory = load(lab.directory / "cluster.toml")
    assert [(h.name, h.venv) for h in inventory.hosts] == [(n, "/opt/venv") for n in NAMES]
    assert inventory.host("small").limits.memory == "80MB"
    assert inventory.coordinator.address == f"tcp://{NETWORK.replace('.0/24', '.1')}:5555"


def test_a_process_over_the_hosts_memory_is_killed_and_its_sshd_lives(lab: Emulated) -> None:
    take = "python3 -c 'len(bytes(150 << 20).replace(bytes(1), b\"x\"))'; exit $?"
    assert lab.ssh("pi", take).returncode == 0
    assert lab.ssh("small", take).returncode == 128 + signal.SIGKILL
    row = lab.row("small")
    assert (row["state"], row["kills"], row["limit"]) == ("up", "1", "100MB")
    assert float(row["peak"].removesuffix("MB")) == pytest.approx(100, abs=1)
    assert lab.row("pi")["kills"] == "0"


def test_a_quota_of_processors_holds_for_all_that_runs_on_a_host(lab: Emulated) -> None:
    names = lab.says("quarter", "cat /proc/self/cgroup")
    group = next(line.split(":")[2] for line in names.splitlines() if line.endswith("-quarter"))
    quota = f"cat /sys/fs/cgroup{group}/cpu.max /sys/fs/cgroup/cpu*{group}/cpu.cfs_quota_us"
    assert lab.ssh("quarter", f"{quota} 2>/dev/null").stdout.split()[0] == "25000"
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    started = time.monotonic()
    lab.says("quarter", f"python3 -c '{burn}'")
    assert time.monotonic() - started > 0.5 / 0.25 - 0.2  # a busy machine only makes it longer


@pytest.mark.parametrize(("way", "mbit"), [("down", 1), ("up", 2)])
def test_a_cable_carries_its_rate_and_no_more(lab: Emulated, way: str, mbit: int) -> None:
    nbytes = 4 * SECOND
    line = ["ssh", "-F", str(lab.directory / "ssh_config"), "slow"]
    line += ["cat > /dev/null" if way == "down" else f"head -c {nbytes} /dev/zero"]
    started = time.monotonic()
    done = subprocess.run(line, input=bytes(nbytes), capture_output=True, check=True, timeout=120)
    seconds = time.monotonic() - started  # a busy machine only makes it longer
    assert seconds > 0.9 * nbytes / SECOND / mbit
    assert len(done.stdout) == (nbytes if way == "up" else 0)


def test_a_host_that_is_cut_off_is_silent_until_it_is_mended(lab: Emulated) -> None:
    assert lab.seedwire("cut", "pi").returncode == 0
    assert lab.row("pi")["state"] == "cut"
    quick = ["-o", "ConnectTimeout=1"]
    line = ["ssh", "-F", str(lab.directory / "ssh_config"), *quick, "pi", "true"]
    assert subprocess.run(line, capture_output=True, check=False, timeout=60).returncode == 255
    assert lab.says("slow", "hostname") == "slow"
    assert lab.seedwire("mend", "pi").returncode == 0
    assert lab.row("pi")["state"] == "up"
    assert lab.says("pi", "hostname") == "pi"


@pytest.mark.parametrize("command", ["cut", "mend"])
def test_a_host_that_there_is_not_is_named(lab: Emulated, command: str) -> None:
    done = lab.seedwire(command, "pie")
    assert (done.returncode, done.stderr) == (
        14,
        "seedwire: no host pie: there are pi, slow, small, quarter\n",
    )


def test_a_lab_that_is_up_is_not_made_again(lab: Emulated) -> None:
    done = lab.seedwire("up")
    assert done.returncode == 14
    assert "is a lab already: seedwire lab down comes first" in done.stderr
    assert lab.says("pi", "hostname") == "pi"


def test_a_network_that_is_in_use_is_refused(lab: Emulated, other: Emulated) -> None:
    other.file.write_text(LAB)
    done = other.seedwire("up")
    assert done.returncode == 14
    assert f"lab.network: {NETWORK} on swlab" in done.stderr
    assert not other.directory.exists()
    assert lab.says("pi", "hostname") == "pi"


def test_a_directory_that_is_not_a_labs_is_left_alone(other: Emulated) -> None:
    other.directory.mkdir()
    (other.directory / "thesis.txt").write_text("x")
    for command in ("up", "down"):
        done = other.seedwire(command)
        assert done.returncode == 14
        assert f"seedwire: {other.directory} is " in done.stderr
    assert [p.name for p in other.directory.iterdir()] == ["thesis.txt"]


def test_down_leaves_nothing_and_may_be_said_twice(other: Emulated) -> None:
    assert other.seedwire("up").returncode == 0
    other.says("pi", "nohup setsid sleep 1000 > /dev/null 2>&1 & cd /; sleep 1000 > ~/x 2>&1 &")
    assert len(other.things()) > len(NAMES)
    running = processes(other.directory)
    assert len(running) > 2 * len(NAMES)
    assert other.seedwire("down").returncode == 0
    assert not other.things()
    assert not [p for p in running if is_alive(p)]
    assert not processes(other.directory)
    assert [p.name for p in other.file.parent.iterdir()] == ["lab.toml"]
    assert other.seedwire("down").returncode == 0
    done = other.seedwire("status")
    assert (done.returncode, done.stderr) == (
        14,
        f"seedwire: {other.directory}: no lab is up here\n",
    )


def _end_at(moment: Callable[[Path], bool], lab: Emulated, number: signal.Signals) -> None:
    with subprocess.Popen(lab.command("up"), stderr=subprocess.DEVNULL) as up:
        while not moment(lab.directory):
            assert up.poll() is None
        up.send_signal(number)
        assert up.wait(60) == (-number if number == signal.SIGKILL else 130)


def record(directory: Path) -> bool:
    return (directory / "lab.json").exists()


def first_key(directory: Path) -> bool:
    return (directory / "id").exists()


def first_sshd(directory: Path) -> bool:
    return any(directory.glob("hosts/*/sshd.log"))


def last_sshd(directory: Path) -> bool:
    return (directory / "hosts/quarter/sshd.log").exists()


@pytest.mark.parametrize("moment", [record, first_key, first_sshd, last_sshd])
def test_an_up_that_is_killed_leaves_nothing_after_down(
    other: Emulated, moment: Callable[[Path], bool]
) -> None:
    _end_at(moment, other, signal.SIGKILL)
    assert other.directory.exists()
    assert other.seedwire("down").returncode == 0
    assert not other.things()
    assert not other.directory.exists()
    assert not processes(other.directory)


def test_an_up_that_is_interrupted_leaves_nothing(other: Emulated) -> None:
    _end_at(first_sshd, other, signal.SIGTERM)
    assert not other.things()
    assert not other.directory.exists()
    assert not processes(other.directory)


def test_down_leaves_nothing_though_the_labs_files_are_gone(other: Emulated) -> None:
    assert other.seedwire("up").returncode == 0
    shutil.rmtree(other.directory)
    assert other.things()
    assert other.seedwire("down").returncode == 0
    assert not other.things()
    assert not processes(other.directory)


def test_two_at_once_do_not_meet(other: Emulated) -> None:
    with subprocess.Popen(other.command("up"), stderr=subprocess.DEVNULL) as up:
        while not first_key(other.directory):
            assert up.poll() is None
        up.send_signal(signal.SIGSTOP)
        done = other.seedwire("down")
        up.send_signal(signal.SIGCONT)
        assert done.returncode == 14
        assert "another seedwire lab is at work there" in done.stderr
        assert up.wait(60) == 0
    assert other.says("pi", "hostname") == "pi"
    assert other.seedwire("down").returncode == 0
