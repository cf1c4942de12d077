"""Control groups of hosts: what they may have of memory and processors, and what they have had.

Version 1 or 2, each controller where the kernel has it.  The groups of a lab lie side by side, not
in one of its own: version 2 counts a group's kills in the group around it too.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import LabError
from deploy.lab.network import kill

PERIOD_MICROSECONDS = 100_000
REMOVE_SECONDS = 10.0
CONTROLLERS = {"memory": "memory caps", "cpu": "processor quotas"}


@dataclass(frozen=True)
class Use:
    """What a host has taken; None where the kernel does not say.

    Attributes:
        memory: bytes now.
        peak: bytes at most.
        kills: processes ended for want of memory.
    """

    memory: int | None
    peak: int | None
    kills: int | None


@dataclass(frozen=True)
class _Place:
    base: Path
    version: int


class Groups:
    """The groups of one lab.

    Args:
        name: of the lab, in the names of all its groups.
        root: of the file system; tests make one of their own.
    """

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        self._name, self._root = name, root
        mounts = [line.split() for line in (root / "proc/self/mounts").read_text().splitlines()]
        self._mounts = [(Path(m[1]), m[2], m[3].split(",")) for m in mounts]
        self._places = {c: place for c in CONTROLLERS if (place := self._place(c))}

    def absent(self) -> list[str]:
        """What cannot be limited here, in words."""
        return [words for name, words in CONTROLLERS.items() if name not in self._places]

    def make(self, host: str, memory: int, cpus: float) -> list[Path]:
        """Make a host's groups.

        Args:
            host: its name.
            memory: bytes that it may have, swapped ones included; 0 is no cap.
            cpus: cores' time that it may have; 0 is no cap.

        Returns:
            The files that a process writes 0 to, to be in them with all that it starts.

        Raises:
            LabError: the kernel takes a value not.
        """
        settings = dict(self._settings(memory, cpus))
        groups = dict.fromkeys(self._group(host, place) for place in self._places.values())
        try:
            for group in groups:
                group.mkdir()
            for file, value in settings.items():
                place = self._places[file.partition(".")[0]]
                (self._group(host, place) / file).write_text(value)
        except OSError as error:
            raise LabError(f"{error.filename}: {error.strerror}") from error
        self._keep_from_swap(host, memory)
        return [group / "cgroup.procs" for group in groups]

    def use(self, host: str) -> Use:
        place = self._places.get("memory")
        if place is None:
            return Use(None, None, None)
        group = self._group(host, place)
        names = {
            1: ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
            2: ("memory.current", "memory.peak", "memory.events"),
        }
        now, peak, events = (_read(group / name) for name in names[place.version])
        kills = re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)
        return Use(_number(now), _number(peak), int(kills[1]) if kills else None)

    def remove(self) -> None:
        """Remove all of the lab, after those who are still in them.

        Raises:
            LabError: a process in one of them does not end.
        """
        deadline = time.monotonic() + REMOVE_SECONDS
        for group in self._groups():
            while group.exists():
                kill(int(pid) for pid in _read(group / "cgroup.procs").split())
                with contextlib.suppress(FileNotFoundError):
                    try:
                        group.rmdir()
                    except OSError as error:  # its processes are on their way out
                        if time.monotonic() > deadline:
                            raise LabError(f"{group}: {error.strerror}") from error
                        time.sleep(0.01)

    def _groups(self) -> Iterable[Path]:
        bases = dict.fromkeys(place.base for place in self._places.values())
        return [path for base in bases for path in base.glob(f"{self._name}-*")]

    def _group(self, host: str, place: _Place) -> Path:
        return place.base / f"{self._name}-{host}"

    def _settings(self, memory: int, cpus: float) -> Iterable[tuple[str, str]]:
        versions = {name: place.version for name, place in self._places.items()}
        quota = str(round(cpus * PERIOD_MICROSECONDS))
        if memory and "memory" in versions:
            yield {1: "memory.limit_in_bytes", 2: "memory.max"}[versions["memory"]], str(memory)
        if cpus and versions.get("cpu") == 1:
            yield "cpu.cfs_period_us", str(PERIOD_MICROSECONDS)
            yield "cpu.cfs_quota_us", quota
        if cpus and versions.get("cpu") == 2:
            yield "cpu.max", f"{quota} {PERIOD_MICROSECONDS}"

    def _keep_from_swap(self, host: str, memory: int) -> None:
        place = self._places.get("memory")
        if not memory or place is None:
            return
        file = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}[place.version]
        with contextlib.suppress(OSError):  # a kernel without swap has no such file
            (self._group(host, place) / file).write_text({1: str(memory), 2: "0"}[place.version])

    def _place(self, controller: str) -> _Place | None:
        for path, kind, options in self._mounts:
            base = self._root / path.relative_to("/")
            if kind == "cgroup" and controller in options:
                return _Place(base, 1)
            if kind == "cgroup2" and controller in _read(base / "cgroup.controllers").split():
                return _Place(base, 2) if _enable(base, controller) else None
        return None


def _enable(base: Path, controller: str) -> bool:
    """Whether groups of version 2 in a group are limited; not where it has processes itself."""
    control = base / "cgroup.subtree_control"
    if controller in _read(control).split():
        return True
    try:
        control.write_text(f"+{controller}")
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None
