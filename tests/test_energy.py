"""Joules: from counters that wrap, from power over time, from a command; absent otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node import energy
from node.energy import Command, Hardware, Meter, Sampled

Tree = Callable[[dict[str, object]], Path]
RAPL = "sys/class/powercap/intel-rapl:"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def write(files: dict[str, object]) -> Path:
        for name, value in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
        return tmp_path

    return write


@pytest.fixture
def found() -> Iterator[Callable[[Path], Meter | None]]:
    """``energy.find``, and the end of every thread that it starts."""
    meters = []

    def find(root: Path) -> Meter | None:
        meters.append(energy.find(root=root))
        return meters[-1]

    yield find
    for meter in meters:
        if meter is not None:
            meter.close()


Find = Callable[[Path], Meter | None]


def test_a_machine_without_a_meter_has_none(tmp_path: Path, found: Find) -> None:
    assert found(tmp_path) is None


def test_rapl_adds_up_packages_and_memory_but_no_part_of_a_package(tree: Tree, found: Find) -> None:
    files: dict[str, object] = {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": 1_000_000}
    files |= {f"{RAPL}0:0/name": "core", f"{RAPL}0:0/energy_uj": 900}
    files |= {f"{RAPL}0:1/name": "dram", f"{RAPL}0:1/energy_uj": 500_000}
    files |= {f"{RAPL}1/name": "psys", f"{RAPL}1/energy_uj": 77}
    files |= {f"{RAPL}2/name": "package-1", f"{RAPL}2/energy_uj": 5}
    meter = found(tree(files))
    assert isinstance(meter, Hardware)
    assert meter.joules() == 0
    tree({f"{RAPL}0/energy_uj": 3_000_000, f"{RAPL}0:0/energy_uj": 9_000_000})
    tree({f"{RAPL}0:1/energy_uj": 750_000, f"{RAPL}1/energy_uj": 9_000_000})
    assert meter.joules() == pytest.approx(2.25)


def test_a_counter_that_begins_again_goes_on(tree: Tree, found: Find) -> None:
    files = {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": 9_000_000}
    meter = found(tree(files | {f"{RAPL}0/max_energy_range_uj": 10_000_000}))
    tree({f"{RAPL}0/energy_uj": 1_000_000})
    assert meter is not None
    assert meter.joules() == pytest.approx(2.0)
    tree({f"{RAPL}0/energy_uj": 1_500_000})
    assert meter.joules() == pytest.approx(2.5)


def test_a_counter_that_cannot_be_read_is_no_meter_and_never_zero(tree: Tree, found: Find) -> None:
    """As RAPL is for all but root."""
    assert found(tree({f"{RAPL}0/name": "package-0"})) is None
    meter = found(tree({f"{RAPL}0/energy_uj": 5}))
    os.remove(tree({}) / f"{RAPL}0/energy_uj")
    assert meter is not None
    assert meter.joules() is None
    tree({f"{RAPL}0/energy_uj": 5_000_000})
    assert meter.joules() is None  # what passed in between is not known


INA = "sys/class/hwmon/hwmon3/"


def test_a_jetsons_input_rail_is_the_whole_board(tree: Tree, found: Find) -> None:
    files = {f"{INA}name": "ina3221", f"{INA}in1_label": "VDD_IN", f"{INA}in1_input": 5000}
    files |= {f"{INA}curr1_input": 2000, f"{INA}in2_label": "VDD_CPU_GPU_CV"}
    files |= {f"{INA}in2_input": 5000, f"{INA}curr2_input": 400}
    files |= {f"{INA}in7_label": "sum of shunt voltages", f"{INA}in7_input": 80}
    root = tree(files)
    assert energy._watts(energy._ina3221(root)) == pytest.approx(10.0)
    assert isinstance(found(root), Sampled)
    tree({f"{INA}in1_label": "VDD_GPU"})  # without it, the sum of the rails
    assert energy._watts(energy._ina3221(root)) == pytest.approx(12.0)


def test_a_jetson_with_jetpack_4(tree: Tree) -> None:
    device = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
    files = {f"{device}rail_name_0": "VDD_IN", f"{device}in_power0_input": 4500}
    files |= {f"{device}rail_name_1": "VDD_GPU", f"{device}in_power1_input": 900}
    assert energy._watts(energy._ina3221_iio(tree(files))) == pytest.approx(4.5)


def test_hwmon_counts_or_is_added_up(tree: Tree, found: Find) -> None:
    root = tree({"sys/class/hwmon/hwmon0/power1_input": 3_000_000})
    assert isinstance(found(root), Sampled)
    tree({"sys/class/hwmon/hwmon1/energy1_input": 1})
    assert isinstance(found(root), Hardware)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_power_is_added_up_as_trapezia() -> None:
    clock, power = Clock(), [2.0]
    meter = Sampled(lambda: power[0], clock)
    meter.close()  # its thread: this test looks by hand
    assert meter.joules() == 0
    clock.now, power[0] = 2.0, 4.0
    assert meter.joules() == pytest.approx(6.0)
    clock.now = 3.0
    assert meter.joules() == pytest.approx(10.0)


def test_power_that_is_lost_once_makes_the_sum_unknown() -> None:
    power: list[float | None] = [2.0]
    meter = Sampled(lambda: power[0])
    meter.close()
    power[0] = None
    assert meter.joules() is None
    power[0] = 2.0
    assert meter.joules() is None


def test_a_command_says_how_many(tmp_path: Path) -> None:
    meter = energy.find("echo 12.5", tmp_path)
    assert isinstance(meter, Command)
    assert meter.joules() == 12.5


@pytest.mark.parametrize("command", ["echo many", "false", "/no/such/command"])
def test_a_command_that_says_nothing_is_absent(
    command: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Command(command).joules() is None
    assert "no joules from" in caplog.text


# --- NVML ------------------------------------------------------------------------


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int | str, int | None]:
    """Millijoules by index and UUID, as a stand-in for NVML says them; None does not count."""
    counts: dict[int | str, int | None] = {}

    def handle(which: int | str) -> int | str:
        if which not in counts:
            raise NVMLError("Invalid Argument")
        return which

    def count(which: int | str) -> int:
        if (found := counts[which]) is None:
            raise NVMLError("Not Supported")
        return found

    library: Any = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None)
    library.nvmlDeviceGetHandleByIndex = library.nvmlDeviceGetHandleByUUID = handle
    library.nvmlDeviceGetTotalEnergyConsumption = count
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return counts


def test_a_gpu_that_computes_is_metered_and_one_that_does_not_is_not(
    gpus: dict[int | str, int | None], tmp_path: Path
) -> None:
    gpus |= {0: 5_000, 1: 70_000}
    assert energy.find(root=tmp_path) is None
    meter = energy.find(root=tmp_path, device="cuda:1")
    assert meter is not None
    gpus |= {0: 6_000, 1: 71_500}
    assert meter.joules() == 1.5
    gpus[1] = None
    assert meter.joules() is None


def test_a_processor_and_its_gpu_are_added_up(
    gpus: dict[int | str, int | None], tree: Tree
) -> None:
    gpus[0] = 0
    root = tree({f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": 1_000_000})
    meter = energy.find(root=root, device="cuda")
    assert meter is not None
    tree({f"{RAPL}0/energy_uj": 3_000_000})
    gpus[0] = 500
    assert meter.joules() == pytest.approx(2.5)
    gpus[0] = None
    assert meter.joules() is None
    meter.close()


@pytest.mark.parametrize(("visible", "which"), [("3,1", 1), ("0, GPU-ab", "GPU-ab")])
def test_a_device_is_the_one_that_torch_is_let_see(
    gpus: dict[int | str, int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    which: int | str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus |= {0: 1, 3: 1, which: 2}
    meter = energy.find(root=tmp_path, device="cuda:1")
    gpus[which] = 1002
    assert meter is not None
    assert meter.joules() == 1.0


def test_a_gpu_that_does_not_count_is_absent_and_so_is_one_without_the_package(
    gpus: dict[int | str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert energy.find(root=tmp_path, device="cuda") is None
    gpus[0] = None
    assert energy.find(root=tmp_path, device="cuda") is None
    gpus[0] = 1
    assert energy.find(root=tmp_path, device="cuda") is not None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.find(root=tmp_path, device="cuda") is None
