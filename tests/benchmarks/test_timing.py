"""How calls are timed: by the clock here, and the ways of a GPU on a stand-in for torch.cuda."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from benchmarks import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Cuda:
    """What timing uses of torch.cuda. Every call takes a millisecond of its own clock.

    Attributes:
        capturing: a graph is being captured.
        refuses: a capture fails at its end.
        replays: of all graphs.
        streams: the current stream, set back after a failed capture.
    """

    def __init__(self, refuses: bool = False) -> None:
        self.capturing, self.refuses, self.replays, self.now = False, refuses, 0, 0.0
        self.debug, self.streams = "default", list[str]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it in the place of the real one."""
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class CUDAGraph:
            calls = 0

            def replay(self) -> None:
                cuda.replays += 1
                cuda.now += self.calls

        @contextmanager
        def graph(captured: CUDAGraph) -> Iterator[None]:
            before, cuda.capturing = cuda.now, True
            try:
                yield
            finally:
                captured.calls, cuda.now, cuda.capturing = int(cuda.now - before), before, False
            if cuda.refuses:
                raise RuntimeError("capture was invalidated\nand more")

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": Stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": Stream,
            "set_stream": lambda stream: cuda.streams.append("set back"),
            "synchronize": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 350,
            "set_sync_debug_mode": self._set_debug,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(timing, "WARM_SECONDS", 0.001)

    def _set_debug(self, mode: str) -> None:
        self.debug = mode

    def call(self, waits: bool = False) -> timing.Call:
        """Work of a millisecond, which waits for the device or not."""

        def work() -> str:
            if waits and self.debug == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            assert not (waits and self.capturing)
            self.now += 1
            return "done"

        return work


def test_by_the_clock() -> None:
    timed = timing.time_calls([lambda: time.sleep(0.002), lambda: time.sleep(0.002)], CPU, repeats=3)
    assert timed.repeats == 6
    assert 2000 <= timed.p10_us <= timed.median_us <= timed.p90_us < 2e6
    assert timed.method == "clock, eager, over 2 inputs"
    assert timed.peak_bytes == 0


def test_the_peak_of_a_cpu() -> None:
    """What is alive at once, not what is made: two tensors of three, and the result."""

    def call() -> torch.Tensor:
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second * 2

    assert 0 <= timing.peak_bytes_cpu(call) - 2 * 4 * (1 << 20) < 1024  # the numbers 1 and 2 are tensors for a moment


def test_slow_calls_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    assert timing.time_calls([lambda: time.sleep(0.02)], CPU, repeats=1000).repeats == timing.FEWEST
    assert timing._rounds(50, 1.0) == timing.FEWEST
    assert timing._rounds(2, 1.0) == 2
    assert timing._rounds(50, 1e-9) == 50


def test_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen, watched = Cuda(), list[Any](), list[float]()
    cuda.install(monkeypatch)

    @contextmanager
    def watch() -> Iterator[None]:
        watched.append(cuda.replays)
        yield
        watched.append(cuda.replays)

    calls = [cuda.call() for _ in range(3)]
    timed = timing.time_calls(calls, GPU, repeats=7, watch=watch, verify=seen.append)
    assert timed.method == "CUDA graph over 3 inputs"
    assert (timed.median_us, timed.repeats, timed.peak_bytes) == (1000.0, 7, 250)
    assert watched[1] - watched[0] == 7
    assert watched[0] > 0  # warmed before it is timed
    assert seen == ["done"]


def test_what_waits_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)
    timed = timing.time_calls([cuda.call(waits=True)] * 2, GPU, repeats=4)
    assert timed.method == "events, eager, over 2 inputs"
    assert (timed.median_us, timed.repeats) == (1000.0, 8)
    assert cuda.debug == "default"
    assert cuda.replays == 0


def test_what_cannot_be_captured_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(refuses=True)
    cuda.install(monkeypatch)
    timed = timing.time_calls([cuda.call()], GPU, repeats=4)
    assert timed.method == "events, eager, over 1 inputs, no graph: capture was invalidated"
    assert timed.median_us == 1000.0
    assert cuda.streams == ["set back"]


def test_another_error_is_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)

    def broken() -> None:
        if cuda.debug == "error":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timing.time_calls([broken], GPU, repeats=1)
    assert cuda.debug == "default"


def test_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)
    timed = timing.time_calls([cuda.call()], GPU, repeats=4, on_host=True)
    assert timed.method == "clock, eager, over 1 inputs"
    assert timed.peak_bytes == 250


def test_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.rotation(10, CPU) == 2
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 * 2**20)
    assert timing.rotation(2**30, GPU) == 3
    assert timing.rotation(25 * 2**20, GPU) == 6
    assert timing.rotation(1, GPU) == 64
