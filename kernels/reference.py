"""Every op in plain torch: the definition, the CPU path, and in float64 the oracle that kernels are tested against.

Legend: T tokens, E experts, K top-k, V vocabulary, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec

REPLAYED, FREED, DUPLICATE, OUT_OF_RANGE, PADDED = range(5)
"""What became of a row: replayed, routed freely (as asked or missing), refused for a reason, or padding."""


@dataclass(frozen=True, slots=True)
class Routing:
    """weights [T, K], experts [T, K] int64, fate [T] uint8 (REPLAYED..PADDED), native [T, K] int64: the own top-k."""

    weights: Tensor
    experts: Tensor
    fate: Tensor
    native: Tensor


def wide(x: Tensor) -> Tensor:
    """float64 stays, everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


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
    own = native_topk(logits, rows.shape[1], spec, bias)
    fate = row_fate(rows, logits.shape[1], state)
    spread = pad_experts(*rows.shape, logits.shape[1], logits.device)
    experts = torch.where((fate == REPLAYED)[:, None], rows.long(), own)
    experts = torch.where((fate == PADDED)[:, None], spread, experts)
    weights = torch.where((fate == PADDED)[:, None], 0.0, chosen_weights(logits, experts, spec))
    return Routing(weights.to(weight_dtype(logits.dtype, spec)), experts, fate, own)


def weight_dtype(logits: torch.dtype, spec: RouterSpec) -> torch.dtype:
    """dtype of the weights for logits of a dtype; float64 logits keep float64, for oracles and gradient checks."""
    return logits if spec.weight_dtype == "logits" or logits == torch.float64 else torch.float32


def scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] scores that experts are selected by, before the bias."""
    x = wide(logits)
    if spec.score == "softmax":
        return x.softmax(dim=1)
    return x.sigmoid() if spec.score == "sigmoid" else x


def chosen_weights(logits: Tensor, experts: Tensor, spec: RouterSpec) -> Tensor:
    """[T, K] weights of `experts` [T, K], from the logits, before padding and the cast."""
    if spec.score == "softmax_topk":
        x = logits if spec.score_dtype == "logits" else wide(logits)
        w = x.gather(1, experts).softmax(dim=1)
    else:
        w = scores(logits, spec).gather(1, experts)
        if spec.score_dtype == "logits":
            w = w.to(logits.dtype)
    if spec.renormalize:
        w = w / (w.sum(dim=1, keepdim=True) + spec.eps)
    return w * spec.scale


@torch.no_grad()
def native_topk(logits: Tensor, k: int, spec: RouterSpec, bias: Tensor | None) -> Tensor:
    """[T, K] int64: the router's own choice, best first; ties go to the lowest index."""
    select = scores(logits, spec)
    if bias is not None:
        select = select + wide(bias)
    if spec.groups > 1:
        tokens, experts = select.shape
        grouped = select.view(tokens, spec.groups, experts // spec.groups)
        best = {"max": 1, "top2": 2, "topk_share": max(1, k // spec.topk_groups)}[spec.group_score]
        rank = grouped.topk(min(best, grouped.shape[2]), dim=2).values.sum(dim=2)
        opened = rank.sort(dim=1, descending=True, stable=True).indices[:, : spec.topk_groups]
        closed = torch.ones_like(rank, dtype=torch.bool).scatter(1, opened, False)
        select = grouped.masked_fill(closed[:, :, None], float("-inf")).view(tokens, experts)
    return select.sort(dim=1, descending=True, stable=True).indices[:, :k]


@torch.no_grad()
def row_fate(rows: Tensor, num_experts: int, state: Tensor | None) -> Tensor:
    """[T] uint8: what becomes of each row [T, K]. A negative id means that the row is missing."""
    ids = rows.long()
    ordered = ids.sort(dim=1).values
    fate = torch.full((len(ids),), REPLAYED, dtype=torch.uint8, device=ids.device)
    fate[(ordered[:, 1:] == ordered[:, :-1]).any(dim=1)] = DUPLICATE
    fate[(ids >= num_experts).any(dim=1)] = OUT_OF_RANGE
    fate[(ids < 0).any(dim=1)] = FREED
    if state is not None:
        fate[state == FREE] = FREED
        fate[state == PAD] = PADDED
        assert REPLAY == 1
    return fate


def pad_experts(tokens: int, k: int, num_experts: int, device: torch.device) -> Tensor:
    """[T, K] int64: K distinct experts a row, spread evenly over the expert range from row to row."""
    start = torch.arange(tokens, device=device)[:, None] * k
    return (start + torch.arange(k, device=device)) % num_experts


class IndexMap(NamedTuple):
    """Where each of T packed positions comes from: source [T] int64 index into the joined samples (-1 for padding),
    position [T] int64 within its sample, segment [T] int32 its sample (-1 for padding)."""

    source: Tensor
    position: Tensor
    segment: Tensor


def index_map(sizes: Tensor, padding: int) -> IndexMap:
    """The map of samples of `sizes` [S] positions, one after the other, with `padding` positions behind them."""
    total = int(sizes.sum())
    starts = sizes.cumsum(0) - sizes
    segment = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    position = torch.arange(total) - starts[segment]
    tail = torch.full((padding,), -1, dtype=torch.int64)
    return IndexMap(
        torch.cat([torch.arange(total), tail]),
        torch.cat([position, torch.arange(padding)]),
        torch.cat([segment, tail]).to(torch.int32),
    )


def place(values: Tensor, index: IndexMap, padding: Tensor | float = 0) -> Tensor:
    """Values [T', ...] of the joined samples at the T positions of the map; `padding` where there is no source."""
    if not len(values):
        return torch.zeros((len(index.source), *values.shape[1:]), dtype=values.dtype, device=values.device) + padding
    taken = values[index.source.clamp(min=0)]
    hole = (index.source < 0).view(-1, *([1] * (taken.ndim - 1)))
    filler = padding if isinstance(padding, Tensor) else torch.tensor(padding, dtype=taken.dtype, device=taken.device)
    return torch.where(hole, filler.to(taken.dtype), taken)


def segment_sums(values: Tensor, segment: Tensor, mask: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Sums [S] of values [T] over each sample's masked positions, and their counts [S]; NaN outside the mask is ignored."""
    where = mask & (segment >= 0)
    index = segment.clamp(min=0).long()
    clean = torch.where(where, values, torch.zeros_like(values))
    sums = torch.zeros(samples, dtype=values.dtype, device=values.device).index_add(0, index, clean)
    counts = torch.zeros(samples, dtype=values.dtype, device=values.device).index_add(0, index, where.to(values.dtype))
    return sums, counts


def logprob_from_logits(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, vocab_bound: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logprob [T] and entropy [T] of softmax(logits [T, V] / temperature), over the first `vocab_bound` entries."""
    x = wide(logits)[:, :vocab_bound]
    x = x / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = x.log_softmax(dim=1)
    # 0 * -inf is 0 in an entropy: an entry of no probability carries no surprise.
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=1)
    return logp.gather(1, targets.long()[:, None])[:, 0], entropy
