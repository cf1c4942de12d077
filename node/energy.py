"""Joules, where the machine has a meter: counted by the hardware, or added up from power.

In order of preference: a command of the user's, the INA3221 of a Jetson, RAPL of Intel and AMD
processors, energy and then power sensors of hwmon; to the last three an NVIDIA GPU that
computes is added.  All of them count the whole board or processor, whoever uses it.  Without a
meter there is no figure; never zero.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from node import nvml
from node.files import number, text

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.25  # of power; an INA3221 averages over longer than a millisecond itself
COMMAND_SECONDS = 5.0
# names of the rail that feeds all others, by board; where there is one it is the sum
_INPUTS = ("VDD_IN", "VDD_SYS_IN", "POM_5V_IN", "CV_IN", "VIN_SYS_5V0")


class Counter(NamedTuple):
    """A file that counts microjoules and begins again at ``wrap``, or never where that is 0."""

    path: Path
    wrap: int


class Hardware:
    """Counters of the hardware, added up."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._last = [number(c.path) for c in counters]
        self._total = 0

    def joules(self) -> float | None:
        """Since this was made; None once a counter cannot be read."""
        for i, (path, wrap) in enumerate(self._counters):
            new, last = number(path), self._last[i]
            if new is None or last is None:
                self._last[i] = None
                return None
            self._total += new - last if new >= last else new - last + wrap
            self._last[i] = new
        return self._total / 1e6

    def close(self) -> None:
        """Nothing to end."""


class Sampled:
    """Power, added up by a thread that looks every ``SAMPLE_SECONDS``.

    Args:
        watts: what it is now, or None if it cannot be read.
        clock: a monotonic one.
    """

    def __init__(
        self, watts: Callable[[], float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watts, self._clock = watts, clock
        self._last: tuple[float, float] | None = None
        self._total, self._lost = 0.0, False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """Add the trapezium between the last look and this one."""
        with self._lock:
            watts, now = self._watts(), self._clock()
            if watts is None:
                self._lost = True
                return
            if self._last is not None:
                then, before = self._last
                self._total += (now - then) * (watts + before) / 2
            self._last = (now, watts)

    def joules(self) -> float | None:
        """Up to now; None once the power could not be read."""
        self.sample()
        return None if self._lost else self._total

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.sample()


class Command:
    """A command that prints the joules counted so far, e.g. of a meter in the socket."""

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)

    def joules(self) -> float | None:
        """What it prints, or None, with a line in the log, if that is no number."""
        try:
            done = subprocess.run(  # noqa: S603 - whoever starts the node names it
                self._command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
            )
            return float(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            log.warning("no joules from %s: %s", self._command[0], error)
            return None

    def close(self) -> None:
        """Nothing to end."""


class Both:
    """A processor and its GPU."""

    def __init__(self, processor: Hardware | Sampled, gpu: nvml.Gpu) -> None:
        self._meters = processor, gpu

    def joules(self) -> float | None:
        """Of the two together; None once one cannot be read."""
        processor, gpu = (meter.joules() for meter in self._meters)
        return None if processor is None or gpu is None else processor + gpu

    def close(self) -> None:
        for meter in self._meters:
            meter.close()


Meter = Hardware | Sampled | Command | nvml.Gpu | Both


def find(command: str = "", root: Path = Path("/"), device: str = "cpu") -> Meter | None:
    """The machine's meter, or None.

    Args:
        command: prints joules; goes before what the machine has itself.
        root: of the file system; tests make one of their own.
        device: that computes, as torch calls it.
    """
    if command:
        return Command(command)
    if rails := [*_ina3221(root), *_ina3221_iio(root)]:  # of the board, its GPU too
        return Sampled(lambda: _watts(rails))
    own, gpu = _processor(root), nvml.find(device)
    return Both(own, gpu) if own is not None and gpu is not None else own or gpu


def _processor(root: Path) -> Hardware | Sampled | None:
    """The meter of a processor, or whatever else there is."""
    for counters in (_rapl(root), _hwmon_energy(root)):
        if counters and all(number(c.path) is not None for c in counters):  # perhaps not for us
            return Hardware(counters)
    if rails := [Rail("", (path,), 1e-6) for path in _hwmon(root, "power*_input")]:
        return Sampled(lambda: _watts(rails))
    return None


class Rail(NamedTuple):
    """A supply: the product of what its files say, times ``scale``, is watts."""

    label: str
    paths: tuple[Path, ...]
    scale: float


def _watts(rails: Iterable[Rail]) -> float | None:
    total = 0.0
    for rail in rails:
        watts = rail.scale
        for path in rail.paths:
            if (factor := number(path)) is None:
                return None
            watts *= factor
        total += watts
    return total


def _ina3221(root: Path) -> list[Rail]:
    """Of a Jetson with JetPack 5 and later: hwmon, millivolts and milliamperes."""
    rails = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if text(chip / "name") != "ina3221":
            continue
        for volts in sorted(chip.glob("in*_input")):
            channel = volts.name.removeprefix("in").removesuffix("_input")
            amperes, label = chip / f"curr{channel}_input", text(chip / f"in{channel}_label")
            if amperes.exists() and label != "sum of shunt voltages":
                rails.append(Rail(label, (volts, amperes), 1e-6))
    return _whole(rails)


def _ina3221_iio(root: Path) -> list[Rail]:
    """Of a Jetson with JetPack 4: iio, milliwatts."""
    return _whole(
        [
            Rail(text(power.with_name(f"rail_name_{power.name[8:-6]}")), (power,), 1e-3)
            for power in sorted(
                root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/in_power*_input")
            )
        ]
    )


def _whole(rails: list[Rail]) -> list[Rail]:
    """The rail that feeds all others, if it is among them."""
    return [rail for rail in rails if rail.label in _INPUTS] or rails


def _rapl(root: Path) -> list[Counter]:
    """Each processor package, and its memory where that is counted apart."""
    counters = []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name = text(zone / "name")
        if name.startswith("package") or name == "dram":  # others are parts of a package
            wrap = number(zone / "max_energy_range_uj") or 0
            counters.append(Counter(zone / "energy_uj", wrap))
    return counters


def _hwmon_energy(root: Path) -> list[Counter]:
    return [Counter(path, 0) for path in _hwmon(root, "energy*_input")]


def _hwmon(root: Path, pattern: str) -> list[Path]:
    """Sensors of one chip: another one may measure the same again."""
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if found := [p for p in sorted(chip.glob(pattern)) if number(p) is not None]:
            return found
    return []
