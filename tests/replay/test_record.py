"""RoutingRecord: invariants of the type, and cutting and joining without losing a row."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.replay.errors import RecordError
from pacenote.replay.record import (
    CACHED,
    DECODE,
    MISSING,
    PREFILL,
    RECOMPUTED,
    RoutingRecord,
    expert_dtype,
)
from pacenote.replay.spec import RoutingGeometry

GEOMETRY = RoutingGeometry(num_layers=4, layers=(1, 3), num_experts=8, top_k=2)


def record(rows: int, *, seed: int = 0, provenance: int = DECODE, version: int = 0) -> RoutingRecord:
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(rows)]) if rows else np.zeros((0, 2, 2))
    return RoutingRecord.of(ids.astype(np.int64), GEOMETRY, provenance=provenance, version=version)


def parts(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "experts": np.zeros((3, 2, 2), dtype=np.uint8),
        "provenance": np.full(3, DECODE, dtype=np.uint8),
        "version": np.zeros(3, dtype=np.int32),
        "layers": (1, 3),
        "num_experts": 8,
    }
    return {**fields, **changes}


@pytest.mark.parametrize(("experts", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_dtype_follows_the_number_of_experts(experts: int, dtype: str) -> None:
    assert expert_dtype(experts) == dtype


def test_dtype_does_not_follow_the_data() -> None:
    geometry = RoutingGeometry(num_layers=1, layers=(0,), num_experts=384, top_k=1)
    made = RoutingRecord.of(np.zeros((2, 1, 1), dtype=np.int64), geometry, provenance=DECODE, version=0)
    assert made.experts.dtype == np.uint16


@pytest.mark.parametrize("experts", [0, -1, 65537])
def test_no_dtype_for_absurd_numbers(experts: int) -> None:
    with pytest.raises(RecordError, match=str(experts)):
        expert_dtype(experts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": np.zeros((3, 2, 2), dtype=np.uint16)}, "experts as uint8, got uint16"),
        ({"num_experts": 300}, "experts as uint16, got uint8"),
        ({"experts": np.zeros((3, 3, 2), dtype=np.uint8)}, "2 layers"),
        ({"experts": np.zeros((3, 4), dtype=np.uint8)}, "2 layers"),
        ({"experts": np.zeros((4, 2, 2), dtype=np.uint8)}, "one each row"),
        ({"experts": np.zeros((3, 2, 9), dtype=np.uint8)}, "at most 8 experts"),
        ({"version": np.zeros(2, dtype=np.int32)}, "one each row"),
        ({"version": np.zeros(3, dtype=np.int64)}, "version as int32"),
        ({"provenance": np.full(3, 9, dtype=np.uint8)}, "provenance codes"),
        ({"layers": (3, 1)}, "ascending"),
        ({"layers": (1, 1)}, "ascending"),
        ({"layers": (-1, 1)}, "ascending"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        RoutingRecord(**parts(**changes))


def test_arrays_are_read_only_and_the_callers_stay_writable() -> None:
    mine = np.zeros((3, 2, 2), dtype=np.uint8)
    made = RoutingRecord(**parts(experts=mine))
    with pytest.raises(ValueError, match="read-only"):
        made.experts[0] = 1
    mine[0] = 1


@pytest.mark.parametrize("bad", [-1, 8, 256, 2**31])
def test_an_id_out_of_range_never_wraps(bad: int) -> None:
    ids = np.zeros((3, 2, 2), dtype=np.int64)
    ids[2, 1, 0] = bad
    with pytest.raises(RecordError, match=rf"0..7, got {bad} at row 2, layer 3"):
        RoutingRecord.of(ids, GEOMETRY, provenance=DECODE, version=0)


@pytest.mark.parametrize(("name", "value"), [("provenance", 256), ("provenance", -1), ("version", 2**31)])
def test_codes_do_not_wrap_either(name: str, value: int) -> None:
    codes: dict[str, Any] = {"provenance": DECODE, "version": 0, name: value}
    with pytest.raises(RecordError, match=name):
        RoutingRecord.of(np.zeros((1, 2, 2), dtype=np.int64), GEOMETRY, **codes)


@settings(max_examples=30, deadline=None)
@given(total=st.integers(0, 12), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_cut_and_joined_is_the_same(total: int, cuts: list[int]) -> None:
    whole = record(total)
    edges = sorted({0, total, *(min(cut, total) for cut in cuts)})
    pieces = [whole.slice(a, b) for a, b in itertools.pairwise(edges)] or [whole]
    assert RoutingRecord.concatenate(pieces) == whole
    grown = RoutingRecord.empty(GEOMETRY)
    for piece in pieces:
        grown = grown.append(piece)
    assert grown == whole


@settings(max_examples=30, deadline=None)
@given(total=st.integers(0, 10), start=st.integers(0, 10), length=st.integers(0, 12))
def test_overlapping_rows_that_agree_change_nothing(total: int, start: int, length: int) -> None:
    whole = record(12)
    held, start = whole.truncate(total), min(start, total)
    stop = min(12, start + length)
    assert held.append(whole.slice(start, stop), start=start) == whole.truncate(max(total, stop))


def test_overlapping_rows_that_disagree_are_refused() -> None:
    held, other = record(6), record(4, seed=1)
    with pytest.raises(RecordError, match="row 3 differs"):
        held.append(other, start=3)


def test_under_another_version_the_held_row_stays() -> None:
    held, other = record(6), record(4, seed=1, version=1)
    grown = held.append(other, start=3)
    assert grown.rows == 7
    assert grown.truncate(6) == held
    assert grown.version.tolist() == [0] * 6 + [1]


def test_missing_rows_are_filled_by_the_other_side() -> None:
    whole, holes = record(5), RoutingRecord.empty(GEOMETRY, 5)
    assert holes.append(whole, start=0) == whole
    assert whole.append(holes, start=0) == whole


def test_a_gap_is_refused() -> None:
    with pytest.raises(RecordError, match="start 4: rows are missing"):
        record(3).append(record(2), start=4)


def test_records_of_different_models_do_not_mix() -> None:
    other = RoutingRecord(**parts(layers=(0, 3)))
    with pytest.raises(RecordError, match="one model"):
        record(3).append(other)
    with pytest.raises(RecordError, match="at least one"):
        RoutingRecord.concatenate([])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_slices_are_not_clamped(start: int, stop: int) -> None:
    with pytest.raises(RecordError, match=rf"{start}..{stop}"):
        record(3).slice(start, stop)


def test_truncate_beyond_the_end_is_the_record() -> None:
    made = record(3)
    assert made.truncate(9) == made
    assert made.truncate(2).rows == 2
    with pytest.raises(RecordError, match="rows >= 0"):
        made.truncate(-1)


def test_equality_sees_every_field() -> None:
    made = record(3)
    assert made == record(3)
    assert made != record(3, seed=1)
    assert made != record(3, version=1)
    assert made != record(3, provenance=PREFILL)
    assert made != record(2)
    assert made != "something else"
    with pytest.raises(TypeError):
        hash(made)


def test_missing_rows_are_equal_whatever_they_hold() -> None:
    empty = RoutingRecord.empty(GEOMETRY, 2)
    other = RoutingRecord(**{**parts(), "experts": np.ones((2, 2, 2), dtype=np.uint8)} | {
        "provenance": empty.provenance, "version": empty.version,
    })  # fmt: skip
    assert empty == other


def test_the_report_counts_by_layer() -> None:
    experts = np.array(
        [[[1, 2], [3, 4]], [[5, 5], [1, 9]], [[8, 8], [7, 0]], [[0, 0], [1, 2]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]],
        dtype=np.uint8,
    )
    provenance = np.array([PREFILL, CACHED, RECOMPUTED, DECODE, DECODE, DECODE], dtype=np.uint8)
    report = RoutingRecord(**parts(experts=experts, provenance=provenance, version=np.zeros(6, np.int32))).validate()
    assert report.out_of_range.tolist() == [1, 1]
    assert report.duplicate.tolist() == [5, 2]
    assert report.zero.tolist() == [3, 2]
    assert report.zero_tail == 2
    assert not report.ok


def test_the_report_leaves_missing_rows_out() -> None:
    report = RoutingRecord.empty(GEOMETRY, 3).validate()
    assert report.missing == report.rows == 3
    assert report.ok
    assert report.zero_tail == 0
    assert RoutingRecord.empty(GEOMETRY).validate().ok
    assert record(4).validate().ok
    assert record(4, provenance=MISSING).validate().missing == 4
