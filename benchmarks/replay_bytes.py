"""What the routes of a token weigh against its other fields: on the wire, in host memory, on the device.

Counted, not computed: bodies are encoded, samples packed. Everything is a position's, the input of one token, of which
a sample of N tokens has N - 1; a sample's own header is spread over them.

Legend: N tokens of a sample, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import wire
from benchmarks.models import MODELS
from pacenote.kernels.pack import PackedBatch
from pacenote.kernels.spec import DECODE, PREFILL
from pacenote.replay.binary import encode_record
from pacenote.replay.record import RoutingRecord
from pacenote.rollout.samples import encode_samples
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.batch import Sample, pack_samples
from pacenote.trainer.optim import OptimConfig

FIELDS = ("tokens", "loss_mask", "logprobs", "version")
"""A trajectory's arrays [N] beside its routes."""
PACKED = ("tokens", "targets", "loss_mask", "logprobs", "advantages", "positions", "segment_ids")
"""A packed batch's arrays [T] beside its routes."""


def without_routes(trajectory: Trajectory) -> Trajectory:
    """The same tokens of an engine that sends no routes."""
    rows = np.zeros(len(trajectory) - 1, np.uint8)
    return replace(trajectory, experts=None, num_experts=None, layers=(), provenance=rows)


def record(trajectory: Trajectory) -> RoutingRecord:
    """Its routes as they travel."""
    assert trajectory.experts is not None
    assert trajectory.num_experts is not None
    return RoutingRecord(
        experts=trajectory.experts,
        provenance=trajectory.provenance,
        version=trajectory.version[:-1],
        layers=trajectory.layers,
        num_experts=trajectory.num_experts,
    )


def count(trajectories: Sequence[Trajectory], batches: Sequence[PackedBatch]) -> dict[str, int]:
    """Bytes of all of them.

    Args:
        trajectories: with routes.
        batches: the same, packed.

    Returns:
        `wire_routes`: bodies of `replay.binary`. `samples_routes` and `samples_other`: the answer to POST .../samples,
        what routes add to it and what it is without. `host_*`: arrays of the trajectories, `device_*`: of the batches;
        `*_routes` have ids, and provenance or state.
    """
    bare = len(encode_samples([without_routes(t) for t in trajectories]))
    routes = [batch.routes for batch in batches if batch.routes is not None]
    return {
        "wire_routes": sum(len(encode_record(record(t))) for t in trajectories),
        "samples_routes": len(encode_samples(trajectories)) - bare,
        "samples_other": bare,
        "host_routes": sum(record(t).experts.nbytes + t.provenance.nbytes for t in trajectories),
        "host_other": sum(getattr(t, name).nbytes for t in trajectories for name in FIELDS),
        "device_routes": sum(nbytes(r.rows) + nbytes(r.state) for r in routes),
        "device_other": sum(nbytes(getattr(batch, name)) for batch in batches for name in PACKED),
    }


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor [...]."""
    return tensor.numel() * tensor.element_size()


def row(model: str, trajectories: Sequence[Trajectory], batches: Sequence[PackedBatch], **more: int) -> dict[str, Any]:
    """A row of the benchmark: bytes in all, and a position's."""
    first = record(trajectories[0])
    rows = sum(len(t) - 1 for t in trajectories)
    ids = {"experts": first.num_experts, "k": first.top_k, "layers": len(first.layers), "id": first.experts.itemsize}
    counts = {**count(trajectories, batches), **more}
    return {
        "model": model, "tokens": rows, "work": "bytes", "implementation": "pacenote", "samples": len(trajectories),
        **ids,
        **{f"{name}_bytes": value for name, value in counts.items()},
        **{f"{name}_a_token": value / rows for name, value in counts.items()},
    }  # fmt: skip


def of_real_model(name: str, tokens: int, device: str) -> dict[str, Any]:
    """The row of one sample with a real model's routes; of the model nothing but its routing is needed."""
    where = wire.geometry(name, MODELS[name])
    made = wire.make(where, tokens, 0)
    generator = np.random.default_rng(0)
    trajectory = sample(generator.integers(0, MODELS[name].vocab, tokens + 1), made)
    packed = pack_samples([Sample(trajectory, 1.0)], OptimConfig(), device)
    assert packed is not None
    return row(name, [trajectory], [packed.batch])


def sample(tokens: Any, made: RoutingRecord) -> Trajectory:
    """A prompt of half the tokens [N], an answer of the rest, and their routes [N - 1, L, K]."""
    count, prompt = len(tokens), len(tokens) // 2
    generated = np.arange(count) >= prompt
    return Trajectory(
        tokens=np.asarray(tokens, np.int32),
        loss_mask=generated.astype(np.uint8),
        logprobs=np.where(generated, -1.0, 0.0).astype(np.float32),
        experts=made.experts,
        provenance=np.where(generated[:-1], DECODE, PREFILL).astype(np.uint8),
        version=np.zeros(count, np.int32),
        layers=made.layers,
        num_experts=made.num_experts,
    )
