"""The policy loss in plain torch: the definition, the CPU path, and in float64 the oracle of `policy_triton`.

Every term comes with its slope, the derivative in the logprob: the whole is `policy_loss`. With d = logprob - old and
e = old - rollout at a trained token t of a sample of n of them:

    ratio     r = exp d_t, or exp(sum d / n) of the sample        weights   exp e_t, exp(sum e), exp(sum e / n)
    loss_t    = weight_t surrogate_t + kl_coef KL_t - entropy_coef H_t
    loss      = sum_s share_s sum_{t in s} loss_t / divisor

Legend: T tokens, S samples, F names of TERMS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pacenote.kernels.policy_config import Level, PolicyConfig
from pacenote.kernels.reference import segment_spread, wide

MAX_LOG_RATIO = 20.0
"""Bound on a difference of logprobs before exp: e^20 is 4.9e8, a float32 product with it stays finite."""

LOG_TAU = math.log(2.0)
"""mismatch_f2 counts tokens whose two probabilities are more than a factor of 2 apart."""

TERMS = (
    "tokens", "loss", "ratio_mean", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "dual_clip_fraction",
    "tis_mean", "tis_truncated", "icepop_masked", "mis_masked", "kl_old_k1", "kl_old_k3", "kl_reference", "entropy",
    "mismatch_abs", "mismatch_k3", "mismatch_f2", "surrogate", "advantage_mean",
)  # fmt: skip
"""What is summed over each sample's trained tokens; metrics of these names are means, but `tokens` is their number and
`loss` the loss."""

METRICS = (*TERMS, "ratio_max", "ratio_min", "samples")
"""All metrics, in order: largest and smallest ratio, and the number of samples with a trained token."""


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What the loss is made of.

    Attributes:
        logprob: [T], of the policy in training; float64 asks for float64 throughout.
        old: [T], of the old policy; None: `logprob`, without gradient.
        rollout: [T].
        advantages: [T].
        mask: [T] bool.
        segment_ids: [T], samples one after another, -1 at the end.
        num_samples: S; a position of no sample is not trained.
        entropy: [T] or None, 0.
        reference: [T] or None, no such KL.
        group_tokens: [S] or None, trained tokens of each sample's group.
        denominator: 0-d or a number; None: what this batch has.
    """

    logprob: Tensor
    old: Tensor | None
    rollout: Tensor
    advantages: Tensor
    mask: Tensor
    segment_ids: Tensor
    num_samples: int
    entropy: Tensor | None = None
    reference: Tensor | None = None
    group_tokens: Tensor | None = None
    denominator: Tensor | float | None = None


@dataclass(frozen=True, slots=True)
class PolicySlopes:
    """What the gradient is made of: share[s] (slope[t] + common[s]) / divisor at a trained token.

    Attributes:
        slope: [T], 0 where nothing trains.
        share: [S] of a sample, or [0] if all have 1.
        common: [S], what a sequence's ratio passes to each of its tokens, or [0] without such a ratio.
        divisor: 0-d.
        num_samples: S.
    """

    slope: Tensor
    share: Tensor
    common: Tensor
    divisor: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The loss 0-d; metrics [M], of METRICS; sums [F, S], of TERMS over each sample's trained tokens; and slopes."""

    loss: Tensor
    metrics: Tensor
    sums: Tensor
    slopes: PolicySlopes


# --- terms -----------------------------------------------------------------------------------------------------------


def bounded_exp(x: Tensor) -> Tensor:
    """exp of a difference of logprobs [T], bounded by +-MAX_LOG_RATIO; no gradient flows beyond the bound."""
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, [T], and 0 where the factor is, whatever the value."""
    return torch.where(factor == 0, 0.0, factor * value)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The loss [T], its slope in log r or for cispo and reinforce in the logprob [T]; clips at either bound and the
    dual clip, [T] bool, where they were taken."""

    loss: Tensor
    slope: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


