"""What the machine says of itself while the run goes on: GPU memory, power, clocks and heat; the process's memory.

By NVML (nvidia-ml-py), which is asked and never told: no setting is changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read(environment: Mapping[str, str]) -> dict[str, float]:
    """Columns of this machine now.

    Args:
        environment: CUDA_VISIBLE_DEVICES says which GPUs are the run's: numbers, UUIDs, or all.

    Returns:
        `host_gib`, the process's memory; and where there are GPUs the sum of `gpu_used_gib` and `gpu_watts`, and the
        largest `gpu_celsius`, the smallest `gpu_sm_mhz`, and the mean `gpu_busy` (share of the last moment). What a GPU
        does not say is left out.
    """
    return {**_host(), **_gpus(environment)}


def _host() -> dict[str, float]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"host_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}


def _gpus(environment: Mapping[str, str]) -> dict[str, float]:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no library, no driver, no GPU
        return {}
    try:
        handles = list(_visible(nvml, environment.get("CUDA_VISIBLE_DEVICES")))
        asked: dict[str, tuple[Callable[[Any], float], Callable[[list[float]], float]]] = {
            "gpu_used_gib": (lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used / 2**30, sum),
            "gpu_watts": (lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000, sum),
            "gpu_celsius": (lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU), max),
            "gpu_sm_mhz": (lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM), min),
            "gpu_busy": (lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100, lambda v: sum(v) / len(v)),
        }
        found: dict[str, float] = {}
        for name, (ask, join) in asked.items():
            values: list[float] = []
            for handle in handles:
                with contextlib.suppress(nvml.NVMLError):  # a slice of a GPU has no power of its own
                    values.append(ask(handle))
            if values:
                found[name] = float(join(values))
        return found
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any, said: str | None) -> Any:
    """Handles of the GPUs that are the run's."""
    if said is None:
        yield from (nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount()))
        return
    for word in filter(None, (word.strip() for word in said.split(","))):
        with contextlib.suppress(nvml.NVMLError):
            if word.isdigit():
                yield nvml.nvmlDeviceGetHandleByIndex(int(word))
            else:
                yield nvml.nvmlDeviceGetHandleByUUID(word)
