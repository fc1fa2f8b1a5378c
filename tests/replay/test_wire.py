"""SGLang's routing payload: exact both ways, and every malformed one refused in a sentence."""

from __future__ import annotations

import base64
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.replay.errors import PayloadError, ReplayError
from pacenote.replay.record import DECODE, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.wire import decode_sglang, encode_sglang

GEOMETRY = RoutingGeometry(num_layers=5, layers=(1, 2, 4), num_experts=300, top_k=2)


def payload(ids: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def decode(text: Any, rows: int, geometry: RoutingGeometry = GEOMETRY) -> RoutingRecord:
    return decode_sglang(text, geometry, rows=rows, provenance=DECODE, version=7)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 6),
    num_layers=st.integers(1, 5),
    num_experts=st.sampled_from([1, 7, 256, 257, 384]),
    data=st.data(),
)
def test_encode_then_decode_is_the_record(rows: int, num_layers: int, num_experts: int, data: st.DataObject) -> None:
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1))))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    geometry = RoutingGeometry(num_layers=num_layers, layers=layers, num_experts=num_experts, top_k=top_k)
    ids = np.random.default_rng(rows).integers(0, num_experts, (rows, len(layers), top_k))
    made = RoutingRecord.of(ids, geometry, provenance=DECODE, version=7)
    assert decode(encode_sglang(made, geometry), rows, geometry) == made


def test_layers_are_taken_by_global_id() -> None:
    """A dense layer's zeros would be valid experts: taking the first L layers would not be noticed by shape."""
    ids = np.zeros((2, 5, 2), dtype=np.int32)
    for layer in range(5):
        ids[:, layer] = (10 * layer, 10 * layer + 1)
    made = decode(payload(ids), 2)
    assert made.experts[0].tolist() == [[10, 11], [20, 21], [40, 41]]
    assert made.layers == (1, 2, 4)


def test_content_of_dense_layers_is_dropped() -> None:
    ids = np.zeros((2, 5, 2), dtype=np.int32)
    ids[:, [0, 3]] = -5
    assert decode(payload(ids), 2).validate().rows == 2


@pytest.mark.parametrize("bad", [-1, 300, 256 + 300, 65536, -(2**31), 2**31 - 1])
def test_ids_out_of_range_are_refused_before_narrowing(bad: int) -> None:
    ids = np.zeros((3, 5, 2), dtype=np.int64)
    ids[1, 2, 1] = bad
    with pytest.raises(PayloadError, match=rf"0..299, got {bad} at row 1, layer 2"):
        decode(payload(ids), 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "base64 text, got NoneType"),
        (7.5, "base64 text, got float"),
        (b"AAAA", "got 4: truncated"),
        ([[1, 2]], "base64 text, got list"),
        ("", "3 rows x 5 layers x 2 experts"),
        ("AAAA", "got 4: truncated"),
        (payload(np.zeros((3, 5, 2)))[:-4], "truncated, or sent by"),
        (payload(np.zeros((2, 5, 2))), "which is 2 rows"),
        (payload(np.zeros((4, 5, 2))), "which is 4 rows"),
        (payload(np.zeros((3, 3, 2))), "truncated, or sent by"),
        ("!" + payload(np.zeros((3, 5, 2)))[1:], "text that is not"),
        ("é" + payload(np.zeros((3, 5, 2)))[1:], "text that is not"),
        ("\n" + payload(np.zeros((3, 5, 2)))[1:], "text that is not"),
        ("=" * 160, "base64"),
        ("A" * 156 + "A===", "base64"),
        ("A" * 158 + "==", "bytes, got 118"),
    ],
)
def test_hostile_payloads(text: Any, words: str) -> None:
    with pytest.raises(ReplayError, match=words):
        decode(text, 3)


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text(max_size=180), st.text(alphabet="AQgw/+=", min_size=160, max_size=160)))
def test_any_text_decodes_or_is_refused(text: str) -> None:
    try:
        made = decode(text, 3)
    except PayloadError:
        return
    assert made.rows == 3
    assert int(made.experts.max()) < 300


def test_negative_rows_are_refused() -> None:
    with pytest.raises(PayloadError, match="rows >= 0, got -1"):
        decode("", -1)


def test_no_rows_are_an_empty_text() -> None:
    assert decode("", 0).rows == 0


def test_a_record_of_another_model_is_not_encoded() -> None:
    other = RoutingGeometry(num_layers=5, layers=(0, 2, 4), num_experts=300, top_k=2)
    with pytest.raises(PayloadError, match="expected a record of"):
        encode_sglang(RoutingRecord.empty(other), GEOMETRY)


def test_missing_rows_travel_as_zeros() -> None:
    assert encode_sglang(RoutingRecord.empty(GEOMETRY, 3), GEOMETRY) == payload(np.zeros((3, 5, 2)))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 5, 2), dtype="<i8"), "which is 6 rows"),
        (np.zeros((3, 5, 2), dtype="u1"), "truncated, or sent by"),
        (np.zeros((3, 5, 2), dtype="<f8"), "which is 6 rows"),
        (np.full((3, 5, 2), np.nan, dtype="<f4"), r"0..299, got 2143289344 at row 0, layer 1"),
        (np.full((3, 5, 2), 7, dtype="<f4"), r"0..299, got 1088421888"),
        (np.full((3, 5, 2), 7, dtype=">i4"), r"0..299, got 117440512"),
        (np.full((3, 5, 2), -7, dtype="<i4"), r"0..299, got -7 at row 0, layer 1 \(18 such ids\)"),
        (np.zeros((300, 5, 2), dtype="<i4"), "which is 300 rows"),
    ],
)
def test_other_dtypes_and_sizes(array: np.ndarray[Any, Any], words: str) -> None:
    text = base64.b64encode(array.tobytes()).decode()
    tracemalloc.start()
    with pytest.raises(PayloadError, match=words):
        decode(text, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_text_of_the_wrong_length_is_not_decoded() -> None:
    text = "A" * 40_000_000
    tracemalloc.start()
    with pytest.raises(PayloadError, match="160 characters, got 40000000"):
        decode(text, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("layers", [(1, 2, 3), (0, 2, 3), (4,), (0, 1, 2, 3, 4)])
def test_layers_that_stand_together_and_those_that_do_not(layers: tuple[int, ...]) -> None:
    geometry = RoutingGeometry(num_layers=5, layers=layers, num_experts=300, top_k=2)
    ids = np.arange(30).reshape(3, 5, 2)
    assert decode(payload(ids), 3, geometry).experts.tolist() == ids[:, list(layers)].tolist()
