"""Policy loss with clipping, importance weights against the rollout, KL and entropy, and all its metrics in one pass.

The terms are defined in `reference`: surrogate, importance, kl. Legend: T tokens, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pacenote.kernels import check
from pacenote.kernels import reference as plain
from pacenote.kernels.segment import segment_mean, segment_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The loss. Every coefficient is dimensionless; 0 or None switches a term off."""

    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped at 1 + clip_high (clip-higher, arXiv 2503.14476)."""
    dual_clip: float | None = None
    """For negative advantages the loss is at most this times |A|; above 1."""
    tis_cap: float | None = 2.0
    """Importance weights exp(old - rollout) are truncated here; None: no importance weights unless icepop asks."""
    icepop: tuple[float, float] | None = None
    """Tokens whose importance weight is outside this band, edges inside, do not train."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize: Literal["token", "sequence", "constant"] = "token"
    """Mean over trained tokens, mean over samples of their means, or a sum over a denominator that is given."""

    def __post_init__(self) -> None:
        """Refuse values that make no loss."""
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"expected 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low}, {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"expected dual_clip above 1, got {self.dual_clip}")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"expected tis_cap above 0, got {self.tis_cap}")
        if self.icepop is not None and not 0 <= self.icepop[0] <= 1 <= self.icepop[1]:
            raise ValueError(f"expected an icepop band around 1, got {self.icepop}")
        if not (self.kl_coef >= 0 and self.entropy_coef >= 0):
            raise ValueError(f"expected coefficients >= 0, got kl {self.kl_coef}, entropy {self.entropy_coef}")
        for name, value, known in (
            ("kl_type", self.kl_type, ("k1", "k2", "k3")),
            ("normalize", self.normalize, ("token", "sequence", "constant")),
        ):
            if value not in known:
                raise ValueError(f"expected {name} as one of {known}, got {value!r}")


class PolicyBatch(Protocol):
    """What the loss reads of a batch; `pack.PackedBatch` has it."""

    @property
    def loss_mask(self) -> Tensor:
        """[T] bool."""

    @property
    def logprobs(self) -> Tensor:
        """[T] float32 of the rollout."""

    @property
    def old_logprobs(self) -> Tensor | None:
        """[T] float32 of the old policy; None: the logprobs given, without gradient."""

    @property
    def advantages(self) -> Tensor:
        """[T] float32."""

    @property
    def segment_ids(self) -> Tensor:
        """[T] int32, samples one after another; -1: padding."""

    @property
    def num_samples(self) -> int:
        """S."""


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """loss 0-d; metrics, each a 0-d tensor on the loss's device without gradient, see `policy_loss`."""

    loss: Tensor
    metrics: dict[str, Tensor]

    def backward(self) -> None:
        """Differentiate the loss."""
        self.loss.backward()  # type: ignore[no-untyped-call]


