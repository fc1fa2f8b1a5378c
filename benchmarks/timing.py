"""How long a call takes.

On a GPU a call is timed inside a CUDA graph that runs it over several inputs, more of them than the cache holds, each
with results of its own: no Python and no warm cache is measured. A call that waits for the device cannot stand in a
graph: it is timed by events, launches from Python included. A call that starts in host memory is timed by the clock,
until the device is done. On a CPU everything is timed by the clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
Watch = Callable[[], AbstractContextManager[Any]]
WARM_SECONDS = 0.05
"""How long a GPU works before it is timed: it takes so long to raise its clock."""
SECONDS = 1.0
"""About how long one timing may take; fewer repeats then."""
FEWEST = 3
"""Repeats of what takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds a call: median, 10th and 90th percentile over `repeats`; bytes at the peak beyond the inputs."""

    method: str
    median_us: float
    p10_us: float
    p90_us: float
    repeats: int
    peak_bytes: int | None = None


def time_calls(
    calls: Sequence[Call],
    device: torch.device,
    *,
    repeats: int,
    on_host: bool = False,
    watch: Watch = nullcontext,
    verify: Callable[[Any], None] = lambda result: None,
) -> Timing:
    """Time calls that do the same to different inputs.

    Args:
        calls: at least one; each is called before it is timed, of those on the host one.
        device: where they work.
        repeats: how often all of them are called, fewer if that takes longer than SECONDS.
        on_host: the calls start in host memory.
        watch: entered while they are timed.
        verify: looks at the last result of the first call, where that was made by a graph.
    """
    for call in calls[:1] if on_host else calls:
        call()
    if device.type != "cuda":
        return replace(by_clock(calls, rounds=repeats, watch=watch), peak_bytes=peak_bytes_cpu(calls[0]))
    peak = peak_bytes(calls[0])
    if on_host:
        timing = by_clock(calls, rounds=repeats, watch=watch, wait=torch.cuda.synchronize)
    elif waits(calls[0]):
        timing = by_events(calls, rounds=repeats, watch=watch)
    else:
        timing = by_graph(calls, rounds=repeats, watch=watch, verify=verify)
    return replace(timing, peak_bytes=peak)


def by_graph(
    calls: Sequence[Call],
    *,
    rounds: int,
    watch: Watch = nullcontext,
    verify: Callable[[Any], None] = lambda result: None,
) -> Timing:
    """Capture the calls into one CUDA graph and time its replays; by events if they cannot be captured."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(stream)
    with torch.cuda.stream(side):  # what is set up once, by stream, must not fall into the capture
        calls[0]()
    stream.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            results = [call() for call in calls]  # all kept: else each would be written over the last, in the cache
    except Exception as error:
        torch.cuda.set_stream(stream)  # a broken capture leaves its own stream behind
        reason = str(error).partition("\n")[0][:100]
        return by_events(calls, rounds=rounds, watch=watch, note=f", no graph: {reason}")
    replay = _warm(graph.replay)
    rounds = _rounds(rounds, replay)
    marks = [_mark() for _ in range(rounds + 1)]
    with watch():
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
    verify(results[0])
    took = [a.elapsed_time(b) * 1e3 / len(calls) for a, b in pairwise(marks)]
    return _timing(took, f"CUDA graph over {len(calls)} inputs")


def by_events(calls: Sequence[Call], *, rounds: int, watch: Watch = nullcontext, note: str = "") -> Timing:
    """Time each call between two events on the stream, launched from Python."""
    rounds = _rounds(rounds, _warm(calls[0]) * len(calls))
    pairs = [(_mark(), _mark()) for _ in range(rounds * len(calls))]
    results: list[Any] = [None] * len(calls)
    with watch():
        for i, (start, end) in enumerate(pairs):
            start.record()
            results[i % len(calls)] = calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
    took = [start.elapsed_time(end) * 1e3 for start, end in pairs]
    return _timing(took, f"events, eager, over {len(calls)} inputs{note}")


def by_clock(
    calls: Sequence[Call], *, rounds: int, watch: Watch = nullcontext, wait: Callable[[], None] = lambda: None
) -> Timing:
    """Time each call by the clock of the host, until `wait` returns."""
    took: list[float] = []
    results: list[Any] = [None] * len(calls)
    wait()
    began = time.perf_counter()
    with watch():
        for i in range(rounds * len(calls)):
            start = time.perf_counter()
            results[i % len(calls)] = calls[i % len(calls)]()
            wait()
            took.append((time.perf_counter() - start) * 1e6)
            if len(took) >= FEWEST and time.perf_counter() - began > SECONDS:
                break
    return _timing(took, f"clock, eager, over {len(calls)} inputs")


def waits(call: Call) -> bool:
    """Whether a call waits for the device, as far as torch knows: no graph can hold that."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def peak_bytes(call: Call) -> int:
    """Device memory that a call takes at its peak, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_cpu(call: Call) -> int:
    """The same of a CPU's tensors, from what its allocator says."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del result
    return max(accumulate(event.nbytes() for event in events), default=0)


def rotation(call_bytes: int, device: torch.device) -> int:
    """How many inputs it takes to be sure that none is in the cache when its turn comes; at most 64."""
    return min(64, 2 + math.ceil(2 * cache_bytes(device) / max(call_bytes, 1)))


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's last cache; 0 for a CPU, where nothing is claimed."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _warm(call: Call) -> float:
    """Keep the GPU busy until its clock is up; gives seconds a call."""
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < WARM_SECONDS:
        call()
        torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def _rounds(asked: int, seconds: float) -> int:
    """As many rounds as asked for, if each takes `seconds` and all of them SECONDS; at least FEWEST."""
    return max(min(asked, FEWEST), min(asked, int(SECONDS / max(seconds, 1e-9))))


def _timing(took: Sequence[float], method: str) -> Timing:
    tenths = statistics.quantiles(took, n=10, method="inclusive") if len(took) > 1 else [took[0]] * 9
    return Timing(
        method=method, median_us=statistics.median(took), p10_us=tenths[0], p90_us=tenths[-1], repeats=len(took)
    )
