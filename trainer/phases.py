"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


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

    def seconds(self) -> dict[str, float]:
        """`seconds` since the start, and `seconds_<name>` of each phase."""
        whole = time.perf_counter() - self._start
        return {"seconds": whole, **{f"seconds_{name}": spent for name, spent in self._seconds.items()}}
