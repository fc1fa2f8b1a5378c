"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Phases:
    """A stopwatch of named phases, by the wall. Work that a GPU still does when a phase ends counts for the next one
    that waits for it; the loss's metrics are waited for, so learning is timed whole."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds = defaultdict[str, float](float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's seconds for `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that somebody else took the time of."""
        self._seconds[name] += seconds

    def spent(self, name: str) -> float:
        """Seconds of a phase so far."""
        return self._seconds[name]

    def seconds(self) -> dict[str, float]:
        """`seconds` since the start, and `seconds_<name>` of each phase."""
        whole = time.perf_counter() - self._start
        return {"seconds": whole, **{f"seconds_{name}": spent for name, spent in self._seconds.items()}}


class DeviceTime:
    """Seconds of a device's work in `with` blocks: by its own events on CUDA, where the host runs ahead of it, and by
    the wall elsewhere."""

    def __init__(self, device: str) -> None:
        """Of a torch device."""
        self._cuda = torch.device(device).type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the block."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        if not self._cuda:
            return float(sum(end - start for start, end in spans))
        if spans:
            spans[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in spans)) / 1000
