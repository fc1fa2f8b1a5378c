# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels behind `permutation`. `reference.permutation` is the definition.

A counting sort. Pairs are cut into chunks; one kernel counts the pairs of each (expert, chunk), experts first; the
running sum of these counts is where each such run of pairs starts; another kernel adds a pair's rank among the equal
pairs before it in its chunk. No atomics on memory, no sorting network: a place is a sum of counts, and results repeat.

Legend: T tokens, E experts, K top-k, P = T K pairs; C pairs of a chunk, S of a part of it; BE the power of two that
holds E + 2 bins: the experts, dropped pairs, and what is beyond the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch

_CHUNK, _PART = (512, 256) if launch.INTERPRETED else (128, 32)
"""A pair costs C comparisons for its rank and some E / C counts in memory: 128 is near the least of the sum for E from
64 to 1024. A part is what a program compares at a time: 32 numbers a thread in registers."""


@triton.jit
def _bins(experts, chunk, lane, pairs, token_stride, slot_stride, E: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Pair number int64 [any] and bin int32 [any] of the lanes of a chunk: the expert, E if dropped, E + 1 if none."""
    pair = chunk.to(tl.int64) * C + lane
    here = pair < pairs
    place = pair // K * token_stride + pair % K * slot_stride
    ids = tl.load(experts + place, mask=here, other=0).to(tl.int64)
    ids = tl.where((ids < 0) | (ids >= E), E, ids).to(tl.int32)
    return pair, tl.where(here, ids, E + 1)


@triton.jit
def _count_kernel(
    experts,  # [T, K]
    counts,  # [(E + 1) chunks] int32
    pairs,
    token_stride,
    slot_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BE: tl.constexpr,
):
    chunk, chunks = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    _, bins = _bins(experts, chunk, tl.arange(0, C), pairs, token_stride, slot_stride, E, K, C)
    count = tl.histogram(bins, BE)
    # Behind a zero, one further: the running sum is then where a run starts, and what the last run holds is not needed.
    into = tl.arange(0, BE).to(tl.int64) * chunks + chunk + 1
    tl.store(counts + into, count, mask=into < (E + 1) * chunks)
    tl.store(counts, 0, mask=chunk == 0)


@triton.jit
def _place_kernel(
    experts,  # [T, K]
    starts,  # [(E + 1) chunks] int32, where the run of a bin in a chunk starts
    order,  # [P] int32
    place,  # [P] int32
    offsets,  # [E + 1] int32
    pairs,
    token_stride,
    slot_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BE: tl.constexpr,
):
    chunk, chunks = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, C)
    pair, bins = _bins(experts, chunk, lane, pairs, token_stride, slot_stride, E, K, C)
    rank = tl.zeros([C], tl.int32)
    for first in range(0, C, S):
        other = first + tl.arange(0, S)
        _, others = _bins(experts, chunk, other, pairs, token_stride, slot_stride, E, K, C)
        before = (bins[:, None] == others[None, :]) & (other[None, :] < lane[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
    here = pair < pairs
    to = tl.load(starts + bins.to(tl.int64) * chunks + chunk, mask=here, other=0) + rank
    tl.store(place + pair, to, mask=here)
    tl.store(order + to, pair.to(tl.int32), mask=here)
    if chunk == 0:
        e = tl.arange(0, BE)
        start = tl.load(starts + e.to(tl.int64) * chunks, mask=e <= E, other=0)
        tl.store(offsets + e, start, mask=e <= E)


def permutation(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches and the running sum between them.

    Floor, with b bytes an id: T K (b + 8) + 4 (E + 1) bytes: ids read, order, place and offsets written. Counts add
    some 12 (E + 1) T K / C bytes, ids are read twice, from the cache where they fit.

    Args:
        experts: [T, K] uint8, uint16, int32 or int64, at any strides.
        num_experts: E.

    Returns:
        order [T*K], place [T, K] and offsets [E+1], int32.
    """
    tokens, k = experts.shape
    order = experts.new_empty(tokens * k, dtype=torch.int32)
    place = experts.new_empty((tokens, k), dtype=torch.int32)
    if not tokens:
        return order, place, experts.new_zeros(num_experts + 1, dtype=torch.int32)
    offsets = experts.new_empty(num_experts + 1, dtype=torch.int32)
    chunks = -(-tokens * k // _CHUNK)
    counts = experts.new_empty((num_experts + 1) * chunks, dtype=torch.int32)
    where = tokens * k, experts.stride(0), experts.stride(1)
    blocks = {"E": num_experts, "K": k, "C": _CHUNK, "BE": launch.next_power_of_2(num_experts + 2)}
    with launch.on_device_of(experts):
        # One warp: every thread has pairs of its own to count.
        _count_kernel[(chunks,)](experts, counts, *where, **blocks, num_warps=1)
        starts = counts.cumsum(0, dtype=torch.int32)
        _place_kernel[(chunks,)](experts, starts, order, place, offsets, *where, **blocks, S=_PART, num_warps=4)
    return order, place, offsets
