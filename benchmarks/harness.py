"""Timing, and what a number needs beside it to mean something: device, driver, versions, commit, date.

On a GPU a call is timed inside a CUDA graph that runs it over several inputs, more of them than the cache holds: no
Python and no warm cache is measured. On a CPU it is timed by the clock, once an input.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

BANDWIDTH = 3.0e12
"""Bytes a second that the floors are for: what an H100 SXM reaches of its 3.35e12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds a call: median, 10th and 90th percentile over `repeats`; bytes at the peak beyond the inputs."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int
    method: str
    on_gpu: bool
    peak_bytes: int | None

    def row(self, floor_bytes: int) -> dict[str, Any]:
        """The timing, and on a GPU how it stands to a floor in bytes at BANDWIDTH."""
        if not self.on_gpu:
            return {**asdict(self), "floor_bytes": floor_bytes}
        floor = floor_bytes / BANDWIDTH * 1e6
        return {
            **asdict(self),
            "floor_bytes": floor_bytes,
            "floor_us": floor,
            "over_floor": self.median_us / floor,
            "gb_per_s": floor_bytes / self.median_us / 1e3,
        }


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> Timing:
    """Time calls that do the same to different inputs."""
    if device.type != "cuda":
        for call in calls:
            call()
        took = [_clock(call) for _ in range(repeats) for call in calls]
        return _timing(took, "clock, eager", None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[0]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    took = [a.elapsed_time(b) * 1e3 / len(calls) for a, b in pairwise(marks)]
    return _timing(took, f"CUDA graph over {len(calls)} inputs", peak)


def _clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _timing(took: list[float], method: str, peak: int | None) -> Timing:
    tenths = statistics.quantiles(took, n=10, method="inclusive")
    return Timing(
        median_us=statistics.median(took),
        p10_us=tenths[0],
        p90_us=tenths[-1],
        repeats=len(took),
        method=method,
        on_gpu=peak is not None,
        peak_bytes=peak,
    )


def rotation(input_bytes: int, device: torch.device) -> int:
    """How many inputs of a size it takes to be sure that none is in the cache when its turn comes; at most 64."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, 2 + math.ceil(2 * cache / input_bytes))


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """What a number was measured on and with."""
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    for package in ("torch", "triton", "numpy"):
        facts[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
        }
    else:
        facts["note"] = "CPU: the timings mean nothing for a GPU, and the op is the plain definition"
    return facts


def _commit() -> str | None:
    """The commit, with + if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, if nvidia-ml-py is there to ask."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def write(name: str, facts: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> Path:
    """Write `<out>/<name>-<device>-<date>.json`; gives its path."""
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    path = out / f"{name}-{device}-{facts['date'][:10]}.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path
