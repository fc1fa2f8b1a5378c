"""Trajectories as one safetensors file: the body of POST /sessions/{id}/samples.

For sample i: `i.tokens` [N] int32, `i.loss_mask` [N] uint8, `i.logprobs` [N] float32, `i.experts` [N-1, L, K] uint8 |
uint16 (absent without routes), `i.provenance` [N-1] uint8, `i.version` [N] int32. The header's `__metadata__` holds one
entry, `pacenote`, a JSON text: {"count", "samples": [{"status", "layers", "num_experts", "spans": [[role, start, stop,
generated]...]}...]}. Legend: N tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pacenote.rollout.trajectory import Trajectory

_ENTRY = "pacenote"
_ARRAYS = ("tokens", "loss_mask", "logprobs", "provenance", "version")


def encode_samples(trajectories: Sequence[Trajectory]) -> bytes:
    """The file's bytes. Zero trajectories make a valid file of zero samples."""
    arrays: dict[str, NDArray[Any]] = {}
    notes = []
    for index, trajectory in enumerate(trajectories):
        for name in _ARRAYS:
            arrays[f"{index}.{name}"] = np.ascontiguousarray(getattr(trajectory, name))
        if trajectory.experts is not None:
            arrays[f"{index}.experts"] = np.ascontiguousarray(trajectory.experts)
        notes.append(
            {
                "status": trajectory.status,
                "layers": trajectory.layers,
                "num_experts": trajectory.num_experts,
                "spans": trajectory.spans,
            }
        )
    return bytes(save(arrays, {_ENTRY: json.dumps({"count": len(notes), "samples": notes})}))


def decode_samples(data: bytes) -> list[Trajectory]:
    """The trajectories of a file; each checks itself.

    Raises:
        ValueError: not such a file, or a sample whose parts do not fit together.
    """
    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        notes = json.loads(header["__metadata__"][_ENTRY])["samples"]
        return [_sample(arrays, index, note) for index, note in enumerate(notes)]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected samples as safetensors written by a pacenote session server, got {error!r}"
        ) from error


def _sample(arrays: dict[str, NDArray[Any]], index: int, note: dict[str, Any]) -> Trajectory:
    tokens, mask, logprobs, provenance, version = (arrays[f"{index}.{name}"] for name in _ARRAYS)
    return Trajectory(
        tokens=tokens,
        loss_mask=mask,
        logprobs=logprobs,
        experts=arrays.get(f"{index}.experts"),
        provenance=provenance,
        version=version,
        layers=tuple(note["layers"]),
        num_experts=note["num_experts"],
        spans=tuple((role, start, stop, generated) for role, start, stop, generated in note["spans"]),
        status=note["status"],
    )
