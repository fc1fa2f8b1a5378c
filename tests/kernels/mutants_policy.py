"""Broken kernels of the policy loss, each with the check of `policy_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import policy_runs, policy_triton
from tests.kernels.mutants import Mutant
from tests.kernels.policy_checks import CHECKS

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (policy_runs, policy_triton)

MUTANTS = (
    # runs
    Mutant("bisection stops a step early", "for _ in range(steps):", "for _ in range(steps - 1):", "runs"),
    Mutant("runs go over blocks", "sample + middle // BLOCK < edge", "sample < edge", "runs"),
    Mutant("a run's last position is lost", "return t, t < end,", "return t, t < end - 1,", "runs"),
    Mutant("padding is trained", "known = tl.where(sample < samples, end, start)", "known = end", "unknown_samples"),
    Mutant(
        "ids are cut to 32 bits",
        "tl.where((found < 0) | (found > samples), samples, found).to(tl.int32)",
        "tl.where(found.to(tl.int32) < 0, samples, found.to(tl.int32))",
        "unknown_samples",
    ),
    Mutant("the mask is not looked at", "other=0) != 0, sample", "other=0) >= 0, sample", "views"),
    Mutant("what is masked is read", "tl.where(here, value.to(tl.float32), 0.0)", "value.to(tl.float32)", "runs"),
    Mutant(
        "only the first runs of a sample",
        "for first in range(low, high, CHUNK):",
        "for first in range(low, low + 1):",
        "long_samples",
    ),
    # ratios
    Mutant(
        "the mean of a sequence is its sum",
        "last, runs, CHUNK) / count + tl.zeros",
        "last, runs, CHUNK) + tl.zeros",
        "gspo_by_hand",
    ),
    Mutant("a sequence has its tokens' ratios", 'if RATIO != "token":', 'if RATIO == "none":', "gspo_by_hand"),
    Mutant("exp is not bounded", "return tl.where(x > BOUND, BOUND,", "return tl.where(x > 1000.0, BOUND,", "bounded"),
    Mutant(
        "the bound has a slope",
        "clipped | dualed | outside(log_ratio, -BOUND, BOUND)",
        "clipped | dualed",
        "bounded",
    ),
    Mutant("NaN is bounded", "tl.where(x < -BOUND, -BOUND, x)", "tl.maximum(x, -BOUND)", "nan_is_seen"),
    Mutant(
        "without an old policy the ratio is the policy's",
        "    before = policy\n    if old is not None:\n        before = read(old, t, here)\n    moved",
        "    before = policy * 0.0\n    if old is not None:\n        before = read(old, t, here)\n    moved",
        "without_old",
    ),
    # clips
    Mutant("the optimistic side", "clipped = limited > plain", "clipped = limited < plain", "clips_by_hand"),
    Mutant("equality is a clip", "clipped = limited > plain", "clipped = limited >= plain", "edges_are_inside"),
    Mutant(
        "clip bounds change places",
        "tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))",
        "tl.where(ratio < low, high, tl.where(ratio > high, low, ratio))",
        "clips_by_hand",
    ),
    Mutant("a clipped token has a slope", "tl.where(clipped | dualed |", "tl.where(dualed |", "clips_by_hand"),
    Mutant("the dual clip is of both signs", "dualed = (advantage < 0) & ", "dualed = (advantage != 0) & ", "clips"),
    Mutant(
        "clips at either end change places",
        "keep(sums, 4, under, here)\n    keep(sums, 5, over, here)",
        "keep(sums, 4, over, here)\n    keep(sums, 5, under, here)",
        "clips_by_hand",
    ),
    Mutant(
        "CISPO does not clip below",
        "tl.where(under, low, tl.where(over, high, ratio))",
        "tl.where(over, high, ratio)",
        "cispo_by_hand",
    ),
    Mutant(
        "CISPO differentiates the ratio",
        "push, slope = -times(weighted, policy), -weighted",
        "push, slope = -times(weighted, policy), -weighted * (1.0 + policy)",
        "cispo_by_hand",
    ),
    Mutant(
        "a weight of 0 times infinity",
        "return tl.where(factor == 0.0, 0.0, factor * value)",
        "return factor * value",
        "bounded",
    ),
    # importance weights
    Mutant("weights are not truncated", "weight = tl.where(truncated, cap, raw)", "weight = raw", "weights_by_hand"),
    Mutant("truncated where equal", "truncated = raw > cap", "truncated = raw >= cap", "edges_are_inside"),
    Mutant(
        "band edges are outside", "return (x < low) | (x > high)", "return (x <= low) | (x >= high)", "edges_are_inside"
    ),
    Mutant(
        "IcePop does not mask",
        "weight = tl.where(beyond | masked, 0.0, weight)",
        "weight = tl.where(masked, 0.0, weight)",
        "masks_by_hand",
    ),
    Mutant(
        "MIS does not mask",
        "weight = tl.where(beyond | masked, 0.0, weight)",
        "weight = tl.where(beyond, 0.0, weight)",
        "masks_by_hand",
    ),
    Mutant(
        "the product truncates as a mean",
        'raw = exp(bounded(product if TIS_LEVEL == "sequence" else mean))',
        "raw = exp(bounded(mean))",
        "weights_by_hand",
    ),
    Mutant(
        "the mean masks as a product",
        'judged = exp(bounded(product if MIS_LEVEL == "sequence" else mean))',
        "judged = exp(bounded(product))",
        "masks_by_hand",
    ),
    Mutant(
        "weights have no effect on slopes",
        "push, slope = times(weight, push), times(weight, slope)",
        "push = times(weight, push)",
        "weights_by_hand",
    ),
    # KL and entropy
    Mutant("k3 of the other side", "away = k3(-d)", "away = k3(d)", "kl_by_hand"),
    Mutant(
        "k3 cancels near 0",
        "tl.where(tl.abs(x) < 1.0, 0.5 * x * x * series,",
        "tl.where(tl.abs(x) < 0.0, 0.5 * x * x * series,",
        "distances",
    ),
    Mutant(
        "k3 pushes beyond its bound",
        "away_slope = tl.where(d < -BOUND, 0.0, away_slope)",
        "away_slope = away_slope",
        "distances",
    ),
    Mutant(
        "the unbiased KL forgets the ratio's slope",
        "drawn * (away_slope + tl.where(",
        "drawn * (away_slope + 0.0 * tl.where(",
        "kl_by_hand",
    ),
    Mutant(
        "KL of the old policy has its sign wrong",
        "keep(sums, 11, -moved, here)",
        "keep(sums, 11, moved, here)",
        "kl_by_hand",
    ),
    Mutant(
        "mismatch k3 of the other side",
        "keep(sums, 16, k3(apart), here)",
        "keep(sums, 16, k3(-apart), here)",
        "weights_by_hand",
    ),
    Mutant(
        "the entropy is a malus",
        "- times(entropy_coef, spread), here)",
        "+ times(entropy_coef, spread), here)",
        "kl_by_hand",
    ),
    # the fold
    Mutant(
        "the largest of the last runs",
        "best = tl.maximum(best, tl.load(kept",
        "best = tl.maximum(best * 0.0, tl.load(kept",
        "many_runs",
    ),
    Mutant(
        "the smallest is minus the largest",
        "end = tl.where(term == _LAST_EXTREME, -end, end)",
        "end = end",
        "clips_by_hand",
    ),
    Mutant(
        "samples replace each other", "total += tl.sum(value, axis=0)", "total = tl.sum(value, axis=0)", "many_samples"
    ),
    Mutant(
        "runs replace each other",
        "value += tl.sum(tl.load(kept + term * runs + r",
        "value = tl.sum(tl.load(kept + term * runs + r",
        "long_samples",
    ),
    Mutant(
        "samples count that have no token",
        "counted += tl.sum((count > 0).to(tl.float32), axis=0)",
        "counted += tl.sum(known.to(tl.float32), axis=0)",
        "runs",
    ),
    Mutant(
        "means of sequences are sums",
        "part = 1.0 / tl.maximum(count, 1.0)",
        "part = 1.0 + 0.0 * count",
        "means_by_hand",
    ),
    Mutant(
        "groups are samples",
        "part = 1.0 / tl.maximum(siblings, 1.0)",
        "part = 1.0 / tl.maximum(count, 1.0)",
        "means_by_hand",
    ),
    Mutant(
        "a group counts for each of its samples",
        "units += tl.sum(count * part, axis=0)",
        "units += tl.sum((count > 0).to(tl.float32), axis=0)",
        "means_by_hand",
    ),
    Mutant("division by nothing", "whole = tl.where(units > 0.0, units, 1.0)", "whole = units", "nothing"),
    Mutant("the given denominator is not used", "whole = whole * 0.0 + given", "whole = whole * 1.0", "means_by_hand"),
    Mutant(
        "the denominator tensor is not read",
        "whole = tl.load(denominator)",
        "whole = tl.load(denominator) * 0.0 + whole",
        "views",
    ),
    Mutant(
        "the common slope is a sum",
        "tl.store(common + s, value / tl.maximum(count, 1.0)",
        "tl.store(common + s, value",
        "gspo_by_hand",
    ),
    # the gradient
    Mutant(
        "the gradient forgets the upstream",
        "scale = tl.load(grad) / tl.load(divisor)",
        "scale = 1.0 / tl.load(divisor)",
        "normalisations",
    ),
    Mutant(
        "the gradient forgets the divisor",
        "scale = tl.load(grad) / tl.load(divisor)",
        "scale = tl.load(grad)",
        "means_by_hand",
    ),
    Mutant(
        "the gradient forgets the share",
        "scale = scale * tl.load(share + sample, mask=here, other=0.0)",
        "scale = scale * 1.0",
        "means_by_hand",
    ),
    Mutant(
        "the gradient forgets the sequence",
        "slope += tl.load(common + sample, mask=here, other=0.0)",
        "slope += 0.0",
        "gspo_by_hand",
    ),
    Mutant(
        "a sequence's slope counts twice",
        "slope = tl.zeros_like(slope)\n\n    away",
        "slope = slope * 1.0\n\n    away",
        "gspo_by_hand",
    ),
    Mutant(
        "masked positions have a gradient",
        "tl.where(here, scale * slope, 0.0)",
        "scale * (slope + 1.0)",
        "normalisations",
    ),
    Mutant(
        "the last gradient is lost",
        "out.dtype.element_ty), mask=t < T)",
        "out.dtype.element_ty), mask=t < T - 1)",
        "types",
    ),
)
