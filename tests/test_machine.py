"""What a machine says of itself, read from trees of files as boards and kernels have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from node.machine import Group, Machine
from protocol.parts import Vitals
from protocol.tcp import Traffic

Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes files below a root, which it returns."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_machine_that_says_nothing_is_absent_everywhere(tmp_path: Path) -> None:
    assert Machine(tmp_path).vitals(None) == Vitals()
    assert Machine(tmp_path).group() == Group(None, None, None)


def test_shared_pages_and_swap_are_in_kibibytes(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/smaps_rollup": "5-7 [rollup]\nRss:  900 kB\nPss:   300 kB\nPss_Anon: 1 kB\n",
            "proc/self/status": "Name:\tx\nVmSwap:\t     12 kB\n",
        }
    )
    vitals = Machine(root).vitals(Traffic(1, 2, 3, 0.5, 1))
    assert vitals == Vitals(pss=300 * 1024, swap=12 * 1024, sent=1, received=2, resent=3, rtt=0.5)


V2 = {
    "proc/self/cgroup": "0::/user.slice/node.service\n",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
    "sys/fs/cgroup/user.slice/memory.max": "800\n",
    "sys/fs/cgroup/user.slice/node.service/memory.current": "100\n",
    "sys/fs/cgroup/user.slice/node.service/memory.peak": "700\n",
    "sys/fs/cgroup/user.slice/node.service/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/node.service/memory.events": "low 0\noom 9\noom_kill 2\n",
}
V1 = {
    "proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/node\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/node/memory.usage_in_bytes": "5\n",
    "sys/fs/cgroup/memory/node/memory.max_usage_in_bytes": "600\n",
    "sys/fs/cgroup/memory/node/memory.limit_in_bytes": "900\n",
    "sys/fs/cgroup/memory/node/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}


def test_the_control_group_of_version_2_with_the_limit_of_the_one_around_it(tree: Tree) -> None:
    assert Machine(tree(V2)).group() == Group(700, 800, 2)


def test_a_service_that_is_started_again_has_a_new_group_and_the_old_count(tree: Tree) -> None:
    files = V2 | {"sys/fs/cgroup/user.slice/memory.events": "oom 9\noom_kill 5\n"}
    assert Machine(tree(files)).group().kills == 5


def test_the_control_group_of_version_1(tree: Tree) -> None:
    assert Machine(tree(V1)).group() == Group(600, 900, 3)


def test_a_container_sees_its_own_group_as_the_root(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "0::/../../docker/5f\n",
            "sys/fs/cgroup/cgroup.controllers": "memory\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.peak": "10\n",
        }
    )
    assert Machine(root).group() == Group(10, 1000, None)


def test_no_limit_is_no_number(tree: Tree) -> None:
    files = V1 | {"sys/fs/cgroup/memory/node/memory.limit_in_bytes": "9223372036854771712\n"}
    assert Machine(tree(files)).group().limit is None


def test_the_hottest_sensor_counts_but_not_the_one_that_is_always_hot(tree: Tree) -> None:
    zone = "sys/class/thermal/thermal_zone"
    files = {f"{zone}0/temp": "45500\n", f"{zone}1/temp": "51000\n", f"{zone}2/temp": "100000\n"}
    files |= {f"{zone}2/type": "PMIC-Die\n", f"{zone}3/type": "broken\n"}
    assert Machine(tree(files)).celsius() == 51.0


def test_without_thermal_zones_hwmon_is_asked(tree: Tree) -> None:
    files = {"sys/class/hwmon/hwmon0/temp1_input": "38000\n"}
    assert Machine(tree(files)).celsius() == 38.0


PI = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_a_raspberry_pi_says_why_it_was_throttled_since_the_node_started(tree: Tree) -> None:
    machine = Machine(tree({PI: "10000\n"}))  # under-voltage once, before
    assert machine.throttled() == ""
    tree({PI: "50000\n"})  # throttled in between, over by now
    assert machine.throttled() == "throttled"
    tree({PI: "0x50005"})  # and both at this moment
    assert machine.throttled() == "under-voltage, throttled"


@pytest.mark.parametrize(
    "path",
    [
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count",
        "sys/class/hwmon/hwmon4/oc2_event_cnt",
    ],
)
def test_a_count_that_has_risen_is_throttling(tree: Tree, path: str) -> None:
    machine = Machine(tree({path: "7\n"}))
    assert machine.throttled() == ""
    tree({path: "8\n"})
    assert machine.throttled() == "throttled"


def test_a_jetson_has_one_memory(tree: Tree) -> None:
    assert Machine(
        tree({"proc/device-tree/compatible": "nvidia,p3768\0nvidia,tegra234\0"})
    ).is_unified()


CLIENTS = """CLIENT                        PROCESS      PID        SIZE
user                     gnome-shell     {other}      20480K
user                         python3     {own}      66820K
user                   python3 {own}     {other}       9999K
user                         python3     {own}         12K
total                                                   97311K
"""


def test_a_jetson_says_what_this_process_holds_for_its_gpu(tree: Tree) -> None:
    """As nvmap's debugfs writes it; a name may have spaces and numbers in it."""
    path, own = "sys/kernel/debug/nvmap/iovmm/clients", os.getpid()
    machine = Machine(tree({path: CLIENTS.format(own=own, other=10 * own)}))
    assert machine.nvmap_bytes() == machine.vitals(None).nvmap == (66820 + 12) * 1024
    tree({path: CLIENTS.format(own=own + 1, other=10 * own)})
    assert machine.nvmap_bytes() == 0  # it holds none, and that is known


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux before 4.14")
def test_of_this_process_the_shared_part_is_not_more_than_all() -> None:
    pss = Machine().pss_bytes()
    assert pss is not None
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 0 < pss < 1.2 * resident


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(
    not os.access(GROUPS / "cgroup.procs", os.W_OK), reason="needs cgroup v1 and to be root"
)
def test_a_process_that_the_kernel_kills_at_its_limit_is_in_the_groups_count() -> None:
    group = GROUPS / f"seedwire-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
        say = "from node.machine import Machine; print(*Machine().group())"
        eat = f"open('{group}/cgroup.procs', 'w').write('0')\n{{}}"
        before = subprocess.run(
            [sys.executable, "-c", eat.format(say)], capture_output=True, text=True, check=True
        )
        _, limit, kills = before.stdout.split()
        assert (int(limit), int(kills)) == (64 << 20, 0)
        killed = subprocess.run(
            [sys.executable, "-c", eat.format("x = b'1' * (1 << 28)")], check=False
        )
        assert killed.returncode == -9
        after = subprocess.run(
            [sys.executable, "-c", eat.format(say)], capture_output=True, text=True, check=True
        )
        peak, limit, kills = after.stdout.split()
        assert int(kills) == 1
        assert int(peak) <= int(limit) == 64 << 20
    finally:
        group.rmdir()
