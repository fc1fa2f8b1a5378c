"""Which optimizer steps are skipped."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.trainer.errors import NotFinite
from pacenote.trainer.guard import ENOUGH, SEEN, Guard, GuardConfig


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(norm: float) -> None:
    guard = Guard(GuardConfig(max_skips=2))
    assert [guard.judge(norm), guard.judge(norm), guard.judge(1.0), guard.judge(norm)] == [
        "not_finite", "not_finite", None, "not_finite",
    ]  # fmt: skip
    guard.judge(norm)
    with pytest.raises(NotFinite, match="3 optimizer steps in a row were skipped"):
        guard.judge(norm)


@given(st.lists(st.floats(0.1, 1000.0), max_size=100), st.floats(1.5, 10.0))
def test_spikes_are_those_above_the_median_of_what_was_used(norms: list[float], bound: float) -> None:
    guard, used = Guard(GuardConfig(spike=bound, max_skips=1000)), list[float]()
    for norm in norms:
        recent = used[-SEEN:]
        spike = len(recent) >= ENOUGH and norm > bound * statistics.median(recent)
        assert guard.judge(norm) == ("spike" if spike else None)
        used += [] if spike else [norm]
    again = Guard(GuardConfig(spike=bound, max_skips=1000))
    again.load_state(guard.state())
    assert [again.judge(x) for x in (0.5, 1e6)] == [guard.judge(x) for x in (0.5, 1e6)]


def test_without_a_bound_nothing_finite_is_a_spike() -> None:
    guard = Guard(GuardConfig())
    assert {guard.judge(norm) for norm in [*[1.0] * 40, 1e30]} == {None}
