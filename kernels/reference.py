"""Every op in plain torch: the definition, the CPU path, and in float64 the oracle that kernels are tested against.

Legend: T tokens, D model, V vocabulary, E experts, K top-k, G groups, S samples, N tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacenote.kernels.spec import FREE, PAD, RouterSpec

REPLAYED, FREED, DUPLICATE, OUT_OF_RANGE, PADDED = range(5)
"""Fate of a row: replayed, routed freely (as asked, or missing), refused for a reason and routed freely, padding."""

COUNTERS = ("replayed", "free", "duplicate", "out_of_range", "pad", "flipped", "overlap")
"""Names of the counts of a routing; the first five are the fates above."""

MAX_LOG_RATIO = 20.0
"""Bound on a difference of logprobs before exp: e^20 is 4.9e8, a float32 product with it stays finite."""


def wide(x: Tensor) -> Tensor:
    """[...] in the dtype that is computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


# --- routing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routing:
    """weights [T, K], experts [T, K] int64, fate [T] uint8 (REPLAYED..PADDED), native [T, K] int64: the own top-k."""

    weights: Tensor
    experts: Tensor
    fate: Tensor
    native: Tensor


def replay_topk(
    logits: Tensor, rows: Tensor, spec: RouterSpec, *, state: Tensor | None = None, bias: Tensor | None = None
) -> Routing:
    """The definition of routing replay; gradients flow from the weights to the logits at the chosen experts.

    Args:
        logits: [T, E] floating.
        rows: [T, K] integer, the recorded experts in their recorded order.
        spec: scores, selection, renormalisation.
        state: [T] uint8 FREE, REPLAY, PAD; None replays every row.
        bias: [E], added to the scores for selection only.
    """
    if state is not None:  # what stands in a padding row must reach nothing, not even as 0 * NaN
        logits = torch.where((state == PAD)[:, None], 0.0, logits)
    own = native_topk(logits, rows.shape[1], spec, bias)
    fate = row_fate(rows, logits.shape[1], state)
    spread = pad_experts(rows.shape[0], rows.shape[1], logits.shape[1], logits.device)
    experts = torch.where((fate == REPLAYED)[:, None], rows.long(), own)
    experts = torch.where((fate == PADDED)[:, None], spread, experts)
    weights = torch.where((fate == PADDED)[:, None], 0.0, chosen_weights(logits, experts, spec))
    return Routing(weights.to(weight_dtype(logits.dtype, spec)), experts, fate, own)


def weight_dtype(logits: torch.dtype, spec: RouterSpec) -> torch.dtype:
    """dtype of the weights for logits of a dtype; float64 logits keep float64, for oracles and gradient checks."""
    return logits if spec.weight_dtype == "logits" or logits == torch.float64 else torch.float32


def scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] scores of the logits [T, E]; `softmax_topk` scores by the logits themselves."""
    if spec.score == "softmax_topk":
        return wide(logits)
    x = in_score_dtype(logits, spec)
    return x.softmax(dim=1, dtype=x.dtype) if spec.score == "softmax" else x.sigmoid()


def in_score_dtype(logits: Tensor, spec: RouterSpec) -> Tensor:
    """[T, any] logits in the dtype of the spec's arithmetic, in which every step from scores to weights is rounded.

    With the explicit dtypes below autocast, which the caller may have on, changes nothing.
    """
    return logits if spec.score_dtype == "logits" else wide(logits)


def chosen_weights(logits: Tensor, experts: Tensor, spec: RouterSpec) -> Tensor:
    """[T, K] weights of `experts` [T, K], from the logits [T, E], before padding and the cast."""
    if spec.score == "softmax_topk":
        x = in_score_dtype(logits, spec).gather(1, experts)
        w = x.softmax(dim=1, dtype=x.dtype)
    else:
        w = scores(logits, spec).gather(1, experts)
    if spec.renormalize:
        w = w / (w.sum(dim=1, keepdim=True, dtype=w.dtype) + spec.eps)
    return w * spec.scale


def replay_topk_backward(
    logits: Tensor, experts: Tensor, spec: RouterSpec, grad: Tensor, *, state: Tensor | None = None
) -> Tensor:
    """Gradient [T, E] of the logits [T, E], from that of the weights [T, K] of `experts` [T, K]; 0 in padding rows."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        inner = leaf if state is None else torch.where((state == PAD)[:, None], 0.0, leaf)
        weights = chosen_weights(inner, experts, spec).to(weight_dtype(logits.dtype, spec))
        if state is not None:
            weights = torch.where((state == PAD)[:, None], 0.0, weights)
        return torch.autograd.grad(weights, leaf, grad)[0]


