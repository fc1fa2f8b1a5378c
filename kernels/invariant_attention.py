"""Attention whose rows depend on their own sequence alone, bit for bit: packed, padded or over a cache.

A query meets the keys that it sees in tiles that are laid out from the first of them on: the start of its sequence.
Every product is one of a batched matmul of constant shape, and a query's tiles are added in their order. So where a
sequence lies in the batch, what lies beside it and how many of its queries run at once change nothing.

Legend: B batch rows, T queries of one, S keys of one, H query heads, G key heads, D head size, E head size of values;
N queries that see a key, M blocks of R queries, P pairs of a block and a tile of C keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import check, tiles
from pacenote.kernels.reference import wide

QUERIES, KEYS = 16, 32
"""Queries of a block (R) and keys of a tile (C)."""
ITEMS = 64
"""Matmuls of a call."""


def invariant_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(query key^T scale) value over the keys that each query sees; differentiable.

    Args:
        query: [B, H, T, D] floating; sums are in float32, or float64 for float64.
        key: [B, G, S, D], G a divisor of H: query heads h * H / G and following share key head h.
        value: [B, G, S, E].
        visible: [B, 1, T, S] bool. The keys that a query sees lie side by side; one that sees none gives 0.
        scale: of the products.

    Returns:
        [B, T, H, E] in the dtype of `query`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a mask with holes in what a query sees.
    """
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    check.tensor(query, "query", (batch, heads, length, dim), check.FLOATS, query.device)
    check.tensor(key, "key", (batch, groups, keys, dim), (query.dtype,), query.device)
    check.tensor(value, "value", (batch, groups, keys, None), (query.dtype,), query.device)
    check.tensor(visible, "visible", (batch, 1, length, keys), (torch.bool,), query.device)
    if heads % groups:
        raise ValueError(f"expected query heads that are a multiple of the {groups} key heads, got {heads}")
    out: Tensor = _attention(query, key, value, visible, scale)
    return out


def _op(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"pacenote::{name}", mutates_args=(), schema=schema)


