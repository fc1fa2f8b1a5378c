# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernel behind `invariant_linear`: a matrix product in tiles of one shape, its sums in one order.

A program computes a tile of the result alone, over all of K, tile after tile: nothing is split by the number of rows,
and a row of a tile is computed as every other, so a row's bits are its own. Strides are free, which makes the same
kernel the gradient of the rows (over V) and, beginning at what stands in the result, that of the weight (over T).

Legend: M rows, N columns, K summed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a tile, warps, K tiles in flight. Fixed by the dtype: another shape is another rounding."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """Tiles for inputs of a dtype: float32 is not rounded to TF32, so it has no matrix units and takes smaller ones."""
    if launch.INTERPRETED:
        return Tiles(m=32, n=64, k=32, warps=4, stages=1)
    return Tiles(m=64, n=64, k=16, warps=4, stages=2) if dtype == torch.float32 else Tiles(128, 128, 32, 8, 3)


@triton.jit
def add_tile(
    acc,  # [BLOCK_M, BLOCK_N] float32
    a,  # [M, K]
    b,  # [N, K]
    m,  # [BLOCK_M] rows
    n,  # [BLOCK_N] columns
    M,
    N,
    K,
    a_m,
    a_k,
    b_n,
    b_k,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16
):
    """acc + a b^T at rows m and columns n, K tile after K tile."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_at = a + m.to(tl.int64)[:, None] * a_m + k[None, :] * a_k
    b_at = b + n.to(tl.int64)[None, :] * b_n + k[:, None] * b_k
    for start in range(0, K, BLOCK_K):
        inside = (k < K - start) | EVEN
        x = tl.load(a_at, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(b_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        a_at += BLOCK_K * a_k
        b_at += BLOCK_K * b_k
    return acc


# M and K that are 1 or a multiple of 16 make no other kernel.
@triton.jit(do_not_specialize=["M", "K"])
def _product_kernel(
    a,  # [M, K]
    b,  # [N, K]
    bias,  # [N] or None
    out,  # [M, N] contiguous
    M,
    N,
    K,
    a_m,
    a_k,
    b_n,
    b_k,
    ADD: tl.constexpr,  # to what stands in `out`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    rows = tl.cdiv(M, BLOCK_M)  # neighbours share columns: the larger input is read from the cache
    m = tl.program_id(0) % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    acc = tl.load(at, mask=inside, other=0.0) if ADD else tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_tile(acc, a, b, m, n, M, N, K, a_m, a_k, b_n, b_k, BLOCK_K, EVEN, WIDEN)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


def product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One launch.

    Args:
        a: [M, K] bfloat16, float16 or float32, any strides.
        b: [N, K] of the same dtype, any strides.
        bias: [N] floating, or None.
        dtype: of the result; sums are in float32.

    Returns:
        a b^T + bias, [M, N].
    """
    out = a.new_empty((len(a), len(b)), dtype=dtype)
    _launch(a if a.stride(1) == 1 else a.contiguous(), b, bias, out, add=False)
    return out


def add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to `total` [M, N] float32 contiguous in place, over a [T, M] and b [T, N] of one dtype; one launch."""
    _launch(a.contiguous().t(), b.contiguous().t(), None, total, add=True)


def _launch(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
    tile = tiles(a.dtype)
    programs = triton.cdiv(len(a), tile.m) * triton.cdiv(len(b), tile.n)
    if not programs:
        return
    with launch.on_device_of(a):
        _product_kernel[(programs,)](
            a,
            b,
            None if bias is None else bias.contiguous(),
            out,
            len(a),
            len(b),
            a.shape[1],
            *a.stride(),
            *b.stride(),
            ADD=add,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            EVEN=a.shape[1] % tile.k == 0,
            WIDEN=launch.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