def selects_by_logits(spec: RouterSpec, bias: Tensor | None) -> bool:
    """Whether the order of the logits is the order of selection, so that no score has to be rounded.

    Scores grow with logits; only a bias [E] or a sum over a group makes their values matter. Saturated sigmoids and
    underflown softmaxes would tie where the logits do not.
    """
    return bias is None and spec.groups == 1


@torch.no_grad()
def native_topk(logits: Tensor, k: int, spec: RouterSpec, bias: Tensor | None) -> Tensor:
    """[T, K] int64: the router's own choice from logits [T, E], best first; ties go to the lowest index.

    NaN counts as the largest value, as in torch.sort. Experts of closed groups count as -inf.
    """
    select = wide(logits) if selects_by_logits(spec, bias) else wide(scores(logits, spec))
    if bias is not None:
        select = select + wide(bias)
    if spec.groups > 1:
        tokens, experts = select.shape
        grouped = select.reshape(tokens, spec.groups, experts // spec.groups)
        best = grouped.sort(dim=2, descending=True).values
        rank = best[:, :, 0]
        for i in range(1, group_depth(k, experts, spec)):  # best first: the order of a sum decides its rounding
            rank = rank + best[:, :, i]
        opened = rank.sort(dim=1, descending=True, stable=True).indices[:, : spec.topk_groups]
        closed = torch.ones_like(rank, dtype=torch.bool).scatter(1, opened, False)
        select = grouped.masked_fill(closed[:, :, None], float("-inf")).reshape(tokens, experts)
    return select.sort(dim=1, descending=True, stable=True).indices[:, :k]


def group_depth(k: int, experts: int, spec: RouterSpec) -> int:
    """How many of a group's best scores make up the score of the group."""
    best = {"max": 1, "top2": 2, "topk_share": max(1, k // spec.topk_groups)}[spec.group_score]
    return min(best, experts // spec.groups)


@torch.no_grad()
def row_fate(rows: Tensor, num_experts: int, state: Tensor | None) -> Tensor:
    """[T] uint8: what becomes of each row [T, K]. A negative id means that the row is missing."""
    ids = rows.long()
    ordered = ids.sort(dim=1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    fate = torch.where(repeats, DUPLICATE, REPLAYED)
    fate = torch.where((ids >= num_experts).any(dim=1), OUT_OF_RANGE, fate)
    fate = torch.where((ids < 0).any(dim=1), FREED, fate)
    if state is not None:
        fate = torch.where(state == FREE, FREED, fate)
        fate = torch.where(state == PAD, PADDED, fate)
    return fate.to(torch.uint8)


def pad_experts(tokens: int, k: int, num_experts: int, device: torch.device | str) -> Tensor:
    """[T, K] int64: K distinct experts a row, spread evenly over the expert range from row to row."""
    start = torch.arange(tokens, device=device)[:, None] * k
    return (start + torch.arange(k, device=device)) % num_experts


@torch.no_grad()
def route_counts(out: Routing, rows: Tensor) -> Tensor:
    """[7] int64 in the order of COUNTERS, for the recorded rows [T, K]."""
    fates = [(out.fate == fate).sum() for fate in range(5)]
    replayed = out.fate == REPLAYED
    both = (rows.long()[:, :, None] == out.native[:, None, :]).any(dim=2).sum(dim=1)
    flipped = (replayed & (both < rows.shape[1])).sum()
    return torch.stack([*fates, flipped, torch.where(replayed, both, 0).sum()])


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackIndex:
    """Where position p of a packed batch comes from: the one map that every packed array is read through.

    Attributes:
        segment: [T] int64, the sample.
        position: [T] int64, the input token's place in its sample.
        token: [T] int64, that token in the samples' concatenated tokens; its target stands at `token + 1`.
        row: [T] int64, its row in the samples' concatenated rows (a sample has one row fewer than tokens).
    """

    segment: Tensor
    position: Tensor
    token: Tensor
    row: Tensor


def pack_index(lengths: Tensor, kept: Tensor) -> PackIndex:
    """The map for samples of `lengths` [S] tokens of which the first `kept` [S] >= 1 stay; kept - 1 positions each."""
    counts = kept - 1
    first = counts.cumsum(0) - counts
    segment = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    position = torch.arange(len(segment), device=counts.device) - first[segment]
    token = (lengths.cumsum(0) - lengths)[segment] + position
    row = ((lengths - 1).cumsum(0) - (lengths - 1))[segment] + position
    return PackIndex(segment, position, token, row)


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """[S] sums of `values` [T] by segment; segments stand one after another, -1 (padding) at the end.

    Added in order of position: no atomics on floats, so the result repeats on any device.
    """
    if values.numel() == 0:
        return values.new_zeros(num_segments) + values.sum()  # the sum keeps the gradient's path
    ids = torch.where(segment_ids < 0, num_segments, segment_ids).long()
    lengths = torch.zeros(num_segments + 1, dtype=torch.int64, device=values.device)
    lengths.index_add_(0, ids, torch.ones_like(ids))
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)[:num_segments]


def segment_mean(values: Tensor, mask: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """[S] means of `values` [T] over the positions of each segment where `mask` [T] is set; 0 where it never is."""
    total = segment_sum(torch.where(mask, values, 0.0), segment_ids, num_segments)
    count = segment_sum(mask.to(values.dtype), segment_ids, num_segments)
    return total / count.clamp(min=1)


# --- logprob ---------------------------------------------------------------------------------------------------------


def logprob(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Logprob [T] of each target [T] and entropy [T] in nats of softmax(logits [T, V] / temperature).

    The definition; it keeps [T, V] arrays. A logit of -inf is a token that cannot be: it adds nothing to the entropy.
    """
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logp = (wide(logits) / scale).log_softmax(dim=1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp.masked_fill(p == 0, 0.0), 0.0).sum(dim=1)
    return logp.gather(1, targets.long()[:, None])[:, 0], entropy


# --- policy terms ----------------------------------------------------------------------------------------------------


def bounded_exp(x: Tensor) -> Tensor:
    """exp of a difference of logprobs [T], bounded by +-MAX_LOG_RATIO; no gradient flows beyond the bound."""
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True, slots=True)
class Surrogate:
    """PPO's loss [T], the ratio [T], and where the clipped and the dual-clipped branch was taken, [T] bool."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def surrogate(
    logprob: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """max(-r A, -clip(r, 1 - low, 1 + high) A) with r = exp(logprob - old), all [T]; equality is not a clip.

    arXiv 1707.06347 eq. 7, the two bounds of arXiv 2503.14476; dual clip, arXiv 1912.09729 eq. 5: for A < 0 the loss is
    at most -c A.
    """
    ratio = bounded_exp(logprob - old)
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    dual = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
    return Surrogate(loss, ratio, clipped & ~dual, dual)


def importance(
    old: Tensor, rollout: Tensor, cap: float | None, band: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T] = exp(old - rollout) [T], at most `cap` and zero outside `band`; and both happenings, [T] bool.

    Truncation: TIS, fengyao.notion.site/off-policy-rl. Band, its edges inside: IcePop, arXiv 2510.18855.
    """
    raw = bounded_exp(old - rollout)
    weight, truncated, outside = raw, torch.zeros_like(raw, dtype=torch.bool), torch.zeros_like(raw, dtype=torch.bool)
    if cap is not None:
        weight, truncated = raw.clamp(max=cap), raw > cap
    if band is not None:
        outside = (raw < band[0]) | (raw > band[1])
        weight = torch.where(outside, 0.0, weight)
    return weight, truncated, outside


def kl(logprob: Tensor, other: Tensor, kind: str) -> Tensor:
    """Estimates [T] of KL(policy || other) at tokens sampled from the policy (joschu.net/blog/kl-approx.html).

    k3 is exp(-d) - 1 + d with d = logprob - other, never negative; d is bounded below, where exp would overflow, and no
    gradient flows from there: that of the linear term alone would have the wrong sign.
    """
    d = logprob - other
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    d = d.clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-d) + d
