"""Mismatch and flips: known numbers, and never an exception for what the arrays hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pacenote.kernels.spec import CACHED, DECODE, PROVENANCES
from pacenote.replay.audit import (
    COUNTERS,
    Audit,
    Labels,
    by_provenance,
    by_role,
    by_staleness,
    by_turn,
    flips,
    mismatch,
    split,
    token_flips,
)


def test_known_numbers() -> None:
    rollout = np.array([-1.0, -2.0, -3.0, -4.0])
    train = rollout + np.array([0.1, -0.7, 0.0, 50.0])
    found = mismatch(train, rollout, [1, 1, 1, 0])
    assert found.tokens == 3
    assert found.mean_abs == pytest.approx(0.8 / 3)
    assert found.max_abs == pytest.approx(0.7)
    assert found.k3 == pytest.approx((math.exp(0.1) - 1.1 + math.exp(-0.7) - 0.3) / 3)
    assert found.f_tau == pytest.approx(1 / 3)  # exp(0.7) = 2.01 > 2
    assert mismatch(train, rollout, [1, 1, 1, 0], tau=2.1).f_tau == 0.0
    assert mismatch(train, rollout, [1, 1, 1, 0], tau=1.05).f_tau == pytest.approx(2 / 3)


def test_the_bound_is_on_the_ratio_both_ways() -> None:
    train, rollout = np.log([0.9, 0.1]), np.log([0.3, 0.3])
    assert mismatch(train, rollout, [1, 1]).f_tau == 1.0


def test_equal_logprobs_have_no_mismatch() -> None:
    found = mismatch([-1.0, -2.0], [-1.0, -2.0], [1, 1])
    assert (found.mean_abs, found.max_abs, found.k3, found.f_tau, found.nan) == (0.0, 0.0, 0.0, 0.0, 0)


def test_small_differences_are_not_lost_in_k3() -> None:
    assert mismatch([1e-9], [0.0], [1]).k3 == pytest.approx(5e-19, rel=0.5)


@pytest.mark.parametrize("mask", [[], [0, 0]])
def test_no_tokens_is_nan_not_an_error(mask: list[int]) -> None:
    found = mismatch([0.0] * len(mask), [0.0] * len(mask), mask)
    assert found.tokens == 0
    assert math.isnan(found.mean_abs)
    assert math.isnan(found.f_tau)


def test_nan_is_counted_and_left_out() -> None:
    found = mismatch([-1.0, np.nan, -np.inf, -1.0], [-1.5, -1.0, -np.inf, np.nan], [1, 1, 1, 0])
    assert found.nan == 2
    assert found.tokens == 1
    assert found.mean_abs == 0.5


def test_infinite_differences_stay_visible() -> None:
    found = mismatch([0.0, -1.0], [-np.inf, -1.0], [1, 1])
    assert found.nan == 0
    assert math.isinf(found.max_abs)
    assert math.isinf(found.k3)
    assert found.f_tau == 0.5


floats = hnp.arrays(np.float32, 5, elements=st.floats(width=32))


@settings(max_examples=60, deadline=None)
@given(train=floats, rollout=floats, mask=hnp.arrays(np.uint8, 5))
def test_content_never_raises(train: np.ndarray, rollout: np.ndarray, mask: np.ndarray) -> None:
    found = mismatch(train, rollout, mask)
    assert found.tokens + found.nan == int((mask != 0).sum())
    assert math.isnan(found.f_tau) or 0 <= found.f_tau <= 1
    assert math.isnan(found.k3) == (found.tokens == 0)


def test_shapes_and_tau_are_checked() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mismatch([0.0], [0.0, 1.0], [1])
    with pytest.raises(ValueError, match="tau > 0"):
        mismatch([0.0], [0.0], [1], tau=0)


def test_flips_compare_sets() -> None:
    a = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    b = np.array([[[1, 0], [2, 4]], [[0, 1], [3, 2]], [[0, 0], [0, 0]]], dtype=np.uint8)
    found = flips(a, b, [1, 1, 0])
    assert found.tokens == 2
    assert found.flipped_by_layer.tolist() == [0.0, 0.5]
    assert found.overlap_by_layer.tolist() == [1.0, 0.75]
    assert found.flipped == 0.25
    assert found.any_layer == 0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_flips_agree_with_python_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (np.stack([[rng.permutation(5)[:3] for _ in range(2)] for _ in range(4)]) for _ in range(2))
    found = flips(a, b, np.ones(4))
    for layer in range(2):
        pairs = [(set(a[t, layer]), set(b[t, layer])) for t in range(4)]
        assert found.flipped_by_layer[layer] == np.mean([x != y for x, y in pairs])
        assert found.overlap_by_layer[layer] == pytest.approx(np.mean([len(x & y) / 3 for x, y in pairs]))


def test_flips_of_nothing_are_nan() -> None:
    found = flips(np.zeros((2, 3, 1)), np.zeros((2, 3, 1)), [0, 0])
    assert found.tokens == 0
    assert np.isnan(found.flipped_by_layer).all()
    assert len(found.flipped_by_layer) == 3
    assert math.isnan(found.flipped)


def test_flips_check_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[T, L, K\]"):
        flips(np.zeros((2, 3, 1)), np.zeros((2, 3, 2)), [1, 1])
    with pytest.raises(ValueError, match=r"mask \[T\]"):
        flips(np.zeros((2, 3, 1)), np.zeros((2, 3, 1)), [1])


def test_audit_by_name_and_as_a_table() -> None:
    counts = {name: np.array([index, 10], dtype=np.int64) for index, name in enumerate(COUNTERS)}
    made = Audit(layers=(1, 3), **counts, margin=np.array([0.25, 0.5]))
    assert made.total("flipped") == COUNTERS.index("flipped") + 10
    assert made["pad"].tolist() == [COUNTERS.index("pad"), 10]
    lines = made.table().splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "1", "3", "sum"]
    assert lines[-1].split()[1] == "10"
    assert [line.split()[-1] for line in lines] == ["margin", "0.25", "0.5", "0.417"]  # of 5 flipped rows, and of 10
    assert made.mean_margin() == pytest.approx((5 * 0.25 + 10 * 0.5) / 15)
    with pytest.raises(KeyError, match="expected one of replayed"):
        made["nothing"]
    with pytest.raises(KeyError, match="expected one of replayed"):
        made["margin"]


def test_a_margin_without_flips_is_nan() -> None:
    counts = {name: np.zeros(2, dtype=np.int64) for name in COUNTERS}
    made = Audit(layers=(1, 3), **counts, margin=np.full(2, np.nan))
    assert math.isnan(made.mean_margin())
    assert made.table().splitlines()[-1].split()[-1] == "nan"
    counts["flipped"] = np.array([0, 3])
    assert Audit(layers=(1, 3), **counts, margin=np.array([np.nan, 0.5])).mean_margin() == 0.5


# --- by groups of tokens ---------------------------------------------------------------------------------------------


def test_a_split_has_each_group_s_own_numbers() -> None:
    rollout = np.array([0.0, -1.0, -2.0, -3.0, -4.0])
    train = rollout + np.array([9.0, 0.1, -0.7, 0.3, 50.0])
    labels = Labels(group=np.array([0, 1, 1, 2, -1]), names=("prompt", "a", "b", "empty"))
    found = split(train, rollout, [0, 1, 1, 1, 1], labels, flipped=[1, 0, 1, np.nan, 1])
    assert list(found) == ["prompt", "a", "b", "empty"]
    assert found["prompt"].mismatch.tokens == 0, "no logprob of a prompt"
    assert (found["prompt"].compared, found["prompt"].flipped) == (1, 1.0), "but its routes"
    assert found["a"].mismatch.mean_abs == pytest.approx(0.4)
    assert found["a"].mismatch.max_abs == pytest.approx(0.7)
    assert found["a"].mismatch.f_tau == 0.5  # exp(0.7) = 2.01 > 2
    assert (found["a"].compared, found["a"].flipped) == (2, 0.5)
    assert found["b"].mismatch.mean_abs == pytest.approx(0.3)
    assert found["b"].compared == 0
    assert math.isnan(found["b"].flipped)
    assert found["empty"].mismatch.tokens == found["empty"].compared == 0
    assert split(train, rollout, [0, 1, 1, 1, 1], labels, tau=2.1)["a"].mismatch.f_tau == 0.0
    assert split(train, rollout, [0, 1, 1, 1, 1], labels)["a"].compared == 0


def test_flips_by_token_are_of_any_layer() -> None:
    a = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    b = np.array([[[1, 0], [2, 4]], [[0, 1], [3, 2]], [[0, 0], [0, 0]]], dtype=np.uint8)
    found = token_flips(a, b, [1, 1, 0])
    assert found[:2].tolist() == [1.0, 0.0]
    assert math.isnan(found[2])
    with pytest.raises(ValueError, match=r"mask \[T\]"):
        token_flips(a, b, [1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(0, 30), groups=st.integers(1, 5))
def test_groups_add_up_to_the_whole(seed: int, tokens: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    train, rollout, mask = rng.normal(size=tokens), rng.normal(size=tokens), rng.random(tokens) < 0.6
    a, b = rng.integers(0, 3, (2, tokens, 2, 1))
    compared = rng.random(tokens) < 0.8
    labels = Labels(group=rng.integers(0, groups, tokens), names=tuple("abcde"[:groups]))
    parts = list(split(train, rollout, mask, labels, flipped=token_flips(a, b, compared)).values())
    whole, routes = mismatch(train, rollout, mask), flips(a, b, compared)
    assert sum(part.mismatch.tokens for part in parts) == whole.tokens
    assert sum(part.compared for part in parts) == routes.tokens
    for name in ("mean_abs", "k3", "f_tau"):
        terms = [getattr(p.mismatch, name) * p.mismatch.tokens for p in parts if p.mismatch.tokens]
        assert not whole.tokens or sum(terms) == pytest.approx(getattr(whole, name) * whole.tokens)
    assert not whole.tokens or max(p.mismatch.max_abs for p in parts if p.mismatch.tokens) == whole.max_abs
    flipped = sum(part.flipped * part.compared for part in parts if part.compared)
    assert not routes.tokens or flipped == pytest.approx(routes.any_layer * routes.tokens)


def named(labels: Labels) -> list[str | None]:
    """Each token's name."""
    return [None if group < 0 else labels.names[group] for group in labels.group]


