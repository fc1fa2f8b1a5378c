"""A linear layer in which a row's result does not depend on the rows around it, bit for bit.

Matrix products choose their tiles and the order of their sums by the number of rows, so a token decoded alone and the
same token in a batch differ by a rounding. Here every row is computed as if it were alone: f(x[:1]) == f(x)[:1], and no
padding, chunking or permutation of the rows changes anything. That holds for one device, one number of threads, one
version of the libraries.

CPU tensors and float64 take the definition, a product for each row. CUDA and ROCm take the kernel of
`invariant_triton`, in tiles of one constant shape, and so does the CPU in Triton's interpreter.

Legend: T tokens, D model, V outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import check, launch
from pacenote.kernels.reference import wide

__all__ = ["invariant_linear"]

TILE = 16
"""Rows of a call of the definition, and tokens that it adds up at once."""
ALIGNED = 64
"""Bytes of which a row's address is a multiple."""


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, each row the same bits whatever stands in the other rows, and however many there are.

    Sums are in float32 (float64 for float64). Gradients: that of `x` is computed the same way, row by row; those of
    `weight` and `bias` add up the tokens in float32, in their order.

    Args:
        x: [..., D] floating, any strides.
        weight: [V, D] of the same dtype.
        bias: [V] floating.

    Returns:
        [..., V] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check.tensor(weight, "weight", (None, None), check.FLOATS, x.device)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"expected x [..., {weight.shape[1]}] of {check.short(weight.dtype)} for this weight, "
            f"got {list(x.shape)} of {check.short(x.dtype)}"
        )
    if bias is not None:
        check.tensor(bias, "bias", (weight.shape[0],), check.FLOATS, x.device)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is ambiguous where D is 0
    out: Tensor = _linear(flat, weight, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """a [M, K] b[N, K]^T + bias [N], each row by itself, in an order that K alone fixes.

    Returns:
        [M, N] in `dtype`; None: in that of the sums, float32 (float64 of float64).
    """
    dtype = dtype or wide(a[:0]).dtype
    if launch.takes_triton(a):
        from pacenote.kernels import invariant_triton

        return invariant_triton.product(a, b, bias, dtype)
    out = alone(a, wide(b).t())
    return (out if bias is None else out + bias.to(out.dtype)).to(dtype)


def add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a [T, M]^T b [T, N] to `total` [M, N], contiguous, in float32 (float64 of such), token after token, in place.

    The tokens of two calls, of which the first has a multiple of the tile, give the bits that one call gives.
    """
    if launch.takes_triton(a):
        from pacenote.kernels import invariant_triton

        return invariant_triton.add_outer(total, a, b)
    for rows in range(0, len(a), TILE):
        # A product of its own: with beta = 1 the library may or may not begin its sums at `total`.
        total += torch.mm(padded(a[rows : rows + TILE]).t(), padded(b[rows : rows + TILE]))
    return None


def add_rows(total: Tensor, a: Tensor) -> None:
    """Add the sum of the rows of a [T, M] to `total` [M] as `add_outer`."""
    wider = total[:, None].repeat(1, 16)  # the narrowest that is multiplied
    add_outer(wider, a, a.new_ones(len(a), 16))
    total.copy_(wider[:, 0])


def alone(x: Tensor, matrix: Tensor) -> Tensor:
    """x [T, K] matrix [K, N], a product for each row; the definition.

    Not of several rows: MKL's sum was seen to depend on the row's place among 8 on all processors, and among any number
    on AMD's. TILE products are one call, whatever T is, of a matrix that lies column by column; the rows are copied: so
    neither batch, strides nor alignment in memory are a part of the result.
    """
    (count, depth), width = x.shape, matrix.shape[1]
    stride = depth + -depth % (ALIGNED // matrix.element_size())
    rows = x.new_zeros(count + -count % TILE, 1, stride, dtype=matrix.dtype)
    rows[:count, 0, :depth] = x
    columns = matrix.t().contiguous().t().expand(TILE, depth, width)
    out = rows.new_empty(len(rows), 1, width)
    for start in range(0, len(rows), TILE):
        part = slice(start, start + TILE)
        torch.bmm(rows[part, :, :depth], columns, out=out[part])
    return out[:count, 0]


def padded(x: Tensor) -> Tensor:
    """x [at most TILE, K] as [TILE, K] in float32 (float64 of such), zeros at the end."""
    tile = x.new_zeros(TILE, x.shape[1], dtype=wide(x[:0]).dtype)
    tile[: len(x)] = x
    return tile


@torch.library.custom_op(
    "pacenote::invariant_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, V] of x [T, D]."""
    return product(x, weight, bias, x.dtype)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op(
    "pacenote::invariant_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, bool want_x, bool want_weight, bool want_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [T, D], [V, D], and [V] in float32; of what is not wanted, nothing in it."""
    grad_x = product(grad, weight.t(), dtype=x.dtype) if want_x else x.new_empty(0)
    grad_weight, grad_bias = (grad.new_empty(0) for _ in range(2))
    if want_weight:
        total = weight.new_zeros(weight.shape, dtype=wide(weight[:0]).dtype)
        add_outer(total, grad, x)
        grad_weight = total.to(weight.dtype)
    if want_bias:
        grad_bias = grad.new_zeros(weight.shape[0], dtype=wide(weight[:0]).dtype)
        add_rows(grad_bias, grad)
    return grad_x, grad_weight, grad_bias


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else grad.new_empty(0),
        grad.new_empty(weight.shape[0], dtype=kind) if want_bias else grad.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want = ctx.needs_input_grad
    grads = _backward(grad, x, weight, want[0], want[1], want[2])
    grad_x, grad_weight, grad_bias = (g if w else None for g, w in zip(grads, want, strict=True))
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(ctx.bias_dtype)


_linear.register_autograd(_differentiate, setup_context=_setup)
