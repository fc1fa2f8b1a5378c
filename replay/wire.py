"""Engine payloads <-> RoutingRecord.

SGLang (0.5.23, `--enable-return-routed-experts`) sends base64 of little-endian int32 [rows, num_layers, K]: rows are
the input tokens from `routed_experts_start_len` on, the layer axis counts *all* layers, dense ones are zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacenote.replay import base64
from pacenote.replay.errors import PayloadError, RecordError
from pacenote.replay.record import MISSING, RoutingRecord
from pacenote.replay.spec import RoutingGeometry

_WIRE = np.dtype("<i4")


def decode_sglang(
    payload: str | bytes,
    geometry: RoutingGeometry,
    *,
    rows: int,
    provenance: int | NDArray[Any],
    version: int | NDArray[Any],
) -> RoutingRecord:
    """The rows of one SGLang answer (`meta_info.routed_experts`).

    Args:
        payload: base64 text, as text or as the bytes that came.
        geometry: the served model's; MoE layers are taken by global id, whatever stands at dense layers is dropped.
        rows: rows that the answer must hold: prompt + output tokens - 1 - routed_experts_start_len.
        provenance: one code for all R rows, or [R].
        version: weight version, one for all R rows, or [R].

    Raises:
        PayloadError: not base64, another number of rows, or an expert id out of range. Lengths are checked before
            anything is decoded, ids before they are narrowed.
    """
    if rows < 0:
        raise PayloadError(f"expected rows >= 0, got {rows}: fewer tokens than routed_experts_start_len")
    ids = _int32(payload, geometry, rows)[:, moe_columns(geometry)]
    try:
        return RoutingRecord.of(ids, geometry, provenance=provenance, version=version)
    except RecordError as error:
        raise PayloadError(f"routed experts of an engine: {error}") from error


def encode_sglang(record: RoutingRecord, geometry: RoutingGeometry) -> str:
    """The payload that SGLang would send for these rows, for engines. MISSING rows are zeros, as SGLang has it.

    Raises:
        PayloadError: the record is of another model than the geometry.
    """
    return base64.encode(all_layers(record, geometry, _WIRE).tobytes())


def all_layers(record: RoutingRecord, geometry: RoutingGeometry, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Ids [R, num_layers, K] as engines send them: dense layers and MISSING rows are zeros.

    Raises:
        PayloadError: the record is of another model than the geometry.
    """
    mine, theirs = (geometry.layers, geometry.top_k), (record.layers, record.top_k)
    if mine != theirs or record.num_experts != geometry.num_experts:
        raise PayloadError(
            f"expected a record of (layers, K, E) = {(*mine, geometry.num_experts)}, "
            f"got {(*theirs, record.num_experts)}"
        )
    ids = np.zeros((record.rows, geometry.num_layers, geometry.top_k), dtype=dtype)
    ids[:, list(geometry.layers)] = record.experts
    ids[record.provenance == MISSING] = 0
    return ids


def moe_columns(geometry: RoutingGeometry) -> slice | list[int]:
    """What takes the MoE layers from an axis of all layers; where they stand together a slice, which copies nothing."""
    first, last = geometry.layers[0], geometry.layers[-1]
    together = last - first + 1 == len(geometry.layers)
    return slice(first, last + 1) if together else list(geometry.layers)


def base64_length(count: int) -> int:
    """Characters of base64, padding included, for that many bytes."""
    return (count + 2) // 3 * 4


def _int32(payload: str | bytes, geometry: RoutingGeometry, rows: int) -> NDArray[np.int32]:
    """Ids [rows, num_layers, K] int32, as sent."""
    if not isinstance(payload, str | bytes):
        raise PayloadError(f"expected routed experts as base64 text, got {type(payload).__name__}")
    row_bytes = geometry.num_layers * geometry.top_k * _WIRE.itemsize
    shape = f"{rows} rows x {geometry.num_layers} layers x {geometry.top_k} experts of int32"
    if len(payload) != base64_length(rows * row_bytes):
        raise PayloadError(
            f"expected routed experts of {shape}, {base64_length(rows * row_bytes)} characters, got {len(payload)}"
            f"{_hint(len(payload), geometry)}"
        )
    try:
        raw = base64.decode(payload)
    except ValueError as error:
        raise PayloadError(f"expected routed experts as base64 of {shape}, got text that is not: {error}") from error
    if len(raw) != rows * row_bytes:
        raise PayloadError(f"expected routed experts of {shape}, {rows * row_bytes} bytes, got {len(raw)}")
    return np.frombuffer(raw, dtype=_WIRE).reshape(rows, geometry.num_layers, geometry.top_k)


def _hint(length: int, geometry: RoutingGeometry) -> str:
    """What the length would fit, to tell an off-by-some from another model."""
    row_bytes = geometry.num_layers * geometry.top_k * _WIRE.itemsize
    near = length * 3 // 4 // row_bytes
    if base64_length(near * row_bytes) == length:
        return f", which is {near} rows: the engine and the session disagree on tokens or on routed_experts_start_len"
    return ": truncated, or sent by an engine of another model"
