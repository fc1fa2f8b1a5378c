"""The policy loss as a loop over tokens in Python floats, and batches that are built from tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels.policy import METRICS, TERMS, PolicyConfig, policy_loss

NAN, INF, BOUND = float("nan"), float("inf"), 20.0


@dataclass(frozen=True, slots=True)
class Batch:
    """A PolicyBatch."""

    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    segment_ids: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class Token:
    """Everything about a position; `sample` is -1 in padding."""

    sample: int
    trained: bool
    policy: float = -1.0
    old: float = -1.0
    rollout: float = -1.0
    advantage: float = 1.0
    entropy: float = 0.0
    other: float = -1.0


@dataclass(frozen=True, slots=True)
class Result:
    """loss; gradients [T] in logprob and entropy; metrics by METRICS; sums by TERMS, [S] each."""

    loss: Tensor
    grad: Tensor
    bonus: Tensor
    metrics: dict[str, Tensor]
    sums: dict[str, Tensor]


# --- the loop --------------------------------------------------------------------------------------------------------


def bounded(x: float) -> float:
    """exp, bounded."""
    return math.exp(max(-BOUND, min(BOUND, x)))


def times(factor: float, value: float) -> float:
    """A product that is 0 if the factor is."""
    return factor * value if factor else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Means over a sample's trained tokens of log(policy / old) and log(old / rollout), and the latter's sum."""

    moved: float
    apart: float
    product: float

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Sample:
        """Of trained tokens."""
        n = max(len(tokens), 1)
        product = sum(t.old - t.rollout for t in tokens)
        return cls(sum(t.policy - t.old for t in tokens) / n, product / n, product)


def surrogate(token: Token, r: float, config: PolicyConfig) -> tuple[float, float, dict[str, float]]:
    """Its loss; its slope in log r, for cispo and reinforce in the logprob; clips."""
    a, low, high = token.advantage, 1 - config.clip_low, 1 + config.clip_high
    clips = {"clip_low_fraction": 0.0, "clip_high_fraction": 0.0, "dual_clip_fraction": 0.0}
    if config.algorithm == "reinforce":
        return -times(a, token.policy), -a, clips
    if config.algorithm == "cispo":
        weight = min(max(r, low), high)
        clips |= {"clip_low_fraction": float(r < low), "clip_high_fraction": float(r > high)}
        return -times(weight * a, token.policy), -weight * a, clips
    loss, slope = -r * a, -r * a
    if a > 0 and r > high:
        loss, slope, clips["clip_high_fraction"] = -high * a, 0.0, 1.0
    if a < 0 and r < low:
        loss, slope, clips["clip_low_fraction"] = -low * a, 0.0, 1.0
    if config.dual_clip is not None and a < 0 and loss > -config.dual_clip * a:
        loss, slope = -config.dual_clip * a, 0.0
        clips = {"clip_low_fraction": 0.0, "clip_high_fraction": 0.0, "dual_clip_fraction": 1.0}
    return loss, slope, clips


def importance(token: Token, sample: Sample, config: PolicyConfig) -> dict[str, float]:
    """The weight, and what happened to it."""
    at = {"token": token.old - token.rollout, "sequence": sample.product, "geometric": sample.apart}
    weight, truncated, outside, masked = 1.0, False, False, False
    if config.tis_cap is not None or config.icepop is not None:
        weight = bounded(at[config.tis_level])
    if config.tis_cap is not None and weight > config.tis_cap:
        weight, truncated = config.tis_cap, True
    if config.icepop is not None:
        outside = not config.icepop[0] <= bounded(at["token"]) <= config.icepop[1]
    if config.mis is not None:
        masked = not config.mis[0] <= bounded(at[config.mis_level]) <= config.mis[1]
    return {
        "tis_mean": 0.0 if outside or masked else weight,
        "tis_truncated": float(truncated),
        "icepop_masked": float(outside),
        "mis_masked": float(masked),
    }


def k3(d: float) -> float:
    """The estimate of KL(p || q) where log p - log q = d."""
    b = max(d, -BOUND)
    return math.expm1(-b) + b


def distance(token: Token, config: PolicyConfig) -> tuple[float, float]:
    """Of the reference policy, and its slope."""
    d, x = token.policy - token.other, token.policy - token.old
    if config.kl_type == "k1":
        away, slope = d, 1.0
    elif config.kl_type == "k2":
        away, slope = d * d / 2, d
    else:
        away, slope = k3(d), -math.expm1(-max(d, -BOUND)) * (d >= -BOUND)
    if config.kl_unbiased:
        away, slope = bounded(x) * away, bounded(x) * (slope + away * (abs(x) <= BOUND))
    return away, slope


