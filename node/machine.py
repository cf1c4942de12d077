"""What the machine says of this process and of itself; what it does not say is None, never zero.

Shared and swapped memory, the limit of the control group, temperature, throttling.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from node.files import number, text
from protocol.parts import Vitals
from protocol.tcp import Traffic

_NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as a number near 2^63
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_PI_PATH = "sys/devices/platform/soc/soc:firmware/get_throttled"
_COUNTS = (
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)
_ALWAYS_HOT = "PMIC-Die"  # a Jetson's zone that says 100 degrees whatever happens


class Group(NamedTuple):
    """The memory control group that this process is in.

    Attributes:
        peak: bytes at most, of all its processes, since it was made.
        limit: bytes that it may have, the lowest of it and the groups around it.
        kills: processes that the kernel has killed for want of memory, in it or, of version 2,
            in the group around it.
    """

    peak: int | None
    limit: int | None
    kills: int | None


class Machine:
    """Reads the files of one root; tests make one of their own."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._sticky, self._count = self._pi_bits() >> 16, self._num_throttled()

    def pss_bytes(self) -> int | None:
        """Resident memory with pages that several processes share counted in shares."""
        return self._kib("proc/self/smaps_rollup", "Pss")

    def swap_bytes(self) -> int | None:
        return self._kib("proc/self/status", "VmSwap")

    def nvmap_bytes(self) -> int | None:
        """On a Jetson: memory that this process holds for its GPU, which is not in its resident.

        Lines are ``user PROCESS PID SIZEK``, and a total; a process may have several.
        """
        clients = self._read("sys/kernel/debug/nvmap/iovmm/clients")  # for root alone
        sizes = re.findall(rf"^user\s.*\s{os.getpid()}\s+(\d+)K$", clients, re.MULTILINE)
        return 1024 * sum(map(int, sizes)) if clients else None

    def group(self) -> Group:
        """Of version 2 or 1, whichever rules memory here."""
        for line in self._read("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                return self._group_v1(path)
        found = re.search(r"^0::(.*)$", self._read("proc/self/cgroup"), re.MULTILINE)
        return self._group_v2(found[1]) if found else Group(None, None, None)

    def celsius(self) -> float | None:
        """Of the hottest place that has a sensor."""
        zones = self._root.glob("sys/class/thermal/thermal_zone*")
        found = [number(z / "temp") for z in zones if text(z / "type") != _ALWAYS_HOT]
        if not any(found):
            found = [number(p) for p in self._root.glob("sys/class/hwmon/hwmon*/temp*_input")]
        return max((n / 1000 for n in found if n is not None), default=None)

    def throttled(self) -> str | None:
        """Why it has run slower than it can since this was made; "" if it has not.

        Returns:
            None where the machine does not say.
        """
        bits = self._pi_bits()
        if bits >= 0:
            since = bits | bits >> 16 & ~self._sticky
            return ", ".join(flag for i, flag in enumerate(_PI_FLAGS) if since >> i & 1)
        count = self._num_throttled()
        if count is None or self._count is None:
            return None
        return "throttled" if count > self._count else ""

    def vitals(self, traffic: Traffic | None) -> Vitals:
        """All of it, with what the kernel says of our connections."""
        return Vitals(
            pss=self.pss_bytes(),
            swap=self.swap_bytes(),
            group_peak=self.group().peak,
            is_unified=self.is_unified(),
            nvmap=self.nvmap_bytes(),
            celsius=self.celsius(),
            throttled=self.throttled(),
            sent=traffic.sent if traffic else None,
            received=traffic.received if traffic else None,
            resent=traffic.resent if traffic else None,
            rtt=traffic.rtt_seconds if traffic else None,
        )

    def is_unified(self) -> bool:
        """Whether processor and CUDA device share one memory: NVIDIA's Tegra boards."""
        return "tegra" in self._read("proc/device-tree/compatible")

    def _pi_bits(self) -> int:
        """Of a Raspberry Pi's firmware: 0 to 3 now, 16 to 19 since it was started; -1 elsewhere."""
        said = self._read(_PI_PATH)
        if not said and self._root == Path("/") and (tool := shutil.which("vcgencmd")):
            command = [tool, "get_throttled"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            said = done.stdout.partition("=")[2].strip()
        try:
            return int(said, 16)
        except ValueError:
            return -1

    def _num_throttled(self) -> int | None:
        """Times that a processor was slowed by heat, or a Jetson by its current."""
        found = [number(path) for pattern in _COUNTS for path in self._root.glob(pattern)]
        known = [n for n in found if n is not None]
        return sum(known) if known else None

    def _group_v2(self, path: str) -> Group:
        base = self._root / "sys/fs/cgroup"
        base = base if (base / "cgroup.controllers").exists() else base / "unified"
        here = _inside(base, path, "memory.current")
        # systemd makes a service's group anew when it starts it again; the one around it stays,
        # and counts the same events
        around = here.parent if (here.parent / "memory.events").exists() else here
        events = re.search(r"^oom_kill (\d+)$", text(around / "memory.events"), re.MULTILINE)
        return Group(
            number(here / "memory.peak"),
            _lowest(base, here, "memory.max"),
            int(events[1]) if events else None,
        )

    def _group_v1(self, path: str) -> Group:
        base = self._root / "sys/fs/cgroup/memory"
        here = _inside(base, path, "memory.usage_in_bytes")
        kills = re.search(r"^oom_kill (\d+)$", text(here / "memory.oom_control"), re.MULTILINE)
        return Group(
            number(here / "memory.max_usage_in_bytes"),
            _lowest(base, here, "memory.limit_in_bytes"),
            int(kills[1]) if kills else None,
        )

    def _kib(self, path: str, field: str) -> int | None:
        match = re.search(rf"^{field}:\s+(\d+) kB", self._read(path), re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    def _read(self, path: str) -> str:
        return text(self._root / path)


def _inside(base: Path, path: str, file: str) -> Path:
    """The group's directory; in a container its own group is mounted as the root of all."""
    here = base / path.lstrip("/")
    return here if (here / file).exists() else base


def _lowest(base: Path, here: Path, file: str) -> int | None:
    around = [here, *(p for p in here.parents if p.is_relative_to(base))]
    limits = [n for p in around if (n := number(p / file)) is not None and n < _NO_LIMIT]
    return min(limits, default=None)
