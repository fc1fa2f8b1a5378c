"""The road with the Triton kernels and the road with their definitions take the same training step.

Runs where the kernels do: on a GPU, and under TRITON_INTERPRET=1. What a definition decides in integers or copies (the
packed batch, the experts, the counts) is the same bit for bit. Scores, and what follows from them, are rounded: there
the step with kernels is no further from a float64 step than twice the step with definitions, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pacenote.kernels import launch, pack_triton, policy_triton, route_triton
from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.spec import MISSING
from pacenote.replay.audit import COUNTERS, Audit
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.batch import microbatches
from pacenote.trainer.guard import Reason
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.step import prepare, update
from tests.kernels import interpreter
from tests.kernels.route_oracle import no_worse
from tests.spy import spy
from tests.trainer.recorded import samples

GPU = torch.cuda.is_available() and not launch.INTERPRETED
if not (GPU or launch.INTERPRETED):
    pytest.skip(
        "runs where Triton kernels do: in the run with TRITON_INTERPRET=1, or on a GPU", allow_module_level=True
    )
if launch.INTERPRETED:
    interpreter.install()

DEVICE = "cuda" if GPU else "cpu"
LAUNCHERS = (
    (pack_triton, "pack"),
    (route_triton, "forward"),
    (route_triton, "backward"),
    (policy_triton, "policy_loss"),
    (policy_triton, "policy_gradient"),
)
CONFIG = PolicyConfig(entropy_coef=0.01, normalize="sequence")


@dataclass(frozen=True)
class Step:
    """What a training step came to."""

    batches: list[PackedBatch]
    experts: list[Tensor]
    logprobs: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Any]
    audit: Audit


def step(directory: Path, trajectories: list[Trajectory], *, double: bool = False) -> Step:
    """One optimizer step from the saved weights, its gradients kept instead of applied."""
    backend = HfBackend(directory, OptimConfig(microbatch_tokens=90), device=DEVICE, temperature=1.0)
    if double:
        backend.model.double()
    items = microbatches(samples(trajectories), backend.config, DEVICE)
    batches = [item.batch for item in items]
    experts = []
    for batch in batches:
        with torch.no_grad(), backend.routed(batch.routes), backend.replay.record() as record:
            backend.logprobs(batch)
            experts.append(record.rows().cpu())
    backend.audit()
    prepared, _ = prepare(backend, [items], "rollout")
    gradients: dict[str, Tensor] = {}

    def keep(*, loss: float = 0.0) -> tuple[float, Reason | None]:
        named = backend.model.named_parameters()
        gradients.update({name: p.grad.detach().cpu() for name, p in named if p.grad is not None})
        return 1.0, None

    backend.apply_gradients = keep  # type: ignore[method-assign]
    metrics = update(backend, prepared, CONFIG)
    old = torch.cat([item.batch.old_logprobs[item.batch.loss_mask] for item in prepared[0]])  # type: ignore[index]
    return Step(batches, experts, old.cpu(), gradients, metrics, backend.audit())


@contextmanager
def definitions(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op takes its definition in plain torch."""
    with patch.context() as inner:
        inner.setattr(launch, "takes_triton", lambda x: False)
        yield


def same_batch(a: PackedBatch, b: PackedBatch) -> None:
    """Every array of two batches is the same, bit for bit."""
    for field in fields(PackedBatch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Routes):
            assert torch.equal(left.rows.view(torch.uint8), right.rows.view(torch.uint8))
            assert torch.equal(left.state, right.state)
        elif isinstance(left, Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


def test_the_same_step(tiny_dir: Path, trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {name: spy(monkeypatch, module, name) for module, name in LAUNCHERS}
    kernels = step(tiny_dir, trajectories)
    assert all(launched.values()), "a kernel of the road did not run"
    before = [len(calls) for calls in launched.values()]
    with definitions(monkeypatch):
        plain, gold = step(tiny_dir, trajectories), step(tiny_dir, trajectories, double=True)
    assert [len(calls) for calls in launched.values()] == before, "a definition launched a kernel"

    for ours, theirs in zip(kernels.batches, plain.batches, strict=True):
        same_batch(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(kernels.experts, plain.experts, strict=True))
    for name in COUNTERS:
        assert kernels.audit[name].tolist() == plain.audit[name].tolist(), name
    assert kernels.audit.total("replayed") > 0
    assert kernels.audit.total("flipped") > 0, "nothing flips, so replay changes nothing"

    assert plain.gradients.keys() == gold.gradients.keys() == kernels.gradients.keys()
    no_worse("logprobs", kernels.logprobs, plain.logprobs, gold.logprobs.double(), torch.float32)
    every = [
        torch.cat([s.gradients[name].flatten().double() for name in plain.gradients]) for s in (kernels, plain, gold)
    ]
    no_worse("gradients", every[0], every[1], every[2], torch.float32)
    routers = [name for name in plain.gradients if name.endswith("gate.weight")]
    assert len(routers) == len(kernels.audit.layers)
    for name in routers:
        assert plain.gradients[name].abs().max() > 0
        no_worse(name, kernels.gradients[name], plain.gradients[name], gold.gradients[name].double(), torch.float32)
    loss = [torch.tensor(s.metrics["loss"], dtype=torch.float64) for s in (kernels, plain, gold)]
    no_worse("loss", loss[0], loss[1], loss[2], torch.float32)


def test_the_same_choice(tiny_dir: Path, trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that nobody recorded, beside recorded ones: the routers' own choice is the same on both roads."""
    lost = [replace(t, provenance=np.full_like(t.provenance, MISSING)) for t in trajectories[::2]]
    mixed = lost + trajectories[1::2]
    kernels = step(tiny_dir, mixed)
    with definitions(monkeypatch):
        plain = step(tiny_dir, mixed)
    for ours, theirs in zip(kernels.batches, plain.batches, strict=True):
        same_batch(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(kernels.experts, plain.experts, strict=True))
    assert kernels.audit.total("free") == plain.audit.total("free") > 0
