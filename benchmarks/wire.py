"""Decoding a turn's routes on the host: our bytes, SGLang's and vLLM's fields, lists of integers in JSON.

    python -m benchmarks.wire --tokens 8192 32768 --out benchmarks/results

Host work wherever it runs: the processor counts, not the device. What is timed goes from the body as it came to a
checked RoutingRecord; of the engines' forms that is JSON. The note of a row has its size.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks import harness
from benchmarks.case import OURS, Case, Floor, Implementation
from benchmarks.models import MODELS, Model
from pacenote.kernels.spec import DECODE
from pacenote.replay.binary import decode_record, encode_record
from pacenote.replay.record import RoutingRecord, expert_dtype
from pacenote.replay.record_file import map_record, write_record
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.vllm import decode_vllm, encode_vllm
from pacenote.replay.wire import decode_sglang, encode_sglang

DENSE = {"glm-4.7-flash": 1, "deepseek-v3": 3, "kimi-k2": 1}
"""Dense layers before the MoE layers; engines send them as zeros."""

Encode = Callable[[RoutingRecord], bytes]
Decode = Callable[[bytes], RoutingRecord]


def geometry(name: str, model: Model) -> RoutingGeometry:
    """The model's routing."""
    dense = DENSE.get(name, 0)
    layers = tuple(range(dense, dense + model.layers))
    return RoutingGeometry(num_layers=dense + model.layers, layers=layers, num_experts=model.experts, top_k=model.k)


def make(where: RoutingGeometry, rows: int, seed: int) -> RoutingRecord:
    """A record of one version."""
    shape = (rows, len(where.layers), where.top_k)
    ids = np.random.default_rng(seed).integers(0, where.num_experts, shape)
    return RoutingRecord.of(ids, where, provenance=DECODE, version=3)


def check(made: RoutingRecord, result: Any) -> None:
    """What was decoded is what was encoded.

    Raises:
        AssertionError: it is not.
    """
    assert result == made, "another record"


def form(encode: Encode, decode: Decode, rows: int, size: int) -> Implementation[RoutingRecord]:
    """Somebody's form; `size` bytes of it are these rows."""
    return Implementation(
        bind=lambda made: partial(decode, encode(made)), note=f"{size} bytes, {size / rows:.1f} a token", on_host=True
    )


def forms(where: RoutingGeometry, rows: int) -> dict[str, tuple[Encode, Decode]]:
    """Encoders and decoders by name."""
    known: dict[str, Any] = {"rows": rows, "provenance": DECODE, "version": 3}

    def listed(body: bytes) -> RoutingRecord:
        ids = np.array(orjson.loads(body)["routed_experts"], dtype=np.int32)
        return RoutingRecord.of(ids[:, list(where.layers)], where, provenance=DECODE, version=3)

    def lists(made: RoutingRecord) -> bytes:
        ids = np.zeros((rows, where.num_layers, where.top_k), dtype=np.int32)
        ids[:, list(where.layers)] = made.experts
        return orjson.dumps({"routed_experts": ids}, option=orjson.OPT_SERIALIZE_NUMPY)

    return {
        OURS: (encode_record, decode_record),
        "vllm": (
            lambda made: orjson.dumps({"routed_experts": encode_vllm(made, where)}),
            lambda body: decode_vllm(orjson.loads(body)["routed_experts"], where, **known),
        ),
        "sglang": (
            lambda made: orjson.dumps({"routed_experts": encode_sglang(made, where)}),
            lambda body: decode_sglang(orjson.loads(body)["routed_experts"], where, **known),
        ),
        "json": (lists, listed),
    }


def mapped(folder: Path, rows: int) -> Implementation[RoutingRecord]:
    """A file, mapped: rows are not read before they are looked at."""

    def bind(made: RoutingRecord) -> Callable[[], Any]:
        path = folder / f"{id(made)}.safetensors"
        write_record(made, path)
        return lambda: map_record(path)

    return Implementation(bind=bind, note="a safetensors file; no row is read", on_host=True)


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[RoutingRecord]]:
    """One turn of `tokens` rows."""
    model = MODELS[name]
    where = geometry(name, model)
    sample = make(where, tokens, 0)
    with tempfile.TemporaryDirectory() as folder:
        yield Case(
            model=name,
            tokens=tokens,
            work="decode",
            shape={"experts": model.experts, "k": model.k, "layers": where.num_layers},
            floor=Floor(bytes=tokens * model.layers * model.k * expert_dtype(model.experts).itemsize),
            make=partial(make, where, tokens),
            check=check,
            implementations={
                **{
                    form_name: form(encode, decode, tokens, len(encode(sample)))
                    for form_name, (encode, decode) in forms(where, tokens).items()
                },
                "file, mapped": mapped(Path(folder), tokens),
            },
        )


if __name__ == "__main__":
    sys.exit(harness.main("wire", __doc__.splitlines()[0], cases))
