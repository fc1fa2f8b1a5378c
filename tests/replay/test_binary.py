"""Our binary form, and records in files: exact both ways, mapped without a copy, and every malformed one refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.replay.binary import decode_record, encode_record
from pacenote.replay.errors import PayloadError
from pacenote.replay.record import CACHED, DECODE, MISSING, PREFILL, RoutingRecord, expert_dtype
from pacenote.replay.record_file import map_record, read_record, write_record


def record(
    rows: int = 6, *, num_experts: int = 300, layers: tuple[int, ...] = (1, 2, 4), seed: int = 0
) -> RoutingRecord:
    random = np.random.default_rng(seed)
    return RoutingRecord(
        experts=random.integers(0, num_experts, (rows, len(layers), 2)).astype(expert_dtype(num_experts)),
        provenance=random.choice([MISSING, PREFILL, DECODE, CACHED], rows).astype(np.uint8),
        version=random.integers(-1, 3, rows).astype(np.int32),
        layers=layers,
        num_experts=num_experts,
    )


MADE = [record(0), record(1), record(7), record(7, num_experts=256, layers=(0,)), record(50, num_experts=2, seed=3)]


@pytest.mark.parametrize("made", MADE, ids=lambda made: f"{made.rows}x{made.num_experts}")
def test_bytes_and_files_are_the_record(made: RoutingRecord, tmp_path: Path) -> None:
    write_record(made, tmp_path / "one")
    for back in (decode_record(encode_record(made)), read_record(tmp_path / "one"), map_record(tmp_path / "one")):
        assert back == made
        assert np.array_equal(back.experts, made.experts)
        assert back.experts.dtype == made.experts.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_form_is_small() -> None:
    made = RoutingRecord(
        experts=np.zeros((1000, 46, 4), dtype=np.uint8), provenance=np.full(1000, DECODE, dtype=np.uint8),
        version=np.zeros(1000, dtype=np.int32), layers=tuple(range(1, 47)), num_experts=64,
    )  # fmt: skip
    assert 0 <= len(encode_record(made)) - 1000 * 46 * 4 < 256


def test_decoding_makes_no_copy_of_the_ids() -> None:
    data = bytearray(encode_record(record(7)))
    back = decode_record(data)
    before = int(back.experts[-1, -1, -1])
    data[-2] ^= 1
    assert int(back.experts[-1, -1, -1]) == before ^ 1


def test_a_mapped_record_is_the_file_and_not_a_copy(tmp_path: Path) -> None:
    made, path = record(40_000, num_experts=64), tmp_path / "large"
    write_record(made, path)
    tracemalloc.start()
    mapped = map_record(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000 < made.experts.nbytes
    assert not mapped.experts.flags.writeable
    base: Any = mapped.experts
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert mapped.slice(39_000, 40_000) == made.slice(39_000, 40_000)
    write_record(made.truncate(3), path)  # a new file in its place: the mapped one stays as it was
    assert mapped == made
    assert map_record(path).rows == 3


def forged(**changes: Any) -> bytes:
    """A record's bytes with other header fields, their checksum right."""
    data = encode_record(record(4))
    names = ("magic", "form", "layers", "top_k", "num_experts", "rows", "provenances", "versions", "zeros")
    header = dict(zip(names, struct.unpack_from("<4sHHIIQIII", data), strict=True)) | changes
    head = struct.pack("<4sHHIIQIII", *header.values())
    return head + struct.pack("<I", zlib.crc32(data[40:], zlib.crc32(head))) + data[40:]


def test_a_forgery_that_changes_nothing_is_read() -> None:
    assert decode_record(forged()) == record(4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "at least 40 bytes, got 0"),
        (b"x" * 40, "starts with b'PNRR', got b'xxxx'"),
        (forged(form=2), "form 1 .* got 2"),
        (forged(zeros=1), "form 1"),
        (forged(layers=0), "got 0, 2 and 300"),
        (forged(top_k=0), "got 3, 0 and 300"),
        (forged(top_k=301), "got 3, 301 and 300"),
        (forged(num_experts=65537), "got 3, 2 and 65537"),
        (forged(rows=5), "for 5 rows"),
        (forged(rows=2**63), "truncated"),
        (forged(top_k=3), "x 3 experts"),
        (forged(num_experts=200), "of 1 bytes"),
        (forged(provenances=2**32 - 1), "truncated"),
        (forged(num_experts=257), "ids in 0..256"),
        (encode_record(record(4))[:-1], "truncated"),
        (encode_record(record(4)) + b"x", "joined"),
        (encode_record(record(4))[:-1] + b"x", "checksum"),
    ],
)
def test_hostile_bytes(data: bytes, words: str) -> None:
    tracemalloc.start()
    with pytest.raises(PayloadError, match=words):
        decode_record(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(("run", "words"), [(0, "provenance that cover 4 rows"), (1, "provenance within uint8")])
def test_hostile_runs(run: int, words: str) -> None:
    data = bytearray(encode_record(record(4)))
    struct.pack_into("<iI", data, 40 + 12, *((1, 2**32 - 1), (700, 1))[run])
    struct.pack_into("<I", data, 36, zlib.crc32(data[40:], zlib.crc32(data[:36])))
    with pytest.raises(PayloadError, match=words):
        decode_record(data)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(1, 255), cut=st.integers(0, 200))
def test_any_changed_byte_is_noticed(place: int, byte: int, cut: int) -> None:
    data = bytearray(encode_record(record(4)))
    data[place % len(data)] ^= byte
    with pytest.raises(PayloadError):
        decode_record(data)
    with pytest.raises(PayloadError):
        decode_record(encode_record(record(4))[: max(0, len(data) - 1 - cut)])


def test_a_record_without_columns_has_no_bytes() -> None:
    bare = RoutingRecord(
        experts=np.zeros((3, 0, 2), dtype=np.uint8), provenance=np.zeros(3, dtype=np.uint8),
        version=np.zeros(3, dtype=np.int32), layers=(), num_experts=4,
    )  # fmt: skip
    with pytest.raises(PayloadError, match="at least one layer"):
        encode_record(bare)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


META = {"__metadata__": {"pacenote": '{"layers": [0], "num_experts": 4}'}}
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234",
        b"\xff" * 8 + b"{}",
        safetensors(b"not json"),
        safetensors([]),
        safetensors({}),
        safetensors(b"[" * 100_000),
        safetensors({**META, "experts": EMPTY}),
        safetensors({**META, **dict.fromkeys(("experts", "provenance", "version"), EMPTY)}),
        safetensors({**META, "experts": {"dtype": "U8", "shape": [2**40, 1, 1], "data_offsets": [0, 2**40]}}),
        safetensors({**META, "experts": {"dtype": "U8", "shape": [-1, -1, 1], "data_offsets": [0, 1]}}, b"x"),
        safetensors({**META, "experts": {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]}}, b"nanx"),
        safetensors({**META, "experts": {"dtype": "U8", "shape": [2, 1, 1], "data_offsets": [0, 1]}}, b"x"),
    ],
)
def test_hostile_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    for read in (read_record, map_record):
        with pytest.raises(PayloadError, match=r"expected a safetensors file of a routing record in .*bad, got"):
            read(path)
