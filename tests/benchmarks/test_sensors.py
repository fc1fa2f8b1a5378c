"""The reading of clocks, power and temperature, from a stand-in for nvidia-ml-py."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import sensors
from benchmarks.sensors import Reading, Sensors

GPU = torch.device("cuda")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pynvml for one GPU of a machine of two."""
    module: Any = ModuleType("pynvml")
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlInit = lambda: None
    module.nvmlSystemGetDriverVersion = lambda: b"580.159.04"
    module.nvmlDeviceGetHandleByUUID = {"GPU-abc": "second"}.__getitem__
    module.nvmlDeviceGetHandleByIndex = lambda index: "first"
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 2619}[kind]
    module.nvmlDeviceGetMaxClockInfo = lambda handle, kind: 1980
    module.nvmlDeviceGetPowerUsage = lambda handle: {"second": 431_500}[handle]
    module.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    module.nvmlDeviceGetTemperature = lambda handle, kind: 54
    module.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x1 | 0x4 | 0x20
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return module


def test_reads(nvml: Any) -> None:
    sensor = Sensors(GPU)
    assert sensor.driver == "580.159.04"
    assert sensor.read() == Reading(sm_mhz=1980, memory_mhz=2619, power_w=431.5, temperature_c=54, slowed=0x25)
    assert sensor.limits() == {"max_sm_mhz": 1980, "power_limit_w": 700.0}


def test_older_names(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before driver 535 the reasons had another name; before torch 2.4 a device had no UUID."""
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x8
    del nvml.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    nvml.nvmlDeviceGetPowerUsage = lambda handle: {"first": 1000}[handle]
    assert Sensors(GPU).read() == Reading(sm_mhz=1980, memory_mhz=2619, power_w=1.0, temperature_c=54, slowed=0x8)


def test_what_cannot_be_read_is_none(nvml: Any) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("not supported")

    nvml.nvmlDeviceGetPowerUsage = refuses
    del nvml.nvmlDeviceGetTemperature
    assert Sensors(GPU).read() == Reading(sm_mhz=1980, memory_mhz=2619, slowed=0x25)
    nvml.nvmlInit = refuses
    assert Sensors(GPU).read() == Reading()
    assert Sensors(GPU).driver is None
    assert Sensors(GPU).limits() == {"max_sm_mhz": None, "power_limit_w": None}


def test_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for device in (GPU, torch.device("cpu")):
        sensor, readings = Sensors(device), list[Reading]()
        with sensor.watch(readings):
            pass
        assert (sensor.read(), sensor.driver, readings) == (Reading(), None, [])


def test_watches(nvml: Any) -> None:
    readings, clocks = list[Reading](), iter(range(1000, 100_000))
    nvml.nvmlDeviceGetClockInfo = lambda handle, kind: next(clocks)
    sensor = Sensors(GPU)
    with sensor.watch(readings):
        time.sleep(20 * sensors.PERIOD)
    many = len(readings)
    assert many > 3
    time.sleep(3 * sensors.PERIOD)
    assert len(readings) == many
    with pytest.raises(KeyError), sensor.watch(readings):
        raise KeyError


def test_columns() -> None:
    during = [
        Reading(sm_mhz=mhz, power_w=watts, slowed=bits) for mhz, watts, bits in ((1, 9.0, 1), (5, 7.0, 6), (2, 8.0, 0))
    ]
    row = sensors.columns(Reading(sm_mhz=345, temperature_c=30), during)
    assert (row["sm_mhz"], row["power_w"], row["memory_mhz"], row["readings"]) == (2, 8.0, None, 3)
    assert row["slowed"] == "application clocks; power cap"
    assert (row["sm_mhz_before"], row["power_w_before"], row["temperature_c_before"]) == (345, None, 30)
    assert sensors.columns(Reading(), [])["slowed"] is None
    assert sensors.columns(Reading(), [Reading(slowed=1)])["slowed"] == ""
