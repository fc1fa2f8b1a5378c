"""One training step: old logprobs, the mismatch measured, then the optimizer steps under replayed routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from pacenote.kernels.pack import PackedBatch
from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer.backend import Backend, Divisor, Native, Prepared
from pacenote.trainer.batch import Microbatch
from pacenote.trainer.gap import Gap, Meter
from pacenote.trainer.guard import Reason
from pacenote.trainer.kl import charged
from pacenote.trainer.phases import Phases

ReplayMode = Literal["off", "rollout", "trainer", "mixed"]
"""Whose experts an update replays: nobody's, the engine's (R3), the trainer's own of before the update (R2), or the
engine's in the first optimizer step of a training step and the trainer's own in those that follow."""


def prepare(
    backend: Backend,
    steps: Sequence[Sequence[Microbatch]],
    mode: ReplayMode,
    *,
    version: int = 0,
    reference: Backend | None = None,
    charge: PolicyConfig | None = None,
    compare: bool = True,
) -> tuple[list[list[Prepared]], Gap]:
    """Compute old logprobs under the routing that the update will use; measure the mismatch with and without replay.

    Args:
        backend: the model.
        steps: packed microbatches, by optimizer step, with the rollout's logprobs and routes.
        mode: "rollout" replays the engine's experts (R3 of arXiv 2510.11370), "trainer" replays the trainer's own
            choice from this pass in the updates that follow (R2), "mixed" does the one in the first optimizer step and
            the other in later ones, "off" replays nothing.
        version: of the weights that compute them.
        reference: the reference policy, if the loss has a KL to one. It is given the update's routes, so that the KL is
            of the weights, and not of two routings.
        charge: coefficient and estimator of a KL in the reward, which advantages are charged with; None: there is none.
        compare: whether to measure the gap under the trainer's own routing, too, which is a pass of its own where the
            engine's is replayed.

    Returns:
        Microbatches ready for the optimizer, and the gap over those of all ranks.
    """
    meter = Meter()
    prepared = [
        _prepare(backend, step, _mode_of_step(mode, number), meter, reference, charge, compare)
        for number, step in enumerate(steps)
    ]
    return prepared, Meter.joined(backend.world.spoken(meter, backend.place)).gap(version)


def _mode_of_step(mode: ReplayMode, number: int) -> ReplayMode:
    """The mode of an optimizer step: until the first the policy is the rollout's, and its routes are as they were."""
    if mode != "mixed":
        return mode
    return "rollout" if number == 0 else "trainer"


def _prepare(
    backend: Backend,
    step: Sequence[Microbatch],
    mode: ReplayMode,
    meter: Meter,
    reference: Backend | None,
    charge: PolicyConfig | None,
    compare: bool,
) -> list[Prepared]:
    natives: Sequence[Native | None]
    if mode == "rollout":
        natives = backend.scores_native(step) if compare else [None] * len(step)
        routes = [item.seen.routes for item in step]
        old = backend.scores(step, routes)
    else:
        natives = backend.scores_native(step)
        routes = [native.seen if mode == "trainer" else None for native in natives]
        old = [native.logprobs for native in natives]
    held = [None] * len(step) if reference is None else reference.scores(step, routes)
    for item, trained, native in zip(step, old, natives, strict=True):
        if item.trajectories:
            meter.add(item, trained, native)
    found = []
    for item, logprobs, given, other in zip(step, old, routes, held, strict=True):
        batch = replace(item.batch, old_logprobs=logprobs)
        if charge is not None and other is not None:
            batch = charged(batch, logprobs, other, charge)
        found.append(Prepared(batch, given, item.groups, other, item.local))
    return found


def update(
    backend: Backend,
    steps: Sequence[Sequence[Prepared]],
    config: PolicyConfig,
    *,
    answer_tokens: int | None = None,
    phases: Phases | None = None,
) -> dict[str, Any]:
    """Take one optimizer step per entry of `steps`; gradients of its microbatches add up to the whole's.

    Args:
        backend: the model.
        steps: microbatches by optimizer step.
        config: the loss. Its denominator is the whole optimizer step's: trained tokens, samples or groups that have
            any, or for "constant" such samples times `answer_tokens` (Dr. GRPO, arXiv 2503.20783).
        answer_tokens: tokens that an answer may have.
        phases: a stopwatch, which learns how long forward and backward passes and optimizer steps take. Backward is all
            that is not forward: recomputation, the exchange of gradients, and waiting for other ranks, too.

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
    phases = phases or Phases()
    counts = [_count(step) for step in steps]
    whole = [Count.joined(said) for said in zip(*backend.world.spoken(counts, backend.place), strict=True)]
    for prepared, count in zip(steps, whole, strict=True):
        denominator = count.denominator(config, answer_tokens)
        if not denominator:
            continue
        divisors = [_divisor(item, count, config, denominator) for item in prepared]
        with phases("learn"):
            said = backend.accumulate(prepared, divisors, config)
        everywhere = [part for rank in backend.world.spoken(said, backend.place) for part in rank]
        with phases("optimizer"):
            norm, reason = backend.apply_gradients(loss=sum(part["loss"] for part in everywhere))
        if reason is not None:
            skipped[reason] += 1
            continue
        parts += [part for part in everywhere if part["tokens"]]
        norms.append(norm)
    forward = backend.forward_seconds()
    phases.add("forward", forward)
    phases.add("backward", phases.spent("learn") - forward)
    taken = {"steps_taken": len(norms), **{f"skipped_{reason}": skipped[reason] for reason in get_args(Reason)}}
    return {**_merged(parts, len(norms)), "grad_norm": max(norms, default=0.0), **taken}


@dataclass(frozen=True, slots=True)
class Count:
    """What an optimizer step trains: tokens of each group, and samples and tokens in all."""

    groups: Counter[int]
    samples: int
    tokens: int

    @classmethod
    def joined(cls, counts: Sequence[Count]) -> Count:
        """Of all ranks' shares."""
        groups = Counter[int]()
        for count in counts:
            groups.update(count.groups)
        return cls(groups, sum(count.samples for count in counts), sum(count.tokens for count in counts))

    def denominator(self, config: PolicyConfig, answer_tokens: int | None) -> int:
        """Of the step's loss; 0 without a trained token.

        Raises:
            ValueError: normalize is "constant", and there is no `answer_tokens`.
        """
        if config.normalize == "constant":
            if answer_tokens is None:
                raise ValueError('expected answer_tokens for normalize="constant", got None')
            return self.samples * answer_tokens
        if config.normalize == "group":
            return sum(n > 0 for n in self.groups.values())
        return self.samples if config.normalize == "sequence" else self.tokens


def _count(step: Sequence[Prepared]) -> Count:
    groups, samples = Counter[int](), 0
    for item in step:
        tokens = _sample_tokens(item.batch)
        samples += sum(n > 0 for n in tokens)
        groups.update(dict.fromkeys(item.groups, 0))
        for group, n in zip(item.groups, tokens, strict=False):  # a filler has no group, and no token
            groups[group] += n
    return Count(groups, samples, sum(groups.values()))


def _divisor(item: Prepared, count: Count, config: PolicyConfig, denominator: float) -> Divisor:
    if config.normalize != "group":
        return Divisor(denominator)
    sizes = [count.groups[group] for group in item.groups] or [1] * item.batch.num_samples
    return Divisor(denominator, torch.tensor(sizes, device=item.batch.loss_mask.device))


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
