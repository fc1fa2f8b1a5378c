"""What a number was measured on and with, and how fast that can be at all."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.sensors import Sensors
from pacenote.kernels import launch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "megatron-core", "transformer-engine", "liger-kernel", "nvidia-ml-py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates that the floors are for, measured here: nothing is much faster.

    Attributes:
        bytes_per_s: device memory, read and written bytes of a large copy.
        flop_per_s: a large bfloat16 matrix product.
        upload_per_s: bytes from pinned host memory to the device.
    """

    bytes_per_s: float
    flop_per_s: float
    upload_per_s: float


def ceilings(device: torch.device, size: int = 2**30, side: int = 8192) -> Ceilings | None:
    """Measure them with copies of `size` bytes and products of `side` x `side` matrices; None on a CPU."""
    if device.type != "cuda":
        return None
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    # Random numbers: products of zeros take less power, so the clock stays higher than any real product's.
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    host = torch.ones(size // 4, dtype=torch.uint8).pin_memory()
    copy, product, upload = (
        timing.by_events([call], rounds=20).median_us / 1e6
        for call in (lambda: target.copy_(source), lambda: a @ b, lambda: target[: len(host)].copy_(host, True))
    )
    return Ceilings(bytes_per_s=2 * size / copy, flop_per_s=2 * side**3 / product, upload_per_s=host.nbytes / upload)


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(device: torch.device, sensors: Sensors, rates: Ceilings | None) -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    known: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    known |= {package: _version(package) for package in PACKAGES}
    if rates is None:
        ours = "in Triton's interpreter" if launch.INTERPRETED else "the plain definition"
        return known | {"note": f"CPU, pacenote is {ours}: the timings mean nothing for a GPU"}
    properties = torch.cuda.get_device_properties(device)
    return {
        **known,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cache_bytes": timing.cache_bytes(device),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": sensors.driver,
        **sensors.limits(),
        **asdict(rates),
    }


def commit() -> str | None:
    """The commit, with + if files differ from it; None where there is no repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def sources() -> str:
    """Digest of the kernels' and the benchmarks' sources: what was measured, where a commit cannot say it."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
