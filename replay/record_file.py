"""Routing records in files: a safetensors file, which is read into memory or mapped.

Tensors `experts` [R, L, K] uint8 | uint16, `provenance` [R] uint8, `version` [R] int32, as in RoutingRecord; the
header's `__metadata__` has one entry, `pacenote`: JSON {"layers", "num_experts"}. Format of the file:
github.com/huggingface/safetensors.

Legend: R rows, L MoE layers, K experts a token.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pacenote.replay.errors import PayloadError, RecordError
from pacenote.replay.record import RoutingRecord

_ENTRY = "pacenote"
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
_MOST_HEADER = 1 << 20


def write_record(record: RoutingRecord, path: Path) -> None:
    """Write the file, whole or not at all: it takes the place of an older one at the end."""
    arrays = {name: np.ascontiguousarray(getattr(record, name)) for name in ("experts", "provenance", "version")}
    note = json.dumps({"layers": record.layers, "num_experts": record.num_experts})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(save(arrays, {_ENTRY: note}))
    part.replace(path)


def read_record(path: Path) -> RoutingRecord:
    """The record of a file, in memory.

    Raises:
        PayloadError: not such a file, or one whose parts do not fit together.
    """
    return _record(np.frombuffer(path.read_bytes(), dtype=np.uint8), path)


def map_record(path: Path) -> RoutingRecord:
    """The record of a file, its arrays views of the mapped file: rows are read when they are looked at.

    The file must stay as it is while the record lives; `write_record` puts a new file in its place instead.

    Raises:
        PayloadError: as `read_record`.
    """
    if not path.stat().st_size:
        raise PayloadError(f"expected a safetensors file of a routing record in {path}, got an empty file")
    return _record(np.memmap(path, dtype=np.uint8, mode="r"), path)


def _record(data: NDArray[np.uint8], path: Path) -> RoutingRecord:
    """The record whose arrays are views of a file's bytes."""
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if not 8 < start <= min(len(data), _MOST_HEADER):
            raise ValueError(f"a header of {start - 8} bytes in a file of {len(data)}")
        header = json.loads(data[8:start].tobytes())
        note = json.loads(header["__metadata__"][_ENTRY])
        arrays = {name: _view(data[start:], header[name]) for name in ("experts", "provenance", "version")}
        return RoutingRecord(**arrays, layers=tuple(note["layers"]), num_experts=note["num_experts"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        kind = "" if isinstance(error, RecordError) else f"{type(error).__name__}: "
        raise PayloadError(f"expected a safetensors file of a routing record in {path}, got {kind}{error}") from error


def _view(data: NDArray[np.uint8], entry: Any) -> NDArray[Any]:
    """A tensor of the file, as a view. Offsets are compared with the shape and the file before anything is made."""
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, start, stop)):
        raise ValueError(f"shape {shape} at {start}..{stop}")
    count = 1
    for size in shape:
        count *= size
    if stop - start != count * dtype.itemsize or stop > len(data):
        raise ValueError(f"{entry['dtype']} {shape} at {start}..{stop} of {len(data)} bytes")
    return (
        np.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(shape) if count else np.zeros(shape, dtype)
    )
