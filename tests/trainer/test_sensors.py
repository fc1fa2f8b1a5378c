"""Columns of the machine; NVML is stood in for, since GPUs are elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pacenote.trainer import sensors


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pynvml of a machine with two GPUs, the second of which has no power sensor."""
    module: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def power(handle: int) -> int:
        if handle:
            raise NVMLError
        return 431_500

    module.open, module.NVMLError = 0, NVMLError
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    module.nvmlInit = lambda: setattr(module, "open", module.open + 1)
    module.nvmlShutdown = lambda: setattr(module, "open", module.open - 1)
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetHandleByUUID = {"GPU-abc": 1}.__getitem__
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=(handle + 1) * 2**30)
    module.nvmlDeviceGetPowerUsage = power
    module.nvmlDeviceGetTemperature = lambda handle, kind: [54, 61][handle]
    module.nvmlDeviceGetClockInfo = lambda handle, kind: [1980, 1755][handle]
    module.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=[100, 50][handle])
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def gpus(environment: dict[str, str]) -> dict[str, float]:
    return {name: value for name, value in sensors.read(environment).items() if name.startswith("gpu")}


def test_all_gpus(nvml: Any) -> None:
    assert gpus({}) == {
        "gpu_used_gib": 3, "gpu_watts": 431.5, "gpu_celsius": 61, "gpu_sm_mhz": 1755, "gpu_busy": 0.75,
    }  # fmt: skip
    assert nvml.open == 0, "NVML stays open"


def test_visible_ones(nvml: Any) -> None:
    assert gpus({"CUDA_VISIBLE_DEVICES": "GPU-abc"})["gpu_celsius"] == 61
    assert "gpu_watts" not in gpus({"CUDA_VISIBLE_DEVICES": "1"})
    assert gpus({"CUDA_VISIBLE_DEVICES": "0"})["gpu_busy"] == 1.0
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == {}


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    said = sensors.read({})
    assert list(said) == ["host_gib"]
    assert 0.01 < said["host_gib"] < 100