def surrogate(ratio: Tensor, logprob: Tensor, advantages: Tensor, config: PolicyConfig) -> Surrogate:
    """Of ratios, logprobs and advantages, all [T]; equality with a bound is not a clip.

    ppo: max(-r A, -clip(r, 1 - low, 1 + high) A), arXiv 1707.06347 eq. 7 with the two bounds of arXiv 2503.14476; dual
    clip, arXiv 1912.09729 eq. 5: for A < 0 at most -c A. cispo: -clip(r) A logprob with a constant clip(r), arXiv
    2506.13585 eq. 4. reinforce: -A logprob, Williams 1992.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if config.algorithm == "reinforce":
        return Surrogate(-times(advantages, logprob), -advantages, never, never, never)
    if config.algorithm == "cispo":
        weighted = ratio.clamp(low, high) * advantages
        return Surrogate(-times(weighted, logprob), -weighted, ratio < low, ratio > high, never)
    plain, bounded = -ratio * advantages, -ratio.clamp(low, high) * advantages
    clipped = bounded > plain
    loss, dual = torch.where(clipped, bounded, plain), never
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
    slope = torch.where(clipped | dual, 0.0, plain)
    return Surrogate(loss, slope, clipped & (ratio < low), clipped & (ratio > high), dual)


@dataclass(frozen=True, slots=True)
class Importance:
    """Weights [T], and where they were truncated, masked by their own band, masked by MIS, [T] bool."""

    weight: Tensor
    truncated: Tensor
    outside: Tensor
    masked: Tensor


def importance(levels: dict[Level, Tensor], config: PolicyConfig) -> Importance:
    """Weights of log(old / rollout) [T] at each level: at most tis_cap, 0 outside the bands, whose edges are inside.

    Truncation: TIS, fengyao.notion.site/off-policy-rl. Own band: IcePop, arXiv 2510.18855. Masks of tokens, of samples
    by their product, and by its geometric mean: yingru.notion.site, "When Speed Kills Stability" (MIS, Geo-RS).
    """
    own = bounded_exp(levels["token"])
    never = torch.zeros_like(own, dtype=torch.bool)
    weight, truncated, outside, masked = torch.ones_like(own), never, never, never
    if config.weighs:
        weight = bounded_exp(levels[config.tis_level])
    if config.tis_cap is not None:
        weight, truncated = weight.clamp(max=config.tis_cap), weight > config.tis_cap
    if config.icepop is not None:
        outside = (own < config.icepop[0]) | (own > config.icepop[1])
    if config.mis is not None:
        judged = bounded_exp(levels[config.mis_level])
        masked = (judged < config.mis[0]) | (judged > config.mis[1])
    return Importance(torch.where(outside | masked, 0.0, weight), truncated, outside, masked)


def kl(logprob: Tensor, other: Tensor, kind: str) -> Tensor:
    """Estimates [T] of KL(policy || other) at tokens sampled from the policy (joschu.net/blog/kl-approx.html).

    k3 is exp(-d) - 1 + d with d = logprob - other, never negative; d is bounded below, where exp would overflow.
    """
    return kl_and_slope(logprob, other, kind)[0]


def kl_and_slope(logprob: Tensor, other: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`kl` and its derivative in the logprob, [T].

    No gradient flows from where k3 is bounded: that of its linear term alone would have the wrong sign.
    """
    d = logprob - other
    if kind == "k1":
        return d, torch.ones_like(d)
    if kind == "k2":
        return 0.5 * d * d, d
    b = d.clamp(min=-MAX_LOG_RATIO)
    less = torch.expm1(-b)
    return less + b, torch.where(d < -MAX_LOG_RATIO, 0.0, -less)


# --- the loss --------------------------------------------------------------------------------------------------------


def policy_loss(x: PolicyInputs, config: PolicyConfig) -> PolicyResult:
    """The loss, its metrics, and the parts of its gradient, [T] -> 0-d; see the head of this file."""
    with torch.no_grad():
        terms, slope, ratio, trained = _terms(x, config)
        samples = _Samples(x.segment_ids, trained, x.num_samples)
        sums = samples.sum(terms.T).T.contiguous()
        count = sums[0].clamp(min=1)
        share, common = count.new_empty(0), count.new_empty(0)
        if config.shares_gradient:  # of the surrogates' slopes; that of the KL is the token's own
            through, slope = slope[0], slope[1].clone()
            common = samples.sum(through[:, None])[:, 0] / count
        else:
            slope = slope.sum(dim=0)
        units = sums[0].sum()
        if config.normalize == "sequence":
            share, units = 1 / count, (sums[0] > 0).sum().to(count.dtype)
        elif x.group_tokens is not None and config.normalize == "group":
            share = 1 / x.group_tokens.to(count.dtype).clamp(min=1)
            units = (sums[0] * share).sum()
        divisor = torch.where(units > 0, units, 1.0)
        if x.denominator is not None:
            divisor = torch.ones_like(units) * x.denominator
        loss = (sums[1] * share if len(share) else sums[1]).sum() / divisor
        metrics = _metrics(loss, sums, ratio, trained)
        return PolicyResult(loss, metrics, sums, PolicySlopes(slope, share, common, divisor, x.num_samples))


