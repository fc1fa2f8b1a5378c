"""Microbatches of many ranks: nothing lost, nobody waits for long."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacenote.trainer.shares import balanced, deal, split_tokens

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


def sums(parts: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[i] for i in part) for part in parts]


@given(LENGTHS, st.integers(1, 60))
def test_split(lengths: list[int], budget: int) -> None:
    bins = split_tokens(lengths, budget)
    assert sorted(i for part in bins for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or total <= budget for part, total in zip(bins, sums(bins, lengths), strict=True))
    totals = sums(bins, lengths)
    assert all(a + b > budget for a, b in combinations(totals, 2)), "two of them would have fitted into one"


@given(LENGTHS, st.integers(1, 8))
def test_balanced(lengths: list[int], parts: int) -> None:
    """Every index once; no part is larger than the least by more than one sample."""
    found = balanced(lengths, parts)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    totals = sums(found, lengths)
    assert totals == sorted(totals, reverse=True)
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_balanced_is_near_the_best(lengths: list[int], parts: int) -> None:
    """Largest differencing is within 4/3 - 1/(3 parts) of the best (as the longest-first rule is; 7/6 for two)."""
    best = min(
        max(sum(n for n, to in zip(lengths, where, strict=True) if to == part) for part in range(parts))
        for where in product(range(parts), repeat=len(lengths))
    )
    bound = 7 / 6 if parts == 2 else 4 / 3 - 1 / (3 * parts)
    assert max(sums(balanced(lengths, parts), lengths)) <= best * bound + 1e-9


def test_balanced_beats_first_come() -> None:
    assert sums(balanced([8, 7, 6, 5, 4], 2), [8, 7, 6, 5, 4]) == [16, 14]
    assert balanced([], 3) == [[], [], []]


@given(LENGTHS, st.integers(10, 80), st.integers(1, 5), st.integers(1, 3))
def test_deal(lengths: list[int], budget: int, ranks: int, multiple: int) -> None:
    dealt = deal(lengths, budget, ranks, multiple)
    assert len(dealt) == ranks
    assert sorted(i for rank in dealt for part in rank for i in part) == list(range(len(lengths)))
    counts = {len(rank) for rank in dealt}
    assert len(counts) == 1, "ranks that share collectives pass equally often"
    assert not counts.pop() % multiple
    for rank in dealt:
        assert all(len(part) <= 1 or total <= budget for part, total in zip(rank, sums(rank, lengths), strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_meet_have_about_as_much(ranks: int) -> None:
    lengths = [(i * 37) % 97 + 3 for i in range(200)]
    dealt = deal(lengths, 400, ranks)
    for meeting in zip(*(sums(rank, lengths) for rank in dealt), strict=True):
        assert max(meeting) - min(meeting) <= 0.1 * max(meeting)
