"""Sorting (token, slot) pairs by expert, for a dispatcher. `reference.permutation` is the definition.

CPU tensors take the reference; CUDA and ROCm take the kernels of `permute_triton`, and so does the CPU in Triton's
interpreter; all through one custom op.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacenote.kernels import check, launch, reference
from pacenote.kernels.reference import Permutation
from pacenote.kernels.spec import MAX_EXPERTS, MAX_TOP_K

__all__ = ["Permutation", "permutation"]


def permutation(experts: Tensor, num_experts: int) -> Permutation:
    """Sort the (token, slot) pairs of a routing by expert, stably; nothing waits for the device, results repeat.

    Args:
        experts: [T, K] uint8, uint16, int32 or int64, rows and columns may be strided. A pair whose id is not in
            0..E-1 is dropped: it stands behind all others and belongs to no expert.
        num_experts: E.

    Returns:
        order [T*K], place [T, K] and offsets [E+1], all int32.

    Raises:
        ValueError: a shape, dtype or size that does not fit, or T K >= 2^31 pairs.
    """
    check.tensor(experts, "experts", (None, None), check.IDS, experts.device)
    tokens, k = experts.shape
    if not 1 <= k <= MAX_TOP_K or not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"expected 1 <= K <= {MAX_TOP_K} and 1 <= E <= {MAX_EXPERTS}, got K={k}, E={num_experts}")
    if experts.dtype == torch.uint8 and num_experts > 256:
        raise ValueError(f"expected ids of {num_experts} experts as uint16, int32 or int64, got uint8")
    if tokens * k >= 2**31:
        raise ValueError(f"expected T K < 2^31 pairs, got T={tokens}, K={k}: sort a part at a time")
    return Permutation(*_sort(experts, num_experts))


@torch.library.custom_op(
    "pacenote::permutation", mutates_args=(), schema="(Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)"
)
def _sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [T*K], place [T, K], offsets [E+1], int32."""
    if launch.takes_triton(experts):
        from pacenote.kernels import permute_triton

        return permute_triton.permutation(experts, num_experts)
    out = reference.permutation(experts, num_experts)
    return out.order, out.place, out.offsets


@_sort.register_fake
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        experts.new_empty(experts.shape[0] * experts.shape[1], dtype=torch.int32),
        experts.new_empty(experts.shape, dtype=torch.int32),
        experts.new_empty(num_experts + 1, dtype=torch.int32),
    )
