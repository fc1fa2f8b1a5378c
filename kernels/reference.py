"""Every op in plain torch: the definition, the CPU path, and in float64 the oracle that kernels are tested against.

The policy loss stands in `reference_policy`.

Legend: T tokens, D model, V vocabulary, E experts, K top-k, G groups, S samples, N tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacenote.kernels import sparsemixer
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec

REPLAYED, FREED, DUPLICATE, OUT_OF_RANGE, PADDED = range(5)
"""Fate of a row: replayed, routed freely (as asked, or missing), refused for a reason and routed freely, padding."""

COUNTERS = ("replayed", "free", "duplicate", "out_of_range", "pad", "flipped", "overlap", "missing")
"""Names of the counts of a routing; the first five are the fates above, `missing` is a part of `free`."""


def wide(x: Tensor) -> Tensor:
    """[...] in the dtype that is computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


# --- routing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routing:
    """What became of T rows.

    Attributes:
        weights: [T, K].
        experts: [T, K] int64.
        fate: [T] uint8, REPLAYED..PADDED.
        native: [T, K] int64, the own top-k.
        missing: [T] bool, rows that were to be replayed and have a negative id; FREED by their fate.
    """

    weights: Tensor
    experts: Tensor
    fate: Tensor
    native: Tensor
    missing: Tensor


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
    missing = (fate == FREED) & (rows.long() < 0).any(dim=1)
    missing = missing if state is None else missing & (state != FREE)
    return Routing(weights.to(weight_dtype(logits.dtype, spec)), experts, fate, own, missing)


def weight_dtype(logits: torch.dtype, spec: RouterSpec) -> torch.dtype:
    """dtype of the weights for logits of a dtype; float64 logits keep float64, for oracles and gradient checks."""
    return logits if spec.weight_dtype == "logits" or logits == torch.float64 else torch.float32


def scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] scores of the logits [T, E]; `softmax_topk` and `sparsemixer` score by the logits themselves."""
    if spec.score in ("softmax_topk", "sparsemixer"):
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
    elif spec.score == "sparsemixer":
        w = sparsemixer.weights(in_score_dtype(logits, spec), experts, spec.jitter)
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
    select = close_groups(selection(logits, spec, bias), k, spec)
    return select.sort(dim=1, descending=True, stable=True).indices[:, :k]


def selection(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> Tensor:
    """[T, E] what selects, in every group: the logits [T, E] themselves where they do, else scores plus bias [E]."""
    select = wide(logits) if selects_by_logits(spec, bias) else wide(scores(logits, spec))
    return select if bias is None else select + wide(bias)


def close_groups(select: Tensor, k: int, spec: RouterSpec) -> Tensor:
    """[T, E] the selection [T, E], and -inf in the groups that are not among the best `topk_groups`."""
    if spec.groups == 1:
        return select
    rank = group_scores(select, k, spec)
    opened = rank.sort(dim=1, descending=True, stable=True).indices[:, : spec.topk_groups]
    closed = torch.ones_like(rank, dtype=torch.bool).scatter(1, opened, False)
    return select.masked_fill(closed.repeat_interleave(select.shape[1] // spec.groups, dim=1), float("-inf"))


def group_scores(select: Tensor, k: int, spec: RouterSpec) -> Tensor:
    """[T, G] scores of the groups of a selection [T, E]."""
    tokens, experts = select.shape
    best = select.reshape(tokens, spec.groups, experts // spec.groups).sort(dim=2, descending=True).values
    rank = best[:, :, 0]
    for i in range(1, group_depth(k, experts, spec)):  # best first: the order of a sum decides its rounding
        rank = rank + best[:, :, i]
    return rank


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
def route_overlap(out: Routing, rows: Tensor) -> Tensor:
    """[T] int64: experts that the recorded row [T, K] and the own choice share; K where the row is not replayed."""
    both = (rows.long()[:, :, None] == out.native[:, None, :]).any(dim=2).sum(dim=1)
    return torch.where(out.fate == REPLAYED, both, rows.shape[1])


@torch.no_grad()
def route_counts(out: Routing, rows: Tensor) -> Tensor:
    """[8] int64 in the order of COUNTERS, for the recorded rows [T, K]."""
    fates = [(out.fate == fate).sum() for fate in range(5)]
    both = route_overlap(out, rows)
    overlap = torch.where(out.fate == REPLAYED, both, 0).sum()
    return torch.stack([*fates, (both < rows.shape[1]).sum(), overlap, out.missing.sum()])


@torch.no_grad()
def route_margin(out: Routing, logits: Tensor, rows: Tensor, spec: RouterSpec, bias: Tensor | None) -> Tensor:
    """0-d float64: how far the own choice is from the recorded one, summed over flipped rows.

    Of a row: the selection of the K-th best expert less that of the worst recorded one, from logits [T, E], rows
    [T, K] and bias [E]; in units of what selects. At least 0, since an expert of a closed group may be better than an
    open one; 0 where it is not finite. NaN is the largest, as in the choice.
    """
    k, select = rows.shape[1], selection(logits, spec, bias)
    last = close_groups(select, k, spec).gather(1, out.native[:, -1:])[:, 0]
    recorded = torch.where((out.fate == REPLAYED)[:, None], rows.long(), 0)
    worst = select.gather(1, recorded).sort(dim=1, descending=True).values[:, -1]
    margin = (last - worst).clamp(min=0)
    return torch.where((route_overlap(out, rows) < k) & margin.isfinite(), margin, 0.0).sum(dtype=torch.float64)


@torch.no_grad()
def route_load(out: Routing, num_experts: int) -> Tensor:
    """[E] int64: how many (token, slot) pairs go to each expert, those of padding rows left out."""
    ids = torch.where((out.fate == PADDED)[:, None], num_experts, out.experts).flatten()
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return load.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


@dataclass(frozen=True, slots=True)
class Permutation:
    """(token, slot) pairs in the order of their experts; pairs of one expert, and dropped ones, in their own order.

    Attributes:
        order: [T*K] int32, the pair t*K + k that stands at each place; dropped pairs stand at the end.
        place: [T, K] int32, where each pair stands: the inverse.
        offsets: [E+1] int32, the pairs of expert e stand at offsets[e]:offsets[e+1]; the last is how many have one.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor

    @property
    def token(self) -> Tensor:
        """[T*K] int32, the token whose pair stands at each place."""
        return self.order // self.place.shape[1]