def one(token: Token, sample: Sample, config: PolicyConfig) -> dict[str, float]:
    """A trained token's terms; `through` is the slope in log r, `slope` in its own logprob alone."""
    x = token.policy - token.old if config.ratio == "token" else sample.moved
    loss, push, clips = surrogate(token, bounded(x), config)
    weights = importance(token, sample, config)
    away, away_slope = distance(token, config)
    weighted, push = times(weights["tis_mean"], loss), times(weights["tis_mean"], push)
    if config.algorithm == "ppo" and abs(x) > BOUND:
        push = 0.0  # beyond, the ratio is a constant
    shared = config.algorithm == "ppo" and config.ratio == "sequence"
    apart = token.old - token.rollout
    return {
        "tokens": 1.0,
        "loss": weighted + config.kl_coef * away - config.entropy_coef * token.entropy,
        "ratio_mean": bounded(x),
        "clip_fraction": clips["clip_low_fraction"] + clips["clip_high_fraction"],
        **clips,
        **weights,
        "kl_old_k1": token.old - token.policy,
        "kl_old_k3": k3(token.old - token.policy),
        "kl_reference": away,
        "entropy": token.entropy,
        "mismatch_abs": abs(apart),
        "mismatch_k3": k3(-apart),
        "mismatch_f2": float(abs(apart) > math.log(2)),
        "surrogate": weighted,
        "advantage_mean": token.advantage,
        "slope": config.kl_coef * away_slope + (0.0 if shared else push),
        "through": push if shared else 0.0,
    }


def naive(
    tokens: Sequence[Token],
    config: PolicyConfig,
    denominator: float | None,
    *,
    samples: int | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[float, list[float], list[float], dict[str, float], dict[str, list[float]]]:
    """Loss, its slopes in logprob and entropy, metrics, sums by sample."""
    number = count_samples(tokens) if samples is None else samples
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, token in enumerate(tokens):
        if token.trained:
            members[token.sample].append(i)
    whole = {s: Sample.of([tokens[i] for i in m]) for s, m in members.items()}
    terms = {i: one(tokens[i], whole[s], config) for s, m in members.items() for i in m}
    size: defaultdict[int, int] = defaultdict(int)
    for s, m in members.items():
        size[groups[s] if groups is not None else s] += len(m)
    share = dict.fromkeys(members, 1.0)
    units = float(len(terms))
    if config.normalize == "sequence":
        share, units = {s: 1 / len(m) for s, m in members.items()}, float(len(members))
    elif config.normalize == "group":
        assert groups is not None
        share, units = {s: 1 / size[groups[s]] for s in members}, float(len(size))
    divisor = (units or 1.0) if denominator is None else denominator
    slopes, bonus = [0.0] * len(tokens), [0.0] * len(tokens)
    for s, m in members.items():
        common = sum(terms[i]["through"] for i in m) / len(m)
        for i in m:
            slopes[i] = share[s] * (terms[i]["slope"] + common) / divisor
            bonus[i] = -share[s] * config.entropy_coef / divisor
    sums = {name: [sum(terms[i][name] for i in members.get(s, [])) for s in range(number)] for name in TERMS}
    loss = sum(share.get(s, 0.0) * value for s, value in enumerate(sums["loss"])) / divisor
    metrics = {name: sum(values) / max(len(terms), 1) for name, values in sums.items()}
    ratios = [term["ratio_mean"] for term in terms.values()]
    metrics |= {"tokens": float(len(terms)), "loss": loss, "samples": float(len(members))}
    metrics |= {"ratio_max": max(ratios, default=0.0), "ratio_min": min(ratios, default=0.0)}
    return loss, slopes, bonus, metrics, sums


# --- the op ----------------------------------------------------------------------------------------------------------


def count_samples(tokens: Sequence[Token]) -> int:
    """As many as are named."""
    return max((t.sample for t in tokens), default=-1) + 1


def columns(
    tokens: Sequence[Token],
    device: torch.device,
    dtype: torch.dtype,
    *,
    poison: float = NAN,
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """logprob, entropy, reference [T] of a dtype and the batch; `poison` stands wherever nothing is trained."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(t, name) if t.trained else poison for t in tokens], dtype=dtype, device=device)

    batch = Batch(
        loss_mask=torch.tensor([t.trained for t in tokens], dtype=torch.bool, device=device),
        logprobs=column("rollout"),
        old_logprobs=column("old"),
        advantages=column("advantage"),
        segment_ids=torch.tensor([t.sample for t in tokens], dtype=torch.int32, device=device),
        num_samples=count_samples(tokens) if samples is None else samples,
    )
    return column("policy"), column("entropy"), column("other"), batch


def apply(
    logprob: Tensor,
    entropy: Tensor,
    reference: Tensor | None,
    batch: Batch,
    config: PolicyConfig,
    *,
    grad: float = 1.0,
    **given: Any,
) -> Result:
    """Loss, gradients for `grad` of the loss, and everything else of the op."""
    logprob, entropy = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
    out = policy_loss(logprob, batch, config, entropy=entropy, reference=reference, **given)
    assert out.loss.ndim == 0
    assert tuple(out.metrics) == METRICS
    assert all(m.ndim == 0 and not m.requires_grad and m.device == out.loss.device for m in out.metrics.values())
    assert out.read() == {name: float(value) for name, value in out.metrics.items()} or out.values.isnan().any()
    (out.loss * grad).backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None
    bonus = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return Result(out.loss.detach(), logprob.grad, bonus, out.metrics, out.by_sample())


def run(
    tokens: Sequence[Token],
    config: PolicyConfig,
    device: torch.device,
    *,
    samples: int | None = None,
    dtype: torch.dtype = torch.float64,
    given_old: bool = True,
    poison: float = NAN,
    **given: Any,
) -> Result:
    """The op on tokens; all but the logprob are float64."""
    logprob, entropy, reference, batch = columns(tokens, device, torch.float64, poison=poison, samples=samples)
    batch = batch if given_old else replace(batch, old_logprobs=None)
    return apply(logprob.to(dtype), entropy, reference, batch, config, **given)
