"""Ragged reductions: masked sums and means of each sample of a packed batch.

`reference.segment_sum` is the definition. CPU tensors take it; CUDA and ROCm take the kernels of `segment_triton`, and
so does the CPU in Triton's interpreter.

Legend: T positions of a batch, S samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import check, launch, reference

__all__ = ["segment_mean", "segment_sum"]


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int, *, mask: Tensor | None = None) -> Tensor:
    """[S] sums of each segment's values, in an order that repeats and does not depend on the other segments.

    What stands where the mask is not set reaches neither sum nor gradient, not even NaN. A segment without positions
    has sum 0. Floor: T (d + b + 1) bytes read, for values of d and ids of b bytes, with a mask.

    Args:
        values: [T] floating.
        segment_ids: [T] int32 or int64, never falling; -1 belongs to no segment, and stands at the end.
        num_segments: S; an id that is not below it belongs to no segment either.
        mask: [T] bool; None: every position counts.

    Returns:
        [S] float32, or float64 of such values. Gradients flow to the values.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    return _sums(values, segment_ids, num_segments, mask)[0]


def segment_mean(values: Tensor, segment_ids: Tensor, num_segments: int, *, mask: Tensor | None = None) -> Tensor:
    """[S] means of each segment's values where the mask is set, 0 where it never is; otherwise as `segment_sum`."""
    sums, counts = _sums(values, segment_ids, num_segments, mask)
    return sums / counts.clamp(min=1)


def _sums(values: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums [S] and counts [S] int64."""
    check.tensor(values, "values", (None,), check.FLOATS, values.device)
    check.tensor(segment_ids, "segment_ids", tuple(values.shape), (torch.int32, torch.int64), values.device)
    if mask is not None:
        check.tensor(mask, "mask", tuple(values.shape), (torch.bool,), values.device)
    if len(values) >= 2**30:
        raise ValueError(f"expected fewer than 2^30 positions, got {len(values)}: sum a part at a time")
    if num_segments < 0:
        raise ValueError(f"expected num_segments >= 0, got {num_segments}")
    sums, counts = _forward(values, segment_ids, mask, num_segments)
    return sums, counts


@torch.library.custom_op(
    "pacenote::segment_sum",
    mutates_args=(),
    schema="(Tensor values, Tensor segment_ids, Tensor? mask, SymInt num_segments) -> (Tensor, Tensor)",
)
def _forward(values: Tensor, segment_ids: Tensor, mask: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor]:
    """Sums [S] and counts [S] int64."""
    if launch.takes_triton(values):
        from pacenote.kernels import segment_triton

        return segment_triton.sums(values, segment_ids, mask, num_segments)
    return reference.segment_sum(values, segment_ids, num_segments, mask)


@_forward.register_fake
def _(values: Tensor, segment_ids: Tensor, mask: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty(num_segments, dtype=kind), values.new_empty(num_segments, dtype=torch.int64)


@torch.library.custom_op(
    "pacenote::segment_spread",
    mutates_args=(),
    schema="(Tensor grad, Tensor segment_ids, Tensor? mask, ScalarType dtype) -> Tensor",
)
def _backward(grad: Tensor, segment_ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Gradient [T] of the values from that [S] of the sums."""
    if launch.takes_triton(grad):
        from pacenote.kernels import segment_triton

        return segment_triton.spread(grad, segment_ids, mask, dtype)
    return reference.segment_spread(grad, segment_ids, mask).to(dtype)


@_backward.register_fake
def _(grad: Tensor, segment_ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(segment_ids.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, segment_ids, mask, _ = inputs
    ctx.save_for_backward(segment_ids, mask)
    ctx.dtype = values.dtype


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    segment_ids, mask = ctx.saved_tensors
    return _backward(grad, segment_ids, mask, ctx.dtype), None, None, None


def _differentiate_again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    segment_ids, mask = ctx.saved_tensors
    return _forward(grad, segment_ids, mask, ctx.segments)[0].to(ctx.dtype), None, None, None


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, segment_ids, mask, _ = inputs
    ctx.save_for_backward(segment_ids, mask)
    ctx.dtype, ctx.segments = grad.dtype, grad.shape[0]


_forward.register_autograd(_differentiate, setup_context=_setup)
# A sum's gradient is a spread and a spread's a sum, so gradients of any order are exact.
_backward.register_autograd(_differentiate_again, setup_context=_setup_again)
