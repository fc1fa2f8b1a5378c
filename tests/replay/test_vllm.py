"""vLLM's routing payload: exact both ways, and every malformed one refused in a sentence, allocating nothing for it."""

from __future__ import annotations

import base64
import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.replay.errors import PayloadError
from pacenote.replay.record import DECODE, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.vllm import decode_vllm, encode_vllm

GEOMETRY = RoutingGeometry(num_layers=5, layers=(1, 2, 4), num_experts=300, top_k=2)


def text(array: Any) -> str:
    """What vLLM's server does with its array (`numpy.save`, then base64)."""
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return base64.b64encode(file.getvalue()).decode()


def headed(header: str, data: bytes = b"") -> str:
    raw = header.encode("latin1")
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data).decode()


def decode(payload: Any, rows: int = 3) -> RoutingRecord:
    return decode_vllm(payload, GEOMETRY, rows=rows, provenance=DECODE, version=7)


def ids(rows: int = 3) -> np.ndarray[Any, Any]:
    made = np.zeros((rows, 5, 2), dtype=np.int64)
    for layer in range(5):
        made[:, layer] = (50 * layer, 50 * layer + 1)
    return made


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, ">i4"])
def test_every_integer_dtype_means_the_same_and_layers_are_global(dtype: Any) -> None:
    made = decode(text(ids().astype(dtype)))
    assert made.experts.dtype == np.uint16  # by the number of experts, never by the data
    assert made.experts[0].tolist() == [[50, 51], [100, 101], [200, 201]]


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_encode_then_decode_is_the_record(rows: int) -> None:
    random = np.random.default_rng(rows).integers(0, 300, (rows, 3, 2))
    made = RoutingRecord.of(random, GEOMETRY, provenance=DECODE, version=7)
    assert decode(encode_vllm(made, GEOMETRY), rows) == made


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (None, "base64 text of a numpy array, got NoneType"),
        ([[[1, 2]]], "got list"),
        ("", "starts with .*NUMPY"),
        ("AAAA", "starts with .*NUMPY"),
        ("!AAA", "text that is not"),
        ("é" * 8, "text that is not"),
        (text(ids())[:-4], "bytes of int64 after"),
        (text(ids())[:-3], "text that is not"),
        (text(ids(2)), r"\[3, 5, 2\] .* got \[2, 5, 2\]"),
        (text(ids(4)), r"got \[4, 5, 2\]"),
        (text(ids()[:, 1:4]), r"got \[3, 3, 2\]"),
        (text(ids()[..., :1]), r"got \[3, 5, 1\]"),
        (text(ids().ravel()), r"got \[30\]"),
        (text(ids().astype(np.float32)), "as integers, got float32"),
        (text(np.full((3, 5, 2), np.nan)), "as integers, got float64"),
        (text(ids().astype(bool)), "as integers, got bool"),
        (text(np.asfortranarray(ids())), "C order"),
        (text(ids() * -1), "0..299, got -50"),
        (text(ids() * 2), "0..299, got 400 at row 0, layer 4"),
        (text(ids() + 2**16), "0..299, got 65586"),
        ("A" * 100_000, "at most .* too large"),
        (headed("{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 5, 2)}"), "got .1099511627776"),
        (headed("{'descr': '<i4', 'fortran_order': False, 'shape': (3, 5, 2)}"), "120 bytes of int32 .* got 0"),
        (
            headed("{'descr': '|O', 'fortran_order': False, 'shape': (3, 5, 2)}", b"cos\nsystem\n"),
            "as integers, got obj",
        ),
        (headed("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (3, 5, 2)}"), "numpy header"),
        (headed("{'descr': '<i4', 'fortran_order': False, 'shape': (-3, 5, 2)}"), "numpy header"),
        (headed("{'descr': '<i4', 'shape': (3, 5, 2)}"), "numpy header"),
        (headed("(" * 3000), "numpy header"),
        (headed("__import__('os')"), "numpy header"),
        (base64.b64encode(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}").decode(), "header inside"),
    ],
)
def test_hostile_payloads(payload: Any, words: str) -> None:
    tracemalloc.start()
    with pytest.raises(PayloadError, match=words):
        decode(payload)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@settings(max_examples=80, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_any_changed_byte_decodes_or_is_refused(place: int, byte: int) -> None:
    raw = bytearray(base64.b64decode(text(ids().astype(np.uint16))))
    raw[place % len(raw)] ^= byte
    try:
        made = decode(base64.b64encode(raw).decode())
    except PayloadError:
        return
    assert made.rows == 3
    assert int(made.experts.max()) < 300


def test_negative_rows_are_refused() -> None:
    with pytest.raises(PayloadError, match="rows >= 0, got -1"):
        decode("", -1)
