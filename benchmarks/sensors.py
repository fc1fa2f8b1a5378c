"""Clocks, power and temperature of a GPU, through nvidia-ml-py. What cannot be read is None, never an error."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SLOWED = {
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal",
    0x040: "hardware thermal",
    0x080: "power brake",
    0x100: "display clocks",
}
"""Why a GPU's clock is not its highest: bits of nvmlDeviceGetCurrentClocksEventReasons; bit 0, idle, is not one."""

PERIOD = 0.01
"""Seconds between two readings while something is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Clocks in MHz, power in watts, temperature in degrees Celsius, reasons for a lower clock as bits of SLOWED."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    slowed: int | None = None


class Sensors:
    """The sensors of one device; of a CPU, or without nvidia-ml-py, there are none.

    Attributes:
        driver: version of the NVIDIA driver.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if device.type == "cuda" and torch.version.hip is None:
            self._nvml = _try(_nvml)
            self._handle = _try(lambda: _handle(self._nvml, device))
        self.driver: str | None = _try(lambda: _text(self._nvml.nvmlSystemGetDriverVersion()))

    def read(self) -> Reading:
        """One reading."""
        nvml, handle = self._nvml, self._handle
        if handle is None:
            return Reading()
        milliwatts = _try(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return Reading(
            sm_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            power_w=None if milliwatts is None else milliwatts / 1e3,
            temperature_c=_try(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            slowed=_try(lambda: _reasons(nvml)(handle)),
        )

    def limits(self) -> dict[str, float | None]:
        """The highest SM clock in MHz and the power limit in watts."""
        nvml, handle = self._nvml, self._handle
        milliwatts = _try(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return {
            "max_sm_mhz": _try(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "power_limit_w": None if milliwatts is None else milliwatts / 1e3,
        }

    @contextmanager
    def watch(self, into: list[Reading]) -> Iterator[None]:
        """Readings by a thread for the length of a `with`, and one more at its end, added to a list."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(PERIOD):
                into.append(self.read())

        thread = threading.Thread(target=sample, daemon=True)
        if self._handle is not None:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self._handle is not None:
                thread.join()
                into.append(self.read())


def columns(before: Reading, during: Sequence[Reading]) -> dict[str, Any]:
    """What a row says of the sensors: medians while timing, why the clock was held down, and how it began."""

    def median(name: str) -> float | None:
        values = [value for reading in during if (value := getattr(reading, name)) is not None]
        return statistics.median(values) if values else None

    bits = [reading.slowed for reading in during if reading.slowed is not None]
    return {
        "sm_mhz": median("sm_mhz"),
        "memory_mhz": median("memory_mhz"),
        "power_w": median("power_w"),
        "temperature_c": median("temperature_c"),
        "slowed": "; ".join(word for bit, word in SLOWED.items() if any(b & bit for b in bits)) if bits else None,
        "sm_mhz_before": before.sm_mhz,
        "power_w_before": before.power_w,
        "temperature_c_before": before.temperature_c,
        "readings": len(bits),
    }


def _try(read: Callable[[], Any]) -> Any:
    """What a reading gives, or None: no driver, no such sensor, an older library are no reason not to measure."""
    try:
        return read()
    except Exception:
        return None


def _nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _handle(nvml: Any, device: torch.device) -> Any:
    """By UUID: NVML counts the GPUs of the machine, torch those that this process may see."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return nvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _reasons(nvml: Any) -> Any:
    """The call by its name of today, or of before driver 535."""
    older = getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
    return getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", older)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
