"""The policy loss of a packed batch. Definitions: `reference_policy`.

Legend: T positions, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pacenote.kernels import reference, reference_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The policy loss. Importance weights correct for old policy against rollout; ratios are against the old policy."""

    clip_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + this; larger than clip-low is DAPO's clip-higher (arXiv 2503.14476)."""
    dual_clip: float | None = None
    """Bound on the loss of a negative advantage, in multiples of it (above 1)."""
    tis_cap: float | None = 2.0
    """Truncation of the importance weight exp(old - rollout); none switches the truncation off."""
    icepop: tuple[float, float] | None = None
    """Band of importance weights that count, edges inside; tokens outside of it weigh nothing."""
    importance: bool = True
    """Multiply the objective by the importance weight."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of that KL."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize: Literal["token", "sequence"] = "token"
    """Mean over all trained tokens, or over samples of each sample's mean."""

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"expected clip_low in 0..1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"expected dual_clip above 1, got {self.dual_clip}")
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"expected tis_cap above 0, got {self.tis_cap}")
        if self.icepop is not None and not 0 <= self.icepop[0] < self.icepop[1]:
            raise ValueError(f"expected icepop as (low, high) with 0 <= low < high, got {self.icepop}")
        if self.kl_coef < 0 or self.kl_type not in ("k1", "k2", "k3"):
            raise ValueError(f"expected kl_coef >= 0 and kl_type k1, k2 or k3, got {self.kl_coef} and {self.kl_type!r}")


class PolicyBatch(Protocol):
    """What the loss reads of a batch: loss_mask [T] bool, logprobs [T] (the rollout's), old_logprobs [T] or None,
    advantages [T], segment_ids [T] int32, num_samples."""

    @property
    def loss_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def logprobs(self) -> Tensor: ...  # noqa: D102
    @property
    def old_logprobs(self) -> Tensor | None: ...  # noqa: D102
    @property
    def advantages(self) -> Tensor: ...  # noqa: D102
    @property
    def segment_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def num_samples(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """loss: 0-d; metrics: 0-d tensors by name, means over the batch's trained tokens unless the name says otherwise."""

    loss: Tensor
    metrics: dict[str, Tensor]

    def backward(self) -> None:
        """Gradients of the loss."""
        self.loss.backward()  # type: ignore[no-untyped-call]


def policy_loss(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    *,
    entropy: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyOutput:
    """Clipped policy loss with importance weights, KL and entropy terms.

    Args:
        logprob: [T] of each target under the policy in training; gradients flow through it.
        batch: masks, old and rollout logprobs, advantages. Without `old_logprobs` the old policy is `logprob` itself.
        config: which terms, how they are bounded and normalised.
        entropy: [T], needed for an entropy bonus.
        reference_logprob: [T] of the reference policy, needed for a KL term.
        denominator: what the sum is divided by, to share one normalisation between microbatches: trained tokens
            ("token") or samples with trained tokens ("sequence"); None: those of this batch.

    Returns:
        Loss and metrics. A batch without trained tokens has loss 0 and gradient 0. What the mask leaves out has no
        influence, not even if it is NaN.

    Raises:
        ValueError: shapes that do not fit, or a term whose input is missing.
    """
    mask = _check(logprob, batch, config, entropy, reference_logprob)

    def clean(values: Tensor) -> Tensor:
        return torch.where(mask, reference.wide(values), 0.0)

    new, rollout, advantage = clean(logprob), clean(batch.logprobs), clean(batch.advantages)
    old = new.detach() if batch.old_logprobs is None else clean(batch.old_logprobs)
    ratio = reference_policy.ratio_of(new, old)
    gain, clipped = reference_policy.clipped_objective(
        ratio, advantage, config.clip_low, config.clip_high, config.dual_clip
    )
    weight, raw = reference_policy.importance_weight(old, rollout, config.tis_cap, config.icepop)
    objective = gain * weight if config.importance else gain
    metrics = _metrics(mask, new, old, ratio, clipped, weight, raw, config)
    if entropy is not None:
        surprise = clean(entropy)
        objective = objective + config.entropy_coef * surprise
        metrics["entropy"] = reference_policy.masked_mean(surprise.detach(), mask)
    if reference_logprob is not None:
        distance = reference_policy.kl(new, clean(reference_logprob), config.kl_type)
        objective = objective - config.kl_coef * distance
        metrics["kl_reference"] = reference_policy.masked_mean(distance.detach(), mask)
    loss = -_reduce(objective, mask, batch, config, denominator)
    return PolicyOutput(loss, {"loss": loss.detach(), **metrics})


def _reduce(
    objective: Tensor, mask: Tensor, batch: PolicyBatch, config: PolicyConfig, denominator: float | Tensor | None
) -> Tensor:
    if config.normalize == "token":
        total, count = torch.where(mask, objective, 0.0).sum(), mask.sum()
    else:
        sums, counts = reference.segment_sums(objective, batch.segment_ids, mask, batch.num_samples)
        total, count = (sums / counts.clamp(min=1)).sum(), (counts > 0).sum()
    return total / (count.clamp(min=1) if denominator is None else denominator)


@torch.no_grad()
def _metrics(
    mask: Tensor, new: Tensor, old: Tensor, ratio: Tensor, clipped: Tensor, weight: Tensor, raw: Tensor, config: PolicyConfig
) -> dict[str, Tensor]:
    mean = reference_policy.masked_mean
    metrics = {
        "ratio": mean(ratio, mask),
        "ratio_max": torch.where(mask, ratio, 0.0).max() if len(ratio) else ratio.sum(),
        "clip_fraction": mean(clipped.to(ratio.dtype), mask),
        "importance_weight": mean(weight, mask),
        "kl_old_k3": mean(reference_policy.kl(new, old, "k3"), mask),
    }
    if config.tis_cap is not None:
        metrics["tis_truncated"] = mean((raw > config.tis_cap).to(raw.dtype), mask)
    if config.icepop is not None:
        outside = (raw < config.icepop[0]) | (raw > config.icepop[1])
        metrics["icepop_masked"] = mean(outside.to(raw.dtype), mask)
    return metrics


def _check(
    logprob: Tensor, batch: PolicyBatch, config: PolicyConfig, entropy: Tensor | None, reference_logprob: Tensor | None
) -> Tensor:
    shape = batch.loss_mask.shape
    given = {
        "logprob": logprob, "batch.logprobs": batch.logprobs, "batch.advantages": batch.advantages,
        "batch.old_logprobs": batch.old_logprobs, "entropy": entropy, "reference_logprob": reference_logprob,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"expected {name} of the loss mask's shape {list(shape)}, got {list(value.shape)}")
    if config.entropy_coef and entropy is None:
        raise ValueError("expected entropy for an entropy bonus (entropy_coef is not 0), got None")
    if config.kl_coef and reference_logprob is None:
        raise ValueError("expected reference_logprob for a KL term (kl_coef is not 0), got None")
    return batch.loss_mask.bool()
