# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels behind `policy_loss`. `reference_policy.policy_loss` is the definition.

Positions are cut into runs, each of one sample and one block. Sample plus block never falls and differs from run to
run, so it is a run's number, and its ends are found by bisection. A program a run computes its tokens' terms, writes
each token's slope, and keeps one sum of each term; then a program a term adds these up by sample, in fixed order. Terms
that need sums over the whole sample (a sequence's ratio, a sample's importance weight) take one more launch before,
since programs cannot wait for each other. The gradient is the slopes times what the second launch finds out.

Legend: T tokens, S samples, R = S + T / BLOCK runs, F names of TERMS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels.policy_config import PolicyConfig
from pacenote.kernels.policy_runs import BOUND, bounded, exp, k3, keep, outside, read, run, sample_sum, times
from pacenote.kernels.reference_policy import (
    LOG_TAU,
    METRICS,
    TERMS,
    PolicyInputs,
    PolicyResult,
    PolicySlopes,
)
from pacenote.kernels.segment_triton import edges

BLOCK = 128 if launch.INTERPRETED else 512
"""Positions of a run at most: four a thread, for each of which it holds some fifteen numbers at once."""
ROWS, CHUNK = (4, 2) if launch.INTERPRETED else (32, 32)
"""Samples, and runs of each, that are added up at a time. In the interpreter few, so that small tests exceed them."""
INF = float("inf")

_LOG_TAU = tl.constexpr(LOG_TAU)
# Sums that are kept: of TERMS, three more. Of the metrics, the last place holds the number of samples.
_FIRST_EXTREME, _LAST_EXTREME, _SLOPES = (tl.constexpr(len(TERMS) + i) for i in range(3))
_SAMPLES = tl.constexpr(METRICS.index("samples"))


# Numbers that change from batch to batch do not make another kernel by being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T", "samples", "steps"])
def _samples_kernel(
    logprob,  # [T]
    old,  # [T] or None
    rollout,  # [T]
    mask,  # [T] uint8
    segment_ids,  # [T]
    sums,  # [3, R]: tokens, and sums of log(policy / old) and log(old / rollout)
    owner,  # [R] int32, the run's sample
    T,
    samples,
    steps,  # of bisection
    BLOCK: tl.constexpr,
):
    t, _, here, sample = run(segment_ids, mask, T, samples, steps, BLOCK)
    policy = read(logprob, t, here)
    before = policy
    if old is not None:
        before = read(old, t, here)
    keep(sums, 0, here, here)
    keep(sums, 1, policy - before, here)
    keep(sums, 2, before - read(rollout, t, here), here)
    tl.store(owner + tl.program_id(0), sample)


