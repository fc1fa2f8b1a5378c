# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels behind `segment_sum`: sums of segments, and the spread that is their gradient.

SPLITS programs share a segment. Which of them adds which position, and in what order, depends on the place in its
segment alone: a segment's sum is the same bits in any batch. No float is added atomically.

Legend: T positions, S segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch

SPLITS, BLOCK = (2, 4096) if launch.INTERPRETED else (16, 512)
"""Programs a segment, and positions that one adds at a time: up to 8192 positions take one step each."""


@triton.jit
def edges(segment_ids, edge, T, samples, steps):
    """The first position of a segment `edge` [any] or a later one, by bisection; -1 counts as the last segment."""
    low = tl.zeros_like(edge)
    high = low + T
    for _ in range(steps):
        middle = low + (high - low) // 2
        more = low < high
        found = tl.load(segment_ids + middle, mask=more, other=0)
        below = tl.where(found < 0, samples, found) < edge
        low = tl.where(more & below, middle + 1, low)
        high = tl.where(more & (below == 0), middle, high)
    return low


# Numbers that change from batch to batch do not make another kernel by being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T", "samples", "steps"])
def _sum_kernel(
    values,  # [T]
    segment_ids,  # [T]
    mask,  # [T] uint8 or None
    partial,  # [S, SPLITS] float32
    counts,  # [S, SPLITS] int32
    T,
    samples,
    steps,  # of bisection
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    both = edges(segment_ids, segment + tl.arange(0, 2), T, samples, steps)
    start, end = tl.min(both, axis=0), tl.max(both, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(start + split * BLOCK, end, SPLITS * BLOCK):
        t = first + tl.arange(0, BLOCK)
        here = t < end
        if mask is not None:
            here &= tl.load(mask + t, mask=here, other=0) != 0
        total += tl.load(values + t, mask=here, other=0.0).to(tl.float32)
        count += here.to(tl.int32)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(counts + tl.program_id(0), tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["T", "samples"])
def _spread_kernel(
    grad,  # [S]
    segment_ids,  # [T]
    mask,  # [T] uint8 or None
    out,  # [T]
    T,
    samples,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(segment_ids + t, mask=t < T, other=-1)
    taken = (segment >= 0) & (segment < samples)
    if mask is not None:
        taken &= tl.load(mask + t, mask=t < T, other=0) != 0
    slope = tl.load(grad + segment, mask=taken, other=0.0)
    tl.store(out + t, slope.to(out.dtype.element_ty), mask=t < T)


def sums(values: Tensor, segment_ids: Tensor, mask: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor]:
    """One launch, and two more that add up a segment's splits.

    Args:
        values: [T] bfloat16, float16 or float32.
        segment_ids: [T] int32 or int64, never falling, -1 at the end.
        mask: [T] bool or None.
        num_segments: S.

    Returns:
        Sums [S] float32 and counts [S] int64.
    """
    tokens = len(values)
    partial = values.new_empty((num_segments, SPLITS), dtype=torch.float32)
    counts = values.new_empty((num_segments, SPLITS), dtype=torch.int32)
    if not (tokens and num_segments):
        return partial.zero_().sum(dim=1), counts.zero_().sum(dim=1)
    with launch.on_device_of(values):
        _sum_kernel[(num_segments * SPLITS,)](
            values.contiguous(),
            segment_ids.contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            partial,
            counts,
            tokens,
            num_segments,
            tokens.bit_length(),
            SPLITS=SPLITS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return partial.sum(dim=1), counts.sum(dim=1)


def spread(grad: Tensor, segment_ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One launch; every position is written once.

    Args:
        grad: [S] float32.
        segment_ids: [T] int32 or int64; -1: no segment.
        mask: [T] bool or None.
        dtype: of the result.

    Returns:
        [T], each position's segment's gradient, 0 where the mask is not set.
    """
    tokens = len(segment_ids)
    out = grad.new_empty(tokens, dtype=dtype)
    if not tokens:
        return out
    block = 16384 if launch.INTERPRETED else 1024
    with launch.on_device_of(grad):
        _spread_kernel[(-(-tokens // block),)](
            grad.contiguous(),
            segment_ids.contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            out,
            tokens,
            len(grad),
            BLOCK=block,
            num_warps=4,
        )
    return out
