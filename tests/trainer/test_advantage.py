"""Group-relative advantages, and how samples are split."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.trainer.advantage import Estimator, advantages, longest_answer, overlong_penalty
from pacenote.trainer.batch import split_steps
from pacenote.trainer.shares import split_tokens


def test_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 0.5, sample deviation sqrt(1/3)."""
    got = advantages([1.0, 0.0, 0.0, 1.0], 4)
    assert got.values == pytest.approx(np.array([1, -1, -1, 1]) * 0.5 / (3**-0.5 + 1e-4), rel=1e-6)
    assert (got.zero_std, got.unrewarded) == (0, 0)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3, 2.0, 0.0, -2.0]),
        ("rloo", [1.0, -0.5, -0.5, 3.0, 0.0, -3.0]),  # 1 - (0 + 0) / 2, 0 - (1 + 0) / 2, 4 - (2 + 0) / 2, ...
        # The mean of 1, 0, 0, 4, 2, 0 is 7/6; the squares of what is left add up to 77/6, over 5.
        ("reinforce_pp", [(r - 7 / 6) / ((77 / 30) ** 0.5 + 1e-4) for r in (1, 0, 0, 4, 2, 0)]),
        # Those of dr_grpo: squares 2/3 and 8, over 5.
        ("reinforce_pp_baseline", [x / ((26 / 15) ** 0.5 + 1e-4) for x in (2 / 3, -1 / 3, -1 / 3, 2, 0, -2)]),
    ],
)
def test_other_estimators_by_hand(estimator: Estimator, expected: list[float]) -> None:
    got = advantages([1.0, 0.0, 0.0, 4.0, 2.0, 0.0], 3, estimator)
    assert got.values == pytest.approx(np.array(expected), rel=1e-6)


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_nothing_known_is_no_advantage(estimator: Estimator) -> None:
    got = advantages([None, None, None, None], 2, estimator)
    assert np.isnan(got.values).all()
    assert (got.zero_std, got.unrewarded) == (0, 4)
    assert np.isfinite(advantages([1.0, None, 1.0, 1.0], 2, estimator).values[[0, 2, 3]]).all()
    assert advantages([], 4, estimator).values.shape == (0,)


def test_long_answers() -> None:
    """Of 10 tokens the last 4 cost a quarter each."""
    assert [overlong_penalty(n, 10, 4) for n in (0, 6, 7, 8, 10, 20)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(10, 10, 0) == 0.0
    assert longest_answer(np.array([1, 1, 0, 1, 1, 1, 0, 1], np.uint8)) == 3
    assert longest_answer(np.zeros(4, np.uint8)) == 0


def test_odd_groups() -> None:
    got = advantages([1.0, 1.0, None, None, 3.0, None], 2)
    assert got.values[:2].tolist() == [0.0, 0.0]
    assert np.isnan(got.values[[2, 3, 5]]).all()
    assert got.values[4] == 0.0, "one answer alone has no siblings to beat, and no NaN"
    assert (got.zero_std, got.unrewarded) == (2, 3)
    with pytest.raises(ValueError, match="multiple of group=2 rewards, got 3"):
        advantages([1.0, 2.0, 3.0], 2)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_groups_are_centred(rewards: list[float]) -> None:
    assert abs(float(advantages(rewards, len(rewards)).values.sum())) < 1e-3


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