def permutation(experts: Tensor, num_experts: int) -> Permutation:
    """The definition of the sort of experts [T, K]; ids outside 0..E-1 are dropped pairs."""
    ids = experts.long().flatten()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    by_expert = ids.sort(stable=True)
    order = by_expert.indices
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    offsets = torch.searchsorted(by_expert.values, torch.arange(num_experts + 1, device=order.device))
    return Permutation(order.int(), place.int().reshape(experts.shape), offsets.int())


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackIndex:
    """Where position p of a packed batch comes from: the one map that every packed array is read through.

    Attributes:
        segment: [T] int64, the sample; -1 behind the last one.
        position: [T] int64, the input token's place in its sample; goes on in a sample's padding.
        token: [T] int64, that token in the samples' concatenated tokens, its target stands at `token + 1`; -1: padding.
        row: [T] int64, its row in the samples' concatenated rows; -1 in padding and where the sample has none.
    """

    segment: Tensor
    position: Tensor
    token: Tensor
    row: Tensor


def pack_index(table: Tensor, total: int, cp_size: int, cp_rank: int) -> PackIndex:
    """The map of a rank's `total` positions T, for samples as `table` [4, S+1] int64 has them.

    Rows of the table, by sample: where it starts among this rank's positions, its first token and its first row (-1: it
    has none) among the concatenated ones, and how many positions it has on all ranks, without padding. The last column
    is what stands behind the samples: padding that starts where they end.
    """
    start, first_token, first_row, positions = table
    here = torch.arange(total, device=table.device)
    sample = torch.searchsorted(start, here, right=True) - 1
    end = torch.cat([start[1:], start.new_tensor([total])])
    inside, chunk = here - start[sample], (end - start)[sample] // 2
    # Zigzag: the first half of a rank's part is chunk cp_rank of the sample, the second the one as far from the end.
    last = (2 * cp_size - 1 - cp_rank) * chunk + inside - chunk
    position = torch.where(inside < chunk, cp_rank * chunk + inside, last)
    behind = sample == table.shape[1] - 1
    position = torch.where(behind, inside, position)
    real = position < positions[sample]
    return PackIndex(
        segment=torch.where(behind, -1, sample),
        position=position,
        token=torch.where(real, first_token[sample] + position, -1),
        row=torch.where(real & (first_row[sample] >= 0), first_row[sample] + position, -1),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """What packing writes, by position [T]: names and dtypes as in `pack.PackedBatch`; rows [L, T', K], state [T'].

    T' positions from `first` on are those that this rank routes; rows and state are empty without experts.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    positions: Tensor
    segment_ids: Tensor
    rows: Tensor
    state: Tensor


def pack(
    index: PackIndex,
    tokens: Tensor,
    loss_mask: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    experts: Tensor | None,
    provenance: Tensor | None,
    fresh: Tensor | None,
    *,
    layers: Tensor,
    routed: slice,
    num_experts: int,
    codes: int,
) -> Packed:
    """The definition of packing: every array is read through the one map.

    Args:
        index: the map [T].
        tokens: [N] int32, of all samples end to end, as are the next three.
        loss_mask: [N] bool.
        logprobs: [N] float32.
        advantages: [N] float32.
        experts: [R, L, K] uint8 or uint16, of the samples that have rows, as are the next two.
        provenance: [R] uint8.
        fresh: [R] bool, the row is of the weights whose logprob it serves; None: all are.
        layers: [L'] int64, places on the L axis to take.
        routed: the T' positions whose routes are written.
        num_experts: E, over which the experts of rows that come from nowhere are spread.
        codes: bit c is set if rows of provenance c are replayed.
    """
    real = index.token >= 0
    source, target = index.token.clamp(min=0), index.token.clamp(min=-1) + 1
    mask = real & _taken(loss_mask, target, False)
    rows, state = tokens.new_empty((0, 0, 0), dtype=torch.uint8), tokens.new_empty(0, dtype=torch.uint8)
    if experts is not None and provenance is not None:
        row, padding = index.row[routed], ~real[routed]
        ids = experts.view(torch.int16) if experts.dtype == torch.uint16 else experts  # few ops take uint16
        spread = pad_experts(len(row), experts.shape[2], num_experts, row.device).to(ids.dtype)
        rows = _taken(ids, row.clamp(min=0), 0).permute(1, 0, 2)[layers]
        rows = torch.where((row >= 0)[None, :, None], rows, spread[None]).contiguous().view(experts.dtype)
        known = (codes >> _taken(provenance, row.clamp(min=0), 0).int()) & 1 > 0
        if fresh is not None:
            known = known & _taken(fresh, row.clamp(min=0), False)
        state = torch.where(known & (row >= 0), REPLAY, FREE).masked_fill(padding, PAD).to(torch.uint8)
    return Packed(
        tokens=torch.where(real, _taken(tokens, source, 0), 0),
        targets=torch.where(real, _taken(tokens, target, 0), 0).long(),
        loss_mask=mask,
        logprobs=torch.where(mask, _taken(logprobs, target, 0.0), 0.0),
        advantages=torch.where(mask, _taken(advantages, target, 0.0), 0.0),
        positions=index.position,
        segment_ids=index.segment.int(),
        rows=rows,
        state=state,
    )


def _taken(values: Tensor, at: Tensor, nothing: float | bool) -> Tensor:
    """values [N, any] at places [T]; `nothing` if there are no values, when every place is padding's."""
    if len(values):
        return values[at]
    return values.new_full((len(at), *values.shape[1:]), nothing)


# --- sums by segment -------------------------------------------------------------------------------------------------


def segment_sum(
    values: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums [S] of `values` [T] by segment and counts [S] int64 of what was added, where `mask` [T] is set.

    Segments stand one after another, -1 (no segment) at the end. Added in order of position: no atomics on floats, so
    the result repeats on any device.
    """
    known = (segment_ids >= 0) & (segment_ids < num_segments)
    counted = known if mask is None else mask & known
    ids = torch.where(known, segment_ids, num_segments).long()
    lengths = torch.zeros(num_segments + 1, dtype=torch.int64, device=values.device)
    counts = lengths.index_add(0, ids, counted.long())[:num_segments]
    if values.numel() == 0:
        return wide(values).new_zeros(num_segments), counts
    lengths = lengths.index_add(0, ids, torch.ones_like(ids))
    clean = torch.where(counted, wide(values), 0.0)
    return torch.segment_reduce(clean, "sum", lengths=lengths, unsafe=True, initial=0)[:num_segments], counts


def segment_spread(grad: Tensor, segment_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[T] the number of `grad` [S] that belongs to each position's segment; 0 where there is none or no mask is set."""
    if not grad.numel():
        return grad.new_zeros(segment_ids.shape)
    known = (segment_ids >= 0) & (segment_ids < len(grad))
    taken = known if mask is None else mask & known
    return torch.where(taken, grad[torch.where(known, segment_ids, 0).long()], 0.0)


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


def logprob_stats(z: Tensor, targets: Tensor) -> Tensor:
    """What a part of the vocabulary says of its tokens, from their scaled logits z [C, V]; any number of parts add up.

    Args:
        z: [C, V] float32 or float64.
        targets: [C] int64, each within [0, V), or negative where it is in another part.

    Returns:
        [C, 4] of that dtype: the largest z, sum exp(z - largest), sum (z - largest) exp(z - largest), z of the target.
        Of a part without probability -inf, 0, 0; of a target elsewhere -inf.
    """
    top = z.amax(dim=1) if z.shape[1] else z.new_full((len(z),), float("-inf"))
    away = z - torch.where(top == float("-inf"), 0.0, top)[:, None]
    e = away.exp()
    moment = torch.where(e == 0, 0.0, e * away).sum(dim=1)  # not 0 * -inf
    chosen = torch.full_like(top, float("-inf"))
    if z.shape[1]:
        chosen = torch.where(targets < 0, chosen, z.gather(1, targets.clamp(min=0)[:, None])[:, 0])
    return torch.stack((top, e.sum(dim=1), moment, chosen), dim=1)


def logprob_fold(parts: Tensor) -> Tensor:
    """`logprob_stats` [C, 4] of a vocabulary from those of its parts [P, C, 4], added up in their order."""
    top, total, moment, chosen = parts[0].unbind(dim=1)
    for part in parts[1:]:
        other = part.unbind(dim=1)
        both = torch.maximum(top, other[0])
        shift = torch.where(both == float("-inf"), 0.0, both)
        mine, theirs = (torch.where(x == float("-inf"), 0.0, x - shift) for x in (top, other[0]))
        moment = (moment + mine * total) * mine.exp() + (other[2] + theirs * other[1]) * theirs.exp()
        total = total * mine.exp() + other[1] * theirs.exp()
        top, chosen = both, torch.maximum(chosen, other[3])
    return torch.stack((top, total, moment, chosen), dim=1)


def logprob_score(stats: Tensor, state: Tensor) -> Tensor:
    """Logprob, entropy, largest scaled logit and log sum exp(z - largest), [C, 4], from `logprob_stats` [C, 4].

    The two last are kept apart: their sum would round the log of the partition sum to an ulp of the largest logit. The
    entropy is a sum of two numbers that are not negative, so nothing cancels.

    Args:
        stats: [C, 4] of the whole vocabulary.
        state: [C] uint8: 0 ignored, whose score is 0; 1 to be scored; 2 wrong, whose score is NaN.
    """
    top, total, moment, chosen = stats.unbind(dim=1)
    logsum = total.log()
    score = torch.stack(((chosen - top) - logsum, logsum - moment / total, top, logsum), dim=1)
    return torch.where(state[:, None] == 0, 0.0, torch.where(state[:, None] == 1, score, float("nan")))


def logprob_slope(
    z: Tensor, targets: Tensor, state: Tensor, score: Tensor, dlogprob: Tensor, dentropy: Tensor | None
) -> Tensor:
    """Gradient [C, V] of scaled logits z [C, V]; exactly 0 for ignored tokens, NaN for wrong ones.

    With p = softmax(z), y the target, H the entropy:

        d logprob / dz = onehot(y) - p        d H / dz = -p (log p + H)

    Args:
        z: [C, V] float32 or float64, of all the vocabulary or a part of it.
        targets: [C] int64, negative where the target is in another part.
        state: [C] uint8, as in `logprob_score`.
        score: [C, 4], of the whole vocabulary.
        dlogprob: [C].
        dentropy: [C], or None for 0.
    """
    _, entropy, top, logsum = (column[:, None] for column in score.unbind(dim=1))
    logp = (z - top) - logsum
    p = logp.exp()
    weight = dlogprob[:, None].to(z.dtype)
    if dentropy is not None:
        weight = weight + dentropy[:, None].to(z.dtype) * (logp + entropy)
    slope = torch.where(p == 0, 0.0, -p * weight)
    if z.shape[1]:
        slope.scatter_add_(
            1, targets.clamp(min=0)[:, None], torch.where(targets < 0, 0.0, dlogprob.to(z.dtype))[:, None]
        )
    slope = torch.where(state[:, None] == 1, slope, float("nan"))
    return torch.where(state[:, None] == 0, 0.0, slope)