def test_roles() -> None:
    assert named(by_role([0, 1, 0, 2])) == ["prompt", "response", "prompt", "response"]


def test_turns_are_runs_of_the_mask_and_what_leads_to_them() -> None:
    turns = by_turn([0, 0, 1, 1, 0, 1, 0])
    assert turns.group.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert turns.names == ("turn 0", "turn 1", "turn 2")
    assert by_turn([1, 0, 1]).group.tolist() == [0, 1, 1]
    assert by_turn([0, 0]).names == ("turn 0",)
    assert by_turn([]).names == ()


def test_turns_begin_anew_in_each_segment() -> None:
    mask, segments = [0, 1, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 2, -1]
    assert by_turn(mask, segments).group.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, -1]
    assert by_turn([0, 0], [-1, -1]).names == ()


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(st.lists(st.booleans(), min_size=1, max_size=8), max_size=5))
def test_turns_of_a_batch_are_those_of_its_samples(samples: list[list[bool]]) -> None:
    joined = [bit for sample in samples for bit in sample]
    segments = [number for number, sample in enumerate(samples) for _ in sample]
    assert by_turn(joined, segments).group.tolist() == [t for sample in samples for t in by_turn(sample).group.tolist()]


def test_staleness_names_what_occurs() -> None:
    found = by_staleness(np.array([7, 5, -1, 7, 8], np.int32), 7)
    assert found.names == ("lag -1", "lag 0", "lag 2", "unknown")
    assert named(found) == ["lag 0", "lag 2", "unknown", "lag 0", "lag -1"]
    assert by_staleness([3, 3], 3).names == ("lag 0",)
    assert by_staleness([-1], 3).names == ("unknown",)
    assert by_staleness([], 3).names == ()


def test_provenance_has_every_name() -> None:
    found = by_provenance(np.array([DECODE, CACHED, 0], np.uint8))
    assert found.names == PROVENANCES
    assert named(found) == ["decode", "cached", "missing"]


def test_labels_are_checked() -> None:
    with pytest.raises(ValueError, match=r"within -1\.\.4, the places of 5 names, got 0\.\.5"):
        by_provenance([0, 5])
    with pytest.raises(ValueError, match=r"groups \[T\] of integers, got \[1\] of float64"):
        Labels(group=np.zeros(1), names=("a",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a name for each group"):
        Labels(group=np.zeros(1, np.int64), names=("a", "a"))
    with pytest.raises(ValueError, match=r"a mask \[T\] and segments \[T\], got \[2\] and \[1\]"):
        by_turn([0, 1], [0])
    with pytest.raises(ValueError, match=r"expected arrays \[2\] as labels have"):
        split([0.0], [0.0], [1], by_role([0, 1]))
    with pytest.raises(ValueError, match="tau > 0"):
        split([0.0], [0.0], [1], by_role([1]), tau=0)
