"""One training step: old logprobs, the mismatch measured, then the optimizer steps under replayed routes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer.batch import Microbatch
from pacenote.trainer.gap import Gap, Meter
from pacenote.trainer.guard import Reason
from pacenote.trainer.hf import HfBackend

ReplayMode = Literal["off", "rollout", "trainer", "mixed"]
"""Whose experts an update replays: nobody's, the engine's (R3), the trainer's own of before the update (R2), or the
engine's in the first optimizer step of a training step and the trainer's own in those that follow."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A microbatch ready for the optimizer: `routes` are what the update replays (None: the model's own), `groups` the
    numbers of its samples' groups, `reference` [T] the reference policy's logprobs."""

    batch: PackedBatch
    routes: Routes | None
    groups: tuple[int, ...] = ()
    reference: Tensor | None = None


def prepare(
    backend: HfBackend,
    steps: Sequence[Sequence[Microbatch]],
    mode: ReplayMode,
    *,
    version: int = 0,
    reference: HfBackend | None = None,
) -> tuple[list[list[Prepared]], Gap]:
    """Compute old logprobs under the routing that the update will use; measure the mismatch with and without replay.

    Args:
        steps: packed microbatches, by optimizer step, with the rollout's logprobs and routes.
        mode: "rollout" replays the engine's experts (R3 of arXiv 2510.11370), "trainer" replays the trainer's own
            choice from this pass in the updates that follow (R2), "mixed" does the one in the first optimizer step and
            the other in later ones, "off" replays nothing.
        version: of the weights that compute them.
        reference: the reference policy, if the loss has a KL to one. It is given the update's routes, so that the KL is
            of the weights, and not of two routings.
    """
    meter = Meter()
    prepared = [
        [_prepare(backend, item, _mode_of_step(mode, number), meter, reference) for item in step]
        for number, step in enumerate(steps)
    ]
    return prepared, meter.gap(version)


def _mode_of_step(mode: ReplayMode, number: int) -> ReplayMode:
    """The mode of an optimizer step: until the first the policy is the rollout's, and its routes are as they were."""
    if mode != "mixed":
        return mode
    return "rollout" if number == 0 else "trainer"


def _prepare(
    backend: HfBackend, item: Microbatch, mode: ReplayMode, meter: Meter, reference: HfBackend | None
) -> Prepared:
    batch = item.batch
    native, own = backend.score_native(batch)
    if mode == "rollout":
        routes, old = batch.routes, backend.score(batch, batch.routes)
    else:
        routes, old = (own if mode == "trainer" else None), native
    meter.add(item, old, native, own)
    held = None if reference is None else reference.score(batch, routes)
    return Prepared(replace(batch, old_logprobs=old), routes, item.groups, held)


def update(
    backend: HfBackend,
    steps: Sequence[Sequence[Prepared]],
    config: PolicyConfig,
    *,
    answer_tokens: int | None = None,
) -> dict[str, Any]:
    """Take one optimizer step per entry of `steps`; gradients of its microbatches add up to the whole's.

    Args:
        backend: the model.
        steps: microbatches by optimizer step.
        config: the loss. Its denominator is the whole optimizer step's: trained tokens, samples or groups that have
            any, or for "constant" such samples times `answer_tokens` (Dr. GRPO, arXiv 2503.20783).
        answer_tokens: tokens that an answer may have.

    Returns:
        Metrics of `policy_loss` over the optimizer steps that were taken: means over trained tokens, but `loss` is the
        mean over optimizer steps, `ratio_max` the largest, `ratio_min` the smallest, `tokens` and `samples` sums;
        `grad_norm` is the largest, unclipped. `steps_taken`, `skipped_not_finite` and `skipped_spike` count.

    Raises:
        NotFinite: too many optimizer steps in a row were skipped.
        ValueError: normalize is "constant", and there is no `answer_tokens`.
    """
    parts: list[dict[str, float]] = []
    norms: list[float] = []
    skipped = Counter[str]()
    for prepared in steps:
        denominator, sizes = _shares(prepared, config, answer_tokens)
        if not denominator:
            continue
        said = _accumulate(backend, prepared, config, denominator, sizes)
        norm, reason = backend.apply_gradients(loss=sum(part["loss"] for part in said))
        if reason is not None:
            skipped[reason] += 1
            continue
        parts += said
        norms.append(norm)
    counts = {"steps_taken": len(norms), **{f"skipped_{reason}": skipped[reason] for reason in get_args(Reason)}}
    return {**_merged(parts, len(norms)), "grad_norm": max(norms, default=0.0), **counts}


def _accumulate(
    backend: HfBackend,
    prepared: Sequence[Prepared],
    config: PolicyConfig,
    denominator: int,
    sizes: Sequence[Tensor | None],
) -> list[dict[str, float]]:
    """Add up the gradients of an optimizer step's microbatches, up to the first whose loss is not finite; their
    metrics."""
    parts = []
    for item, size in zip(prepared, sizes, strict=True):
        with backend.routed(item.routes):
            out = backend.loss(item.batch, config, reference=item.reference, group_tokens=size, denominator=denominator)
            parts.append(out.read())
            if math.isfinite(parts[-1]["loss"]):
                out.backward()
        if not math.isfinite(parts[-1]["loss"]):
            break
    return parts


def _shares(
    prepared: Sequence[Prepared], config: PolicyConfig, answer_tokens: int | None
) -> tuple[int, list[Tensor | None]]:
    """An optimizer step's denominator, 0 without a trained token; and of each microbatch the tokens [S] of the groups
    that its samples are of, in all microbatches, where the loss asks for them."""
    counts = [_sample_tokens(item.batch) for item in prepared]
    samples = sum(n > 0 for microbatch in counts for n in microbatch)
    sizes: list[Tensor | None] = [None] * len(prepared)
    if config.normalize == "group":
        whole = Counter[int]()
        for item, microbatch in zip(prepared, counts, strict=True):
            for group, n in zip(item.groups, microbatch, strict=True):
                whole[group] += n
        sizes = [
            torch.tensor([whole[group] for group in item.groups], device=item.batch.loss_mask.device)
            for item in prepared
        ]
        return sum(n > 0 for n in whole.values()), sizes
    if config.normalize == "constant":
        if answer_tokens is None:
            raise ValueError('expected answer_tokens for normalize="constant", got None')
        return samples * answer_tokens, sizes
    return samples if config.normalize == "sequence" else sum(map(sum, counts)), sizes


def _sample_tokens(batch: PackedBatch) -> list[int]:
    """Trained tokens of each sample, [S]."""
    counts: list[int] = batch.segment_ids[batch.loss_mask].bincount(minlength=batch.num_samples).tolist()
    return counts


def _merged(parts: Sequence[dict[str, float]], steps: int) -> dict[str, float]:
    """Metrics of a training step from those of its microbatches."""
    tokens = sum(part["tokens"] for part in parts)
    if not tokens:
        return {}
    merged = {name: sum(part[name] * part["tokens"] for part in parts) / tokens for name in parts[0]}
    return {
        **merged,
        "loss": sum(part["loss"] for part in parts) / steps,  # a microbatch's loss is its share of its step's
        "ratio_max": max(part["ratio_max"] for part in parts),
        "ratio_min": min(part["ratio_min"] for part in parts),
        "tokens": tokens,
        "samples": sum(part["samples"] for part in parts),
    }