def policy_gradient(
    out: PolicySlopes, grad: Tensor, mask: Tensor, segment_ids: Tensor, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """Gradients [T] of logprob and entropy, from that of the loss, 0-d."""
    trained = mask & (segment_ids >= 0) & (segment_ids < out.num_samples)
    slope, bonus = out.slope, torch.full_like(out.slope, -entropy_coef)
    if len(out.common):
        slope = slope + segment_spread(out.common, segment_ids)
    if len(out.share):
        share = segment_spread(out.share, segment_ids)
        slope, bonus = share * slope, share * bonus
    scale = grad / out.divisor
    return torch.where(trained, scale * slope, 0.0), torch.where(trained, scale * bonus, 0.0)


def _terms(x: PolicyInputs, config: PolicyConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TERMS [F, T]; slopes [2, T] of the surrogate and of the rest; ratio [T]; trained [T] bool. 0 where untrained."""
    trained = x.mask & (x.segment_ids >= 0) & (x.segment_ids < x.num_samples)
    kind = wide(x.logprob[:0]).dtype

    def clean(values: Tensor) -> Tensor:
        """[T] in the dtype that is computed in, with 0 where nothing trains."""
        return torch.where(trained, values.to(kind), 0.0)

    policy, rollout, advantages = clean(x.logprob), clean(x.rollout), clean(x.advantages)
    old = policy if x.old is None else clean(x.old)
    spread = torch.zeros_like(policy) if x.entropy is None else clean(x.entropy)
    moved, apart = policy - old, old - rollout
    log_ratio, levels = moved, _own(apart)
    if config.by_sample:
        log_ratio, levels = _by_sample(moved, apart, x, trained, config)
    ratio = bounded_exp(log_ratio)
    push, weights = surrogate(ratio, policy, advantages, config), importance(levels, config)
    away, away_slope = torch.zeros_like(policy), torch.zeros_like(policy)
    if x.reference is not None:
        away, away_slope = kl_and_slope(policy, clean(x.reference), config.kl_type)
        if config.kl_unbiased:
            own = bounded_exp(moved)
            away_slope = own * (away_slope + torch.where(moved.abs() > MAX_LOG_RATIO, 0.0, away))
            away = own * away
    weighted = times(weights.weight, push.loss)
    loss = weighted
    if config.kl_coef:
        loss = loss + config.kl_coef * away
    if config.entropy_coef:
        loss = loss - config.entropy_coef * spread
    direct = times(weights.weight, push.slope)
    if config.algorithm == "ppo":
        direct = torch.where(log_ratio.abs() > MAX_LOG_RATIO, 0.0, direct)
    slope = torch.stack([direct, config.kl_coef * away_slope if config.kl_coef else torch.zeros_like(direct)])
    every = (
        torch.ones_like(policy), loss, ratio, push.low | push.high, push.low, push.high, push.dual,
        weights.weight, weights.truncated, weights.outside, weights.masked, kl(old, policy, "k1"),
        kl(old, policy, "k3"), away, spread, apart.abs(), kl(rollout, old, "k3"), apart.abs() > LOG_TAU,
        weighted, advantages,
    )  # fmt: skip
    return torch.stack([clean(term) for term in every]), torch.where(trained, slope, 0.0), ratio, trained


def _own(apart: Tensor) -> dict[Level, Tensor]:
    """log(old / rollout) [T] where no level but the token's is asked for."""
    return {"token": apart}


def _by_sample(
    moved: Tensor, apart: Tensor, x: PolicyInputs, trained: Tensor, config: PolicyConfig
) -> tuple[Tensor, dict[Level, Tensor]]:
    """log r [T] and log(old / rollout) [T] at each level, from the differences [T] of the tokens."""
    samples = _Samples(x.segment_ids, trained, x.num_samples)
    sums = samples.sum(torch.stack([torch.ones_like(moved), moved, apart], dim=1))
    count = sums[:, 0].clamp(min=1)
    levels: dict[Level, Tensor] = {
        "token": apart,
        "sequence": segment_spread(sums[:, 2], x.segment_ids),
        "geometric": segment_spread(sums[:, 2] / count, x.segment_ids),
    }
    return moved if config.ratio == "token" else segment_spread(sums[:, 1] / count, x.segment_ids), levels


def _metrics(loss: Tensor, sums: Tensor, ratio: Tensor, trained: Tensor) -> Tensor:
    """[M] of METRICS, from the loss 0-d, sums [F, S] and ratios [T]."""
    totals = sums.sum(dim=1)
    means = totals / totals[0].clamp(min=1)
    ends = [
        torch.cat([torch.where(trained, ratio, start), ratio.new_full((1,), start)]) for start in (-math.inf, math.inf)
    ]
    some = totals[0] > 0
    largest, smallest = torch.where(some, ends[0].amax(), 0.0), torch.where(some, ends[1].amin(), 0.0)
    samples = (sums[0] > 0).sum().to(sums.dtype)
    return torch.cat([totals[:1], loss[None], means[2:], torch.stack([largest, smallest, samples])])


@dataclass(frozen=True, slots=True)
class _Samples:
    """Sums over the trained tokens of each sample: segment_ids [T], trained [T] bool, S."""

    segment_ids: Tensor
    trained: Tensor
    number: int

    def sum(self, values: Tensor) -> Tensor:
        """[T, any] -> [S, any], in order of position."""
        if not values.numel():
            return values.new_zeros((self.number, values.shape[1]))
        known = (self.segment_ids >= 0) & (self.segment_ids < self.number)
        ids = torch.where(known, self.segment_ids, self.number).long()
        lengths = torch.zeros(self.number + 1, dtype=torch.int64, device=values.device)
        lengths = lengths.index_add(0, ids, torch.ones_like(ids))
        clean = torch.where(self.trained[:, None], values, 0.0)
        return torch.segment_reduce(clean, "sum", lengths=lengths, unsafe=True, initial=0)[: self.number]
