"""Stopwatches."""

from __future__ import annotations

import pytest

from pacenote.trainer.phases import DeviceTime, Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that will be read next, last entry first."""
    readings = [float(n) for n in range(100, 0, -1)]
    monkeypatch.setattr("time.perf_counter", readings.pop)
    return readings


def test_phases(clock: list[float]) -> None:
    """Each reading of the clock is a second later than the last."""
    watch = Phases()
    with watch("learn"):
        pass
    with watch("update"), watch("learn"):
        pass
    with pytest.raises(ZeroDivisionError), watch("rollout"):
        raise ZeroDivisionError
    watch.add("backward", 0.5)
    assert watch.spent("learn") == 2
    assert watch.seconds() == {
        "seconds": 9, "seconds_learn": 2, "seconds_update": 3, "seconds_rollout": 1, "seconds_backward": 0.5,
    }  # fmt: skip


def test_a_device_s_time(clock: list[float]) -> None:
    time = DeviceTime("cpu")
    for _ in range(3):
        with time():
            pass
    assert time.take() == 3
    assert time.take() == 0