@triton.jit(do_not_specialize=["T", "samples", "steps", "run_steps"])
def _tokens_kernel(
    logprob,  # [T]
    old,  # [T] or None
    rollout,  # [T]
    advantages,  # [T]
    entropy,  # [T] or None
    reference,  # [T] or None
    mask,  # [T] uint8
    segment_ids,  # [T]
    found,  # [3, R], of _samples_kernel, or None
    owners,  # [R] int32 as well
    slopes,  # [T] float32, 0 where nothing trains
    sums,  # [F + 3, R]
    owner,  # [R] int32
    T,
    samples,
    steps,
    run_steps,  # of bisection among the runs
    low,
    high,
    dual,
    cap,
    band_low,
    band_high,
    mis_low,
    mis_high,
    kl_coef,
    entropy_coef,
    ALGORITHM: tl.constexpr,
    RATIO: tl.constexpr,
    SHARED: tl.constexpr,
    WEIGHS: tl.constexpr,
    TIS_LEVEL: tl.constexpr,
    MIS_LEVEL: tl.constexpr,
    KL: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    t, inside, here, sample = run(segment_ids, mask, T, samples, steps, BLOCK)
    policy, after, advantage = read(logprob, t, here), read(rollout, t, here), read(advantages, t, here)
    before = policy
    if old is not None:
        before = read(old, t, here)
    moved, apart = policy - before, before - after
    keep(sums, 0, here, here)  # what is known is kept at once, for registers
    keep(sums, 11, -moved, here)
    keep(sums, 12, k3(moved), here)
    keep(sums, 15, tl.abs(apart), here)
    keep(sums, 16, k3(apart), here)
    keep(sums, 17, tl.abs(apart) > _LOG_TAU, here)
    keep(sums, 19, advantage, here)
    log_ratio, product, mean = moved, apart, apart
    if found is not None:
        runs = tl.num_programs(0)
        both = edges(owners, sample + tl.arange(0, 2), runs, samples, run_steps)
        first, last = tl.min(both, axis=0), tl.max(both, axis=0)
        count = tl.maximum(sample_sum(found, 0, first, last, runs, CHUNK), 1.0)
        product = sample_sum(found, 2, first, last, runs, CHUNK) + tl.zeros_like(apart)
        mean = product / count
        if RATIO != "token":
            log_ratio = sample_sum(found, 1, first, last, runs, CHUNK) / count + tl.zeros_like(moved)
    ratio, own = exp(bounded(log_ratio)), exp(bounded(apart))

    never = here & (here == 0)
    under, over, dualed = never, never, never
    if ALGORITHM == "reinforce":
        push, slope = -times(advantage, policy), -advantage
    elif ALGORITHM == "cispo":
        under, over = ratio < low, ratio > high
        weighted = tl.where(under, low, tl.where(over, high, ratio)) * advantage
        push, slope = -times(weighted, policy), -weighted
    else:
        plain = -ratio * advantage
        limited = -tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        clipped = limited > plain
        push = tl.where(clipped, limited, plain)
        dualed = (advantage < 0) & (push > -dual * advantage)
        push = tl.where(dualed, -dual * advantage, push)
        under, over = clipped & (ratio < low), clipped & (ratio > high)  # no dual clip is either: low < 1 < dual
        slope = tl.where(clipped | dualed | outside(log_ratio, -BOUND, BOUND), 0.0, plain)

    weight, truncated = tl.full([BLOCK], 1.0, tl.float32), never
    if WEIGHS:
        raw = own
        if TIS_LEVEL != "token":
            raw = exp(bounded(product if TIS_LEVEL == "sequence" else mean))
        truncated = raw > cap
        weight = tl.where(truncated, cap, raw)
    judged = own
    if MIS_LEVEL != "token":
        judged = exp(bounded(product if MIS_LEVEL == "sequence" else mean))
    beyond, masked = outside(own, band_low, band_high), outside(judged, mis_low, mis_high)
    weight = tl.where(beyond | masked, 0.0, weight)
    push, slope = times(weight, push), times(weight, slope)
    if SHARED:  # by all tokens of the sample
        keep(sums, _SLOPES, slope, here)
        slope = tl.zeros_like(slope)

    away = tl.zeros_like(policy)
    if reference is not None:
        d = policy - read(reference, t, here)
        if KL == "k1":
            away, away_slope = d, tl.full([BLOCK], 1.0, tl.float32)
        elif KL == "k2":
            away, away_slope = 0.5 * d * d, d
        else:
            away = k3(-d)
            near = tl.abs(d) < 1.0  # 1 - e^-d, without cancelling
            away_slope = tl.where(near, d - away, 1.0 - exp(bounded(-d)))
            away_slope = tl.where(d < -BOUND, 0.0, away_slope)
        if UNBIASED:
            drawn = exp(bounded(moved))
            away_slope = drawn * (away_slope + tl.where(outside(moved, -BOUND, BOUND), 0.0, away))
            away = drawn * away
        slope += times(kl_coef, away_slope)
    spread = tl.zeros_like(policy)
    if entropy is not None:
        spread = read(entropy, t, here)

    tl.store(slopes + t, tl.where(here, slope, 0.0), mask=inside)
    tl.store(owner + tl.program_id(0), sample)
    keep(sums, 1, push + times(kl_coef, away) - times(entropy_coef, spread), here)
    keep(sums, 2, ratio, here)
    keep(sums, 3, under | over, here)
    keep(sums, 4, under, here)
    keep(sums, 5, over, here)
    keep(sums, 6, dualed, here)
    keep(sums, 7, weight, here)
    keep(sums, 8, truncated, here)
    keep(sums, 9, beyond, here)
    keep(sums, 10, masked, here)
    keep(sums, 13, away, here)
    keep(sums, 14, spread, here)
    keep(sums, 18, push, here)
    at = tl.num_programs(0) * _FIRST_EXTREME + tl.program_id(0)
    tl.store(sums + at, tl.max(tl.where(here, ratio, float("-inf")), axis=0))
    tl.store(sums + at + tl.num_programs(0), tl.max(tl.where(here, -ratio, float("-inf")), axis=0))


@triton.jit(do_not_specialize=["runs", "samples", "run_steps"])
def _fold_kernel(
    kept,  # [F + 3, R]
    owners,  # [R]
    group_tokens,  # [S] or None
    denominator,  # 0-d float32 or None
    sums,  # [F, S]
    share,  # [S] or None
    common,  # [S] or None
    metrics,  # [M]
    loss,  # 0-d
    divisor,  # 0-d
    runs,
    samples,
    run_steps,
    given,  # the denominator, where GIVEN
    NORMALIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    term = tl.program_id(0)
    if (term == _FIRST_EXTREME) | (term == _LAST_EXTREME):
        best = tl.full([ROWS * CHUNK], float("-inf"), tl.float32)
        for first in range(0, runs, ROWS * CHUNK):
            r = first + tl.arange(0, ROWS * CHUNK)
            best = tl.maximum(best, tl.load(kept + term * runs + r, mask=r < runs, other=float("-inf")))
        end = tl.max(best, axis=0)
        end = tl.where(term == _LAST_EXTREME, -end, end)
        tl.store(metrics + term, tl.where(tl.abs(end) == float("inf"), 0.0, end))
    else:
        tokens, total, counted, weighted, units = 0.0, 0.0, 0.0, 0.0, 0.0
        for first in range(0, samples, ROWS):
            s = first + tl.arange(0, ROWS)
            known = s < samples
            low = edges(owners, s, runs, samples, run_steps)
            high = tl.where(known, edges(owners, s + 1, runs, samples, run_steps), low)
            count, value = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
            for chunk in range(0, tl.max(high - low, axis=0), CHUNK):
                r = low[:, None] + chunk + tl.arange(0, CHUNK)[None, :]
                count += tl.sum(tl.load(kept + r, mask=r < high[:, None], other=0.0), axis=1)
                value += tl.sum(tl.load(kept + term * runs + r, mask=r < high[:, None], other=0.0), axis=1)
            part = tl.full([ROWS], 1.0, tl.float32)
            if NORMALIZE == "sequence":
                part = 1.0 / tl.maximum(count, 1.0)
                units += tl.sum((count > 0).to(tl.float32), axis=0)
            elif NORMALIZE == "group":
                siblings = tl.load(group_tokens + s, mask=known, other=1).to(tl.float32)
                part = 1.0 / tl.maximum(siblings, 1.0)
                units += tl.sum(count * part, axis=0)
            else:
                units += tl.sum(count, axis=0)
            tokens += tl.sum(count, axis=0)
            total += tl.sum(value, axis=0)
            counted += tl.sum((count > 0).to(tl.float32), axis=0)
            weighted += tl.sum(part * value, axis=0)
            tl.store(sums + term * samples + s, value, mask=s < tl.where(term < _FIRST_EXTREME, samples, 0))
            if share is not None:
                tl.store(share + s, part, mask=s < tl.where(term == 1, samples, 0))
            if common is not None:
                tl.store(common + s, value / tl.maximum(count, 1.0), mask=s < tl.where(term == _SLOPES, samples, 0))
        whole = tl.where(units > 0.0, units, 1.0)
        if denominator is not None:
            whole = tl.load(denominator)
        elif GIVEN:
            whole = whole * 0.0 + given
        whole = whole.to(tl.float32)
        mean = tl.where(term == 0, tokens, total / tl.maximum(tokens, 1.0))
        tl.store(metrics + term, tl.where(term == 1, weighted / whole, mean), mask=term < _FIRST_EXTREME)
        tl.store(loss, weighted / whole, mask=term == 1)
        tl.store(divisor, whole, mask=term == 1)
        tl.store(metrics + _SAMPLES, counted, mask=term == 1)


@triton.jit(do_not_specialize=["T", "samples"])
def _gradient_kernel(
    grad,  # 0-d, of the loss
    divisor,  # 0-d
    slopes,  # [T]
    share,  # [S] or None
    common,  # [S] or None
    mask,  # [T] uint8
    segment_ids,  # [T]
    out,  # [T]
    bonus,  # [T], gradient of the entropy, or None
    T,
    samples,
    entropy_coef,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.load(segment_ids + t, mask=t < T, other=-1)
    here = (tl.load(mask + t, mask=t < T, other=0) != 0) & (sample >= 0) & (sample < samples)
    scale = tl.load(grad) / tl.load(divisor) + tl.zeros([BLOCK], tl.float32)
    if share is not None:
        scale = scale * tl.load(share + sample, mask=here, other=0.0)
    slope = tl.load(slopes + t, mask=here, other=0.0)
    if common is not None:
        slope += tl.load(common + sample, mask=here, other=0.0)
    tl.store(out + t, tl.where(here, scale * slope, 0.0).to(out.dtype.element_ty), mask=t < T)
    if bonus is not None:
        slope = tl.where(here, -scale * entropy_coef, 0.0)
        tl.store(bonus + t, slope.to(bonus.dtype.element_ty), mask=t < T)


# --- launches --------------------------------------------------------------------------------------------------------


def policy_loss(x: PolicyInputs, config: PolicyConfig) -> PolicyResult:
    """Two launches, or three where terms need sums over the whole sample.

    Floor: T (c + 5) bytes read, with c those of the [T] floats that are given, and 4 T written.

    Args:
        x: floats of bfloat16, float16 or float32, a denominator of float32.
        config: the terms.

    Returns:
        As the definition, float32.
    """
    tokens, samples = len(x.logprob), x.num_samples
    runs = max(1, samples + -(-tokens // BLOCK))
    empty = x.logprob.new_empty
    kept = empty((len(TERMS) + 3, runs), dtype=torch.float32)
    owner = empty(runs, dtype=torch.int32)
    given = [None if a is None else a.contiguous() for a in (x.logprob, x.old, x.rollout)]
    rest = [None if a is None else a.contiguous() for a in (x.advantages, x.entropy, x.reference)]
    where = x.mask.contiguous().view(torch.uint8), x.segment_ids.contiguous()
    size = tokens, samples, tokens.bit_length()
    floats: dict[str, Any] = {"dtype": torch.float32}
    shares = config.normalize in ("sequence", "group")
    slopes = PolicySlopes(
        slope=empty(tokens, **floats),
        share=empty(samples if shares else 0, **floats),
        common=empty(samples if config.shares_gradient else 0, **floats),
        divisor=empty((), **floats),
        num_samples=samples,
    )
    out = PolicyResult(
        loss=empty((), **floats),
        metrics=empty(len(METRICS), **floats),
        sums=empty((len(TERMS), samples), **floats),
        slopes=slopes,
    )
    denominator = x.denominator if isinstance(x.denominator, Tensor) else None
    number = 1.0 if x.denominator is None or denominator is not None else float(x.denominator)
    with launch.on_device_of(x.logprob):
        found, owners = None, owner
        if config.by_sample:
            found, owners = empty((3, runs), **floats), torch.empty_like(owner)
            _samples_kernel[(runs,)](*given, *where, found, owners, *size, BLOCK=BLOCK, num_warps=4)
        _tokens_kernel[(runs,)](
            *given, *rest, *where, found, owners, slopes.slope, kept, owner, *size, runs.bit_length(),
            **_numbers(config), BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
        _fold_kernel[(len(TERMS) + (3 if config.shares_gradient else 2),)](
            kept, owner, None if x.group_tokens is None else x.group_tokens.contiguous(), denominator, out.sums,
            slopes.share if shares else None, slopes.common if config.shares_gradient else None, out.metrics, out.loss,
            slopes.divisor, runs, samples, runs.bit_length(), number,
            NORMALIZE=config.normalize, GIVEN=x.denominator is not None, ROWS=ROWS, CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
    return out


def _numbers(config: PolicyConfig) -> dict[str, Any]:
    """A configuration as the kernel's arguments; a bound that is off is one that nothing passes."""

    def bound(value: float | None) -> float:
        return INF if value is None else float(value)

    band, mis = config.icepop or (0.0, INF), config.mis or (0.0, INF)
    return {
        "low": 1.0 - config.clip_low,
        "high": 1.0 + config.clip_high,
        "dual": bound(config.dual_clip),
        "cap": bound(config.tis_cap),
        "band_low": float(band[0]),
        "band_high": float(band[1]),
        "mis_low": float(mis[0]),
        "mis_high": float(mis[1]),
        "kl_coef": float(config.kl_coef),
        "entropy_coef": float(config.entropy_coef),
        "ALGORITHM": config.algorithm,
        "RATIO": config.ratio,
        "SHARED": config.shares_gradient,
        "WEIGHS": config.weighs,
        "TIS_LEVEL": config.tis_level,
        "MIS_LEVEL": config.mis_level if config.mis is not None else "token",
        "KL": config.kl_type,
        "UNBIASED": config.kl_unbiased,
    }


def policy_gradient(
    out: PolicySlopes,
    grad: Tensor,
    mask: Tensor,
    segment_ids: Tensor,
    entropy_coef: float,
    dtype: torch.dtype,
    bonus_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """One launch.

    Args:
        out: of `policy_loss`; share and common are None if they are [0].
        grad: 0-d float32, of the loss.
        mask: [T] bool.
        segment_ids: [T].
        entropy_coef: of the configuration.
        dtype: of the logprob's gradient.
        bonus_dtype: of the entropy's; None: it is not wanted.

    Returns:
        Gradients of logprob [T] and entropy [T], or [0].
    """
    tokens = len(mask)
    result = mask.new_empty(tokens, dtype=dtype)
    bonus = mask.new_empty(0 if bonus_dtype is None else tokens, dtype=bonus_dtype or dtype)
    if not tokens:
        return result, bonus
    with launch.on_device_of(mask):
        _gradient_kernel[(-(-tokens // BLOCK),)](
            grad.contiguous(),
            out.divisor,
            out.slope,
            out.share if len(out.share) else None,
            out.common if len(out.common) else None,
            mask.contiguous().view(torch.uint8),
            segment_ids.contiguous(),
            result,
            None if bonus_dtype is None else bonus,
            tokens,
            out.num_samples,
            entropy_coef,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return result, bonus