def policy_loss(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    *,
    entropy: Tensor | None = None,
    reference: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyOutput:
    """importance * surrogate + kl_coef * KL(policy || reference) - entropy_coef * entropy, over trained tokens.

    What stands where the mask is not set reaches neither loss nor gradient nor metrics, not even NaN. Exponents are
    bounded (`reference.MAX_LOG_RATIO`). Without any trained token the loss is 0 and so are all gradients.

    Args:
        logprob: [T] floating, of the targets under the policy in training; all is computed in float32, or in float64
            if this is.
        batch: masks, advantages and older logprobs, see PolicyBatch.
        config: the terms.
        entropy: [T] of the policy; needed if entropy_coef is not 0.
        reference: [T] logprobs of the reference policy; needed if kl_coef is not 0.
        denominator: what the sum over tokens ("token", "constant") or samples ("sequence") is divided by, so that
            several microbatches share one, a number or 0-d; None: the trained tokens, or samples with any, of this
            batch.

    Returns:
        The loss and metrics, means over this batch's trained tokens: loss, ratio_mean, ratio_max, clip_fraction (tokens
        whose clipped branch was taken), dual_clip_fraction, tis_mean, tis_truncated (share), icepop_masked (share),
        kl_old_k1 and kl_old_k3 (KL(old || policy)), kl_reference, entropy (0 if not given), tokens, samples (which
        have any).

    Raises:
        ValueError: shapes that do not fit, a term without its input, a denominator not above 0 (of a tensor on an
            accelerator the value is not waited for).
    """
    _check(logprob, batch, config, entropy, reference, denominator)
    mask = batch.loss_mask
    kind = torch.float64 if logprob.dtype == torch.float64 else torch.float32

    def clean(values: Tensor) -> Tensor:
        """[T] in the dtype that is computed in, with 0 where the mask is not set."""
        return torch.where(mask, values.to(kind), 0.0)

    policy = clean(logprob)
    old = clean(logprob if batch.old_logprobs is None else batch.old_logprobs).detach()
    terms = _Terms.of(policy, old, clean(batch.logprobs), clean(batch.advantages), config)
    loss = terms.weight * terms.surrogate.loss
    spread = policy.new_zeros(policy.shape) if entropy is None else clean(entropy)
    away = policy.new_zeros(policy.shape)
    if reference is not None:
        away = plain.kl(policy, clean(reference), config.kl_type)
    if config.kl_coef:
        loss = loss + config.kl_coef * away
    if config.entropy_coef:
        loss = loss - config.entropy_coef * spread
    total = _reduce(torch.where(mask, loss, 0.0), batch, config, denominator)
    return PolicyOutput(total, _metrics(total, terms, policy, old, away, spread, batch))


@dataclass(frozen=True, slots=True)
class _Terms:
    """surrogate [T]; importance weight [T], and where it was truncated and where masked, [T] bool."""

    surrogate: plain.Surrogate
    weight: Tensor
    truncated: Tensor
    outside: Tensor

    @classmethod
    def of(cls, policy: Tensor, old: Tensor, rollout: Tensor, advantages: Tensor, config: PolicyConfig) -> _Terms:
        """All [T]."""
        surrogate = plain.surrogate(policy, old, advantages, config.clip_low, config.clip_high, config.dual_clip)
        if config.tis_cap is None and config.icepop is None:
            never = torch.zeros_like(policy, dtype=torch.bool)
            return cls(surrogate, torch.ones_like(old), never, never)
        return cls(surrogate, *plain.importance(old, rollout, config.tis_cap, config.icepop))


def _reduce(loss: Tensor, batch: PolicyBatch, config: PolicyConfig, denominator: float | Tensor | None) -> Tensor:
    """[T] -> 0-d."""
    if config.normalize == "sequence":
        means = segment_mean(loss, batch.segment_ids, batch.num_samples, mask=batch.loss_mask)
        total, count = means.sum(), _trained_samples(batch)
    else:
        total, count = loss.sum(), batch.loss_mask.sum()
    if denominator is None:
        denominator = count.clamp(min=1)
    return total / (denominator.to(total.dtype) if isinstance(denominator, Tensor) else denominator)


def _trained_samples(batch: PolicyBatch) -> Tensor:
    """0-d: samples with a trained token."""
    counts = segment_sum(batch.loss_mask.float(), batch.segment_ids, batch.num_samples)
    return (counts > 0).sum()


@torch.no_grad()
def _metrics(
    loss: Tensor, terms: _Terms, policy: Tensor, old: Tensor, away: Tensor, spread: Tensor, batch: PolicyBatch
) -> dict[str, Tensor]:
    """Each 0-d; inputs are [T], 0 where the mask is not set."""
    mask = batch.loss_mask
    tokens = mask.sum()

    def mean(values: Tensor) -> Tensor:
        """Over trained tokens, of [T]."""
        return torch.where(mask, values.to(policy.dtype), 0.0).sum() / tokens.clamp(min=1)

    ratio = torch.where(mask, terms.surrogate.ratio, 0.0)
    return {
        "loss": loss.detach(),
        "ratio_mean": mean(ratio),
        "ratio_max": torch.cat([ratio, ratio.new_zeros(1)]).amax(),
        "clip_fraction": mean(terms.surrogate.clipped),
        "dual_clip_fraction": mean(terms.surrogate.dual_clipped),
        "tis_mean": mean(terms.weight),
        "tis_truncated": mean(terms.truncated),
        "icepop_masked": mean(terms.outside),
        "kl_old_k1": mean(plain.kl(old, policy, "k1")),
        "kl_old_k3": mean(plain.kl(old, policy, "k3")),
        "kl_reference": mean(away),
        "entropy": mean(spread),
        "tokens": tokens,
        "samples": _trained_samples(batch),
    }


def _check(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    entropy: Tensor | None,
    reference: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    check.tensor(logprob, "logprob", (None,), check.FLOATS, logprob.device)
    floats, shape = check.FLOATS, tuple(logprob.shape)
    check.tensor(batch.loss_mask, "batch.loss_mask", shape, (torch.bool,), logprob.device)
    check.tensor(batch.segment_ids, "batch.segment_ids", shape, (torch.int32, torch.int64), logprob.device)
    for name, value in (
        ("batch.logprobs", batch.logprobs),
        ("batch.advantages", batch.advantages),
        ("batch.old_logprobs", batch.old_logprobs),
        ("entropy", entropy),
        ("reference", reference),
    ):
        if value is not None:
            check.tensor(value, name, shape, floats, logprob.device)
    if config.entropy_coef and entropy is None:
        raise ValueError(
            f"expected entropy [T] for entropy_coef={config.entropy_coef}, got None: linear_logprob gives it"
        )
    if config.kl_coef and reference is None:
        raise ValueError(f"expected reference [T] for kl_coef={config.kl_coef}, got None: logprobs of that policy")
    if config.normalize == "constant" and denominator is None:
        raise ValueError('expected a denominator for normalize="constant", got None')
    if isinstance(denominator, Tensor):
        check.tensor(denominator, "denominator", (), (*floats, torch.int32, torch.int64), logprob.device)
        if denominator.device.type != "cpu":  # its value is not waited for
            return
    if denominator is not None and not 0 < float(denominator) < float("inf"):
        raise ValueError(f"expected a denominator above 0, got {float(denominator)}")
