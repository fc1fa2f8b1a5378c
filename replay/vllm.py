"""vLLM's routed experts <-> RoutingRecord.

vLLM 0.22 and later, started with `--enable-return-routed-experts`, puts `choices[i].routed_experts` into answers of
/v1/completions, /v1/chat/completions and /inference/v1/generate: base64 of the bytes of `numpy.save`, an array
[tokens - 1, num_hidden_layers, K]. The ids are uint8 or uint16, later int32; dense layers are zeros; the last sampled
token was never forwarded and has no row. `routed_experts_prompt_start` in a request leaves out that many rows.

Source: `GenerateResponseChoice` in vllm/entrypoints/serve/disagg/protocol.py, and `RoutedExpertsCapturer` in
vllm/model_executor/layers/fused_moe/routed_experts_capturer.py; vllm-project/vllm pull requests 28284, 38939, 51906.
"""

from __future__ import annotations

import ast
import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacenote.replay import base64
from pacenote.replay.errors import PayloadError, RecordError
from pacenote.replay.record import RoutingRecord, expert_dtype
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.wire import all_layers, base64_length, moe_columns

_MAGIC = b"\x93NUMPY"
_MOST_HEADER = 4096
_WIDEST = 8


def decode_vllm(
    payload: str | bytes,
    geometry: RoutingGeometry,
    *,
    rows: int,
    provenance: int | NDArray[Any],
    version: int | NDArray[Any],
) -> RoutingRecord:
    """The rows of one vLLM choice (`choices[i].routed_experts`).

    Args:
        payload: base64 text, as text or as the bytes that came.
        geometry: the served model's; MoE layers are taken by global id, whatever stands at dense layers is dropped.
        rows: rows that the answer must hold: prompt + output tokens - 1 - routed_experts_prompt_start.
        provenance: one code for all R rows, or [R].
        version: weight version, one for all R rows, or [R].

    Raises:
        PayloadError: not base64 of a numpy array of integers [rows, num_hidden_layers, K], or an expert id out of
            range. Texts that are too long are refused before they are decoded; nothing is unpickled.
    """
    if rows < 0:
        raise PayloadError(f"expected rows >= 0, got {rows}: fewer tokens than routed_experts_prompt_start")
    ids = _array(_bytes(payload, geometry, rows), geometry, rows)
    try:
        return RoutingRecord.of(ids[:, moe_columns(geometry)], geometry, provenance=provenance, version=version)
    except RecordError as error:
        raise PayloadError(f"routed experts of vLLM: {error}") from error


def encode_vllm(record: RoutingRecord, geometry: RoutingGeometry) -> str:
    """The payload that vLLM would send for these rows, for engines and tests. MISSING rows are zeros.

    Raises:
        PayloadError: the record is of another model than the geometry.
    """
    file = io.BytesIO()
    np.save(file, all_layers(record, geometry, expert_dtype(geometry.num_experts)), allow_pickle=False)
    return base64.encode(file.getvalue())


def _bytes(payload: Any, geometry: RoutingGeometry, rows: int) -> bytes:
    if not isinstance(payload, str | bytes):
        raise PayloadError(f"expected routed experts as base64 text of a numpy array, got {type(payload).__name__}")
    most = base64_length(_MOST_HEADER + rows * geometry.num_layers * geometry.top_k * _WIDEST)
    if len(payload) > most:
        raise PayloadError(
            f"expected at most {most} characters for {rows} rows x {geometry.num_layers} layers x {geometry.top_k} "
            f"experts, got {len(payload)}: too large, or of another model"
        )
    try:
        return base64.decode(payload)
    except ValueError as error:
        raise PayloadError(
            f"expected routed experts as base64 of a numpy array, got text that is not: {error}"
        ) from error


def _array(raw: bytes, geometry: RoutingGeometry, rows: int) -> NDArray[Any]:
    """The ids [rows, num_layers, K], a view of the file's bytes."""
    shape, dtype, start = _header(raw)
    expected = (rows, geometry.num_layers, geometry.top_k)
    if dtype.kind not in "iu":
        raise PayloadError(f"expected routed experts as integers, got {dtype}")
    if shape != expected:
        raise PayloadError(
            f"expected routed experts of shape {list(expected)} (tokens - 1 - start, all layers, experts a token), "
            f"got {list(shape)}: the engine and the session disagree on tokens, on routed_experts_prompt_start or the "
            "model"
        )
    size = rows * geometry.num_layers * geometry.top_k * dtype.itemsize
    if len(raw) - start != size:
        raise PayloadError(f"expected {size} bytes of {dtype} after the array's header, got {len(raw) - start}")
    return np.frombuffer(raw, dtype=dtype, offset=start).reshape(expected)


def _header(raw: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and where the data starts. numpy's own reader makes the array that a header asks for."""
    wide = raw[6:7] != b"\x01"
    start = 12 if wide else 10
    if raw[:6] != _MAGIC or len(raw) < start:
        raise PayloadError(f"expected a numpy array, which starts with {_MAGIC!r}, got {raw[:6]!r}")
    stop = start + int.from_bytes(raw[8:start], "little")
    if stop > min(len(raw), _MOST_HEADER):
        raise PayloadError(f"expected a numpy header inside {min(len(raw), _MOST_HEADER)} bytes, got {stop} bytes")
    try:
        fields = ast.literal_eval(raw[start:stop].decode("latin1"))
        shape, descr, fortran = fields["shape"], fields["descr"], fields["fortran_order"]
        if fortran or not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?[a-zA-Z]\d{0,2}", descr):
            raise ValueError(f"dtype {descr!r}, fortran order {fortran}")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape!r}")
        return shape, np.dtype(descr), stop
    except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError) as error:
        raise PayloadError(f"expected a numpy header of dtype and shape in C order, got another: {error}") from error
