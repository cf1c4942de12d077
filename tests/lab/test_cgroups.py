"""Control groups of both versions, in a file system of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import LabError
from deploy.lab.cgroups import Groups, Use


def tree(root: Path, mounts: dict[str, str]) -> Path:
    """A root whose ``/proc/self/mounts`` has these: options by path, "2" for version 2."""
    (root / "proc/self").mkdir(parents=True)
    lines = []
    for path, options in mounts.items():
        kind = "cgroup2" if options == "2" else "cgroup"
        lines.append(f"cgroup {path} {kind} rw,{options} 0 0\n")
        (root / path.lstrip("/")).mkdir(parents=True)
    (root / "proc/self/mounts").write_text("".join(lines))
    return root / "sys/fs/cgroup"


def test_version_1_has_a_group_for_each_controller(tmp_path: Path) -> None:
    base = tree(
        tmp_path, {"/sys/fs/cgroup/memory": "memory", "/sys/fs/cgroup/cpu,cpuacct": "cpu,cpuacct"}
    )
    groups = Groups("lab", tmp_path)
    assert groups.absent() == []
    memory, cpu = base / "memory/lab-a", base / "cpu,cpuacct/lab-a"
    assert groups.make("a", 300_000_000, 0.5) == [memory / "cgroup.procs", cpu / "cgroup.procs"]
    assert (memory / "memory.limit_in_bytes").read_text() == "300000000"
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == "300000000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "50000"
    (memory / "memory.usage_in_bytes").write_text("5\n")
    (memory / "memory.max_usage_in_bytes").write_text("7\n")
    (memory / "memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    assert groups.use("a") == Use(5, 7, 2)


def test_version_2_has_one_group_and_passes_its_controllers_on(tmp_path: Path) -> None:
    base = tree(tmp_path, {"/sys/fs/cgroup": "2"})
    (base / "cgroup.controllers").write_text("cpu io memory\n")
    (base / "cgroup.subtree_control").write_text("memory\n")
    groups = Groups("lab", tmp_path)
    assert (base / "cgroup.subtree_control").read_text() == "+cpu"
    assert groups.make("a", 300_000_000, 1.5) == [base / "lab-a/cgroup.procs"]
    assert (base / "lab-a/memory.max").read_text() == "300000000"
    assert (base / "lab-a/memory.swap.max").read_text() == "0"
    assert (base / "lab-a/cpu.max").read_text() == "150000 100000"
    (base / "lab-a/memory.current").write_text("5\n")
    (base / "lab-a/memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert groups.use("a") == Use(5, None, 2)


def test_a_hybrid_machine_has_its_controllers_where_they_are(tmp_path: Path) -> None:
    base = tree(tmp_path, {"/sys/fs/cgroup/memory": "memory", "/sys/fs/cgroup/unified": "2"})
    (base / "unified/cgroup.controllers").write_text("\n")
    groups = Groups("lab", tmp_path)
    assert groups.absent() == ["processor quotas"]
    assert groups.make("a", 1, 1.0) == [base / "memory/lab-a/cgroup.procs"]


def test_where_there_are_no_groups_nothing_is_capped_and_nothing_is_known(tmp_path: Path) -> None:
    tree(tmp_path, {})
    groups = Groups("lab", tmp_path)
    assert groups.absent() == ["memory caps", "processor quotas"]
    assert groups.make("a", 1, 1.0) == []
    assert groups.use("a") == Use(None, None, None)


def test_a_host_without_caps_has_groups_without_limits(tmp_path: Path) -> None:
    base = tree(tmp_path, {"/sys/fs/cgroup/memory": "memory"})
    Groups("lab", tmp_path).make("a", 0, 0.0)
    assert list((base / "memory/lab-a").iterdir()) == []


def test_removal_takes_the_labs_own_groups_alone(tmp_path: Path) -> None:
    base = tree(tmp_path, {"/sys/fs/cgroup/memory": "memory"})
    for name in ("lab-a", "lab-b", "lab2-a", "system"):
        (base / "memory" / name).mkdir()
    Groups("lab", tmp_path).remove()
    assert sorted(p.name for p in (base / "memory").iterdir()) == ["lab2-a", "system"]


def test_a_group_that_is_there_is_not_taken_over(tmp_path: Path) -> None:
    base = tree(tmp_path, {"/sys/fs/cgroup/memory": "memory"})
    (base / "memory/lab-a").mkdir()
    with pytest.raises(LabError, match="File exists"):
        Groups("lab", tmp_path).make("a", 1, 1.0)
