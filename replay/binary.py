"""Our own form of a routing record: a header, runs of provenance and versions, ids in their narrow dtype, a checksum.

Little-endian throughout. Header, 40 bytes: magic `PNRR`, u16 form (1), u16 L, u32 K, u32 E, u64 R, u32 runs of
provenance, u32 runs of versions, u32 zeros, u32 CRC-32 of all bytes but these four. Then L u32 global layer ids; the
runs, each (i32 value, u32 rows); zeros up to a multiple of 8; ids [R, L, K], one byte each if E <= 256, else two.

Legend: R rows, L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacenote.kernels.spec import MISSING
from pacenote.replay.errors import PayloadError, RecordError
from pacenote.replay.record import RoutingRecord, expert_dtype, runs

MAGIC, FORM = b"PNRR", 1
_HEADER = struct.Struct("<4sHHIIQIII")
_CHECKSUM = struct.Struct("<I")
_START = _HEADER.size + _CHECKSUM.size
_RUN = np.dtype([("value", "<i4"), ("rows", "<u4")])


def encode_record(record: RoutingRecord) -> bytes:
    """The record's bytes. Ids of MISSING rows travel as they are.

    Raises:
        PayloadError: a record without layers or experts, whose rows no byte would stand for.
    """
    layers, top_k = len(record.layers), record.top_k
    if not layers or not top_k:
        raise PayloadError(f"expected a record of at least one layer and expert a token, got {layers} and {top_k}")
    parts = [_packed(record.provenance), _packed(record.version)]
    header = _HEADER.pack(MAGIC, FORM, layers, top_k, record.num_experts, record.rows, len(parts[0]), len(parts[1]), 0)
    body = np.array(record.layers, dtype="<u4").tobytes() + parts[0].tobytes() + parts[1].tobytes()
    body += bytes(-(_START + len(body)) % 8)
    dtype = expert_dtype(record.num_experts).newbyteorder("<")
    ids = np.ascontiguousarray(record.experts, dtype=dtype).data.cast("B") if record.rows else b""
    checksum = zlib.crc32(ids, zlib.crc32(body, zlib.crc32(header)))
    return b"".join((header, _CHECKSUM.pack(checksum), body, ids))


def decode_record(data: bytes | bytearray | memoryview) -> RoutingRecord:
    """The record of `encode_record`. Its ids are a view of `data`, not a copy.

    Raises:
        PayloadError: not such bytes, another form, a length that is not what the header says, a wrong checksum, runs
            that do not cover the rows, an id out of range. Nothing is allocated by what a header claims: the length is
            compared first, and each row it claims has a byte in it.
    """
    view = memoryview(data).cast("B")
    if len(view) < _START:
        raise PayloadError(f"expected a routing record of at least {_START} bytes, got {len(view)}")
    magic, form, layers, top_k, num_experts, rows, provenances, versions, zeros = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError(f"expected a routing record, which starts with {MAGIC!r}, got {bytes(magic)!r}")
    if form != FORM or zeros:
        raise PayloadError(f"expected form {FORM} of a routing record, got {form}: written by another version")
    if not layers or not 1 <= top_k <= num_experts <= 65536:
        raise PayloadError(
            f"expected layers, and 1 <= experts a token <= experts <= 65536, got {layers}, {top_k} and {num_experts}"
        )
    dtype = expert_dtype(num_experts).newbyteorder("<")
    first = _START + 4 * layers + _RUN.itemsize * (provenances + versions)
    first += -first % 8
    expected = first + rows * layers * top_k * dtype.itemsize
    if len(view) != expected:
        raise PayloadError(
            f"expected {expected} bytes for {rows} rows x {layers} layers x {top_k} experts of {dtype.itemsize} bytes, "
            f"got {len(view)}: truncated, or joined with something else"
        )
    checksum = zlib.crc32(view[_START:], zlib.crc32(view[: _HEADER.size]))
    if checksum != _CHECKSUM.unpack_from(view, _HEADER.size)[0]:
        raise PayloadError("expected the checksum of a routing record to fit its bytes, it does not: they were changed")
    experts = np.frombuffer(view, dtype=dtype, offset=first).reshape(rows, layers, top_k)
    runs_at = _START + 4 * layers
    provenance, version = (
        _unpacked(np.frombuffer(view, dtype=_RUN, count=count, offset=start), rows, kind, name)
        for count, start, kind, name in (
            (provenances, runs_at, np.uint8, "provenance"),
            (versions, runs_at + _RUN.itemsize * provenances, np.int32, "versions"),
        )
    )
    if experts.size and int(experts.max()) >= num_experts:
        known = experts[provenance != MISSING]
        if known.size and int(known.max()) >= num_experts:
            raise PayloadError(f"expected expert ids in 0..{num_experts - 1}, got {int(known.max())}")
    try:
        return RoutingRecord(
            experts=experts,
            provenance=provenance,
            version=version,
            layers=tuple(np.frombuffer(view, dtype="<u4", count=layers, offset=_START).tolist()),
            num_experts=num_experts,
        )
    except RecordError as error:
        raise PayloadError(f"a routing record's bytes: {error}") from error


def _packed(values: NDArray[Any]) -> NDArray[Any]:
    """Runs of values [R] as an array of _RUN."""
    return np.array([(value, stop - start) for value, start, stop in runs(values)], dtype=_RUN)


def _unpacked(packed: NDArray[Any], rows: int, dtype: Any, name: str) -> NDArray[Any]:
    """Values [rows] of runs, which must add up to the rows and fit the dtype."""
    counts, info = packed["rows"].astype(np.uint64), np.iinfo(dtype)
    if int(counts.sum()) != rows or (len(counts) and int(counts.max()) > rows):
        raise PayloadError(f"expected runs of {name} that cover {rows} rows, got {int(counts.sum())}")
    if len(packed) and not info.min <= int(packed["value"].min()) <= int(packed["value"].max()) <= info.max:
        raise PayloadError(f"expected {name} within {info.dtype}, got {packed['value'].tolist()[:8]}")
    return np.repeat(packed["value"].astype(dtype), counts.astype(np.int64))
