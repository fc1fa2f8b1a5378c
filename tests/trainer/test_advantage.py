"""Group-relative advantages, and how samples are split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.trainer.advantage import group_advantages
from pacenote.trainer.batch import split_steps, split_tokens


def test_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 0.5, sample deviation sqrt(1/3)."""
    got = group_advantages([1.0, 0.0, 0.0, 1.0], 4)
    assert got.values == pytest.approx(np.array([1, -1, -1, 1]) * 0.5 / (3**-0.5 + 1e-4), rel=1e-6)
    assert (got.zero_std, got.unrewarded) == (0, 0)
    assert group_advantages([1.0, 0.0], 2, normalize=False).values.tolist() == [0.5, -0.5]


def test_odd_groups() -> None:
    got = group_advantages([1.0, 1.0, None, None, 3.0, None], 2)
    assert got.values[:2].tolist() == [0.0, 0.0]
    assert np.isnan(got.values[[2, 3, 5]]).all()
    assert got.values[4] == 0.0, "one answer alone has no siblings to beat, and no NaN"
    assert (got.zero_std, got.unrewarded) == (2, 3)
    with pytest.raises(ValueError, match="multiple of group=2 rewards, got 3"):
        group_advantages([1.0, 2.0, 3.0], 2)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_groups_are_centred(rewards: list[float]) -> None:
    assert abs(float(group_advantages(rewards, len(rewards)).values.sum())) < 1e-3  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_microbatches_hold_every_sample_once(lengths: list[int], budget: int) -> None:
    bins = split_tokens(lengths, budget)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    for bin_ in bins:
        assert sum(lengths[i] for i in bin_) <= budget or len(bin_) == 1


@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 9))
def test_optimizer_steps_share_the_samples(count: int, parts: int, seed: int) -> None:
    steps = split_steps(count, parts, seed)
    assert sorted(int(i) for step in steps for i in step) == list(range(count))
    assert not steps or max(map(len, steps)) - min(map(len, steps)) <= 1