@_op("invariant_attention", "(Tensor query, Tensor key, Tensor value, Tensor visible, float scale) -> Tensor")
def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One op, so that an audit of a forward pass sees attention as one."""
    batch, heads, length, _ = query.shape
    plan = _Plan.of(visible[:, 0])
    q, k, v = (wide(x).transpose(1, 2) for x in (query, key, value))  # [B, T or S, heads, size]
    share = heads // k.shape[2]
    blocks = q.new_zeros(plan.blocks, QUERIES, heads, q.shape[3])
    blocks[plan.block, plan.row] = q[plan.batch, plan.query]
    ones = v.new_ones(*v.shape[:3], 1)  # a last value of 1 makes the sum of the weights an output like the others
    k, v = plan.tiles(k), plan.tiles(torch.cat([v, ones], dim=3)).masked_fill(~plan.filled[:, None, :, None], 0.0)
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scores = _matmuls(blocks.transpose(1, 2)[plan.pair_block], k.transpose(2, 3)) * scale
    scores = scores.masked_fill(~plan.open[:, None], float("-inf"))
    top = plan.over_tiles(scores.amax(3), torch.maximum, float("-inf"))
    weights = tiles.by_elements(torch.exp, scores - top[plan.pair_block][..., None])
    sums = plan.over_tiles(_matmuls(weights, v), torch.add, 0.0)  # [M, H, R, E + 1]
    result = (sums[..., :-1] / sums[..., -1:]).transpose(1, 2)
    out = q.new_zeros(batch, length, heads, v.shape[3] - 1)
    out[plan.batch, plan.query] = result[plan.block, plan.row]
    return out.to(query.dtype)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which queries make a block, and which tiles of keys a block meets.

    Attributes:
        batch, query, block, row: [N] places of the queries in the batch, and in the blocks.
        blocks: M.
        pair_block, pair_tile: [P] block, and number of the tile in its sequence; blocks in order, then tiles.
        pair_batch, pair_keys: [P], [P, C] places of the tiles' keys in the batch, within it.
        open: [P, R, C] bool, where a query sees a key.
        filled: [P, C] bool, keys that a query of the block sees; the others are somebody else's, and may be NaN.
    """

    batch: Tensor
    query: Tensor
    block: Tensor
    row: Tensor
    blocks: int
    pair_block: Tensor
    pair_tile: Tensor
    pair_batch: Tensor
    pair_keys: Tensor
    open: Tensor
    filled: Tensor

    @classmethod
    def of(cls, visible: Tensor) -> _Plan:
        """From [B, T, S] bool.

        Raises:
            ValueError: what a query sees has holes.
        """
        device, keys = visible.device, visible.shape[2]
        count = visible.sum(2)
        start = visible.to(torch.uint8).argmax(2)
        last = keys - 1 - visible.flip(2).to(torch.uint8).argmax(2)
        batch, query = count.nonzero(as_tuple=True)
        start, place = start[batch, query], count[batch, query] - 1
        if not bool((last[batch, query] - start + 1 == count[batch, query]).all()):
            raise ValueError(
                "expected a mask by which a query sees keys side by side, got one with holes: its order of sums is not "
                "defined here"
            )
        sequence = batch * keys + start
        twin = _rank(sequence * keys + place)  # padding sees what the last token sees: each needs a row of its own
        depth, twins = keys // QUERIES + 1, int(twin.max()) + 1 if len(twin) else 1
        names, block = torch.unique((sequence * depth + place // QUERIES) * twins + twin, return_inverse=True)
        number, sequence = names // twins % depth, names // (twins * depth)
        tiles_of = (number * QUERIES + QUERIES - 1) // KEYS + 1
        pair_block = torch.repeat_interleave(torch.arange(len(names), device=device), tiles_of)
        pair_tile = torch.arange(len(pair_block), device=device) - (tiles_of.cumsum(0) - tiles_of)[pair_block]
        sequence = sequence[pair_block]
        within = pair_tile[:, None] * KEYS + torch.arange(KEYS, device=device)
        places = number[pair_block, None] * QUERIES + torch.arange(QUERIES, device=device)
        furthest = torch.zeros_like(names).scatter_reduce(0, block, place, "amax")[pair_block]
        return cls(
            batch=batch,
            query=query,
            block=block,
            row=place % QUERIES,
            blocks=len(names),
            pair_block=pair_block,
            pair_tile=pair_tile,
            pair_batch=sequence // keys,
            pair_keys=(sequence[:, None] % keys + within).clamp(max=keys - 1),
            open=within[:, None, :] <= places[:, :, None],
            filled=within <= furthest[:, None],
        )

    def tiles(self, x: Tensor) -> Tensor:
        """[P, G, C, size] tiles of x [B, S, G, size]."""
        return x[self.pair_batch[:, None], self.pair_keys].transpose(1, 2)

    def over_tiles(self, x: Tensor, merge: Callable[[Tensor, Tensor], Tensor], nothing: float) -> Tensor:
        """[M, ...]: x [P, ...] merged over the tiles of each block, one after another."""
        out = x.new_full((self.blocks, *x.shape[1:]), nothing)
        for tile in range(int(self.pair_tile.max()) + 1 if len(self.pair_tile) else 0):
            pairs = (self.pair_tile == tile).nonzero()[:, 0]
            at = self.pair_block[pairs]
            out[at] = merge(out[at], x[pairs])
        return out


def _rank(names: Tensor) -> Tensor:
    """For each of names [N] how many equal ones stand before it."""
    order = names.argsort(stable=True)
    ordered = names[order]
    place = torch.arange(len(names), device=names.device)
    first = torch.ones_like(names, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    rank = torch.empty_like(names)
    rank[order] = place - torch.where(first, place, 0).cummax(0).values
    return rank


def _matmuls(a: Tensor, b: Tensor) -> Tensor:
    """a [P, H, R, X] times b [P, H, X, Y], in calls of a constant number of matmuls."""
    lead = a.shape[:2]
    a, b = (tiles.pad_rows(x.flatten(0, 1), ITEMS) for x in (a, b))
    parts = [torch.bmm(a[start : start + ITEMS], b[start : start + ITEMS]) for start in range(0, len(a), ITEMS)]
    out = torch.cat(parts) if parts else torch.bmm(a, b)
    return out[: lead.numel()].reshape(*lead, *out.shape[1:])


@_attention.register_fake  # type: ignore[untyped-decorator]
def _(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value by the usual formula, with whole matrices [T, S]."""
    query, key, value, visible = ctx.saved_tensors
    share = query.shape[1] // key.shape[1]
    q, g = wide(query), wide(grad).transpose(1, 2)
    k, v = (wide(x).repeat_interleave(share, dim=1) for x in (key, value))
    scores = (q @ k.transpose(2, 3) * ctx.scale).masked_fill(~visible, float("-inf"))
    weights = torch.where(visible, scores.softmax(3), 0.0)  # a query that sees nothing has no weights, not NaN
    slope = g @ v.transpose(2, 3)
    slope = weights * (slope - (slope * weights).sum(3, keepdim=True)) * ctx.scale
    parts = slope @ k, slope.transpose(2, 3) @ q, weights.transpose(2, 3) @ g
    shared = (x.reshape(len(x), -1, share, *x.shape[2:]).sum(2) for x in parts[1:])
    return *(x.to(query.dtype) for x in (parts[0], *shared)), None, None


_attention.register_autograd(_differentiate, setup_context=_setup)
