# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernel of `invariant` logprobs: the tiles of `invariant_triton` and the statistics of their rows in one.

Logits stay in registers. The vocabulary is split at fixed places, whatever the number of rows; a program goes through
the tiles of one split in order, and the splits are added up in order afterwards: a row's bits are its own.

Legend: C rows, D model, V vocabulary or this rank's part of it, P splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels.invariant_triton import Tiles, add_tile
from pacenote.kernels.logprob_triton import base, scale, step

SPLIT = 128 if launch.INTERPRETED else 2048
"""Columns of a split, a multiple of every tile: enough programs for one token, few numbers for many."""


def tiles(dtype: torch.dtype) -> Tiles:
    """Tiles for inputs of a dtype; narrower than those of a product, which keep no statistics beside them."""
    if launch.INTERPRETED:
        return Tiles(m=32, n=64, k=32, warps=4, stages=1)
    return Tiles(m=64, n=32, k=16, warps=4, stages=2) if dtype == torch.float32 else Tiles(128, 64, 32, 8, 3)


@triton.jit(do_not_specialize=["C"])
def _split_kernel(
    hidden,  # [C, D]
    weight,  # [V, D]
    bias,  # [V] or None
    heat,  # [C], 0-d or None
    targets,  # [C] int64
    out,  # [P, C, 4]
    C,
    V,
    D,
    hidden_c,
    hidden_d,
    weight_v,
    weight_d,
    TOKEN_HEAT: tl.constexpr,  # heat is [C]
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    rows = tl.cdiv(C, BLOCK_M)
    m = tl.program_id(0) % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // rows
    inside = m < C
    degrees = tl.full([BLOCK_M], 1.0, tl.float32)
    if heat is not None:
        degrees = tl.load(heat + m * TOKEN_HEAT, mask=inside, other=1.0)
    target = tl.load(targets + m, mask=inside, other=-1)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    chosen = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    for first in range(split * SPLIT, tl.minimum(V, (split + 1) * SPLIT), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = add_tile(acc, hidden, weight, m, n, C, V, D, hidden_c, hidden_d, weight_v, weight_d, BLOCK_K, EVEN, WIDEN)
        there = n[None, :] < V
        z = scale(acc, bias, degrees[:, None], n[None, :], there, bias is not None, heat is not None)
        z = tl.where(there, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, axis=1))
        shift = base(new)
        old, away = step(top, shift), z - shift[:, None]
        e, kept = tl.exp(away), tl.exp(old)
        moment = (moment + old * total) * kept + tl.sum(tl.where(e == 0, 0.0, e * away), axis=1)
        total = total * kept + tl.sum(e, axis=1)
        hit = n[None, :] == target[:, None]
        chosen = tl.maximum(chosen, tl.max(tl.where(hit, z, -float("inf")), axis=1))
        top = new
    at = out + (split.to(tl.int64) * C + m) * 4
    tl.store(at, top, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at + 2, moment, mask=inside)
    tl.store(at + 3, chosen, mask=inside)


def stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    """One launch.

    Args:
        hidden: [C, D] bfloat16, float16 or float32.
        weight: [V, D] of the same dtype.
        bias: [V] floating, or None.
        heat: [C] or 0-d float32, or None for 1.
        targets: [C] int64; one outside [0, V) is in another part.

    Returns:
        `reference.logprob_stats` of each split, [P, C, 4] float32.
    """
    tile, (count, dim), vocab = tiles(hidden.dtype), hidden.shape, len(weight)
    splits = max(1, triton.cdiv(vocab, SPLIT))
    out = hidden.new_empty((splits, count, 4), dtype=torch.float32)
    if not count:
        return out
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    with launch.on_device_of(hidden):
        _split_kernel[(triton.cdiv(count, tile.m) * splits,)](
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            heat,
            targets.contiguous(),
            out,
            count,
            vocab,
            dim,
            *hidden.stride(),
            *weight.stride(),
            TOKEN_HEAT=int(heat is not None and heat.ndim > 0),
            SPLIT=SPLIT,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            EVEN=dim % tile.k == 0,
            WIDEN=launch.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
