"""Attention and norm of a megatron-core model in plain torch, for where TransformerEngine is not installed.

They take what its own take: packed sequences, context parallelism, sequence parallelism. Attention keeps a mask of all
pairs of positions, so it is for short batches.

Legend: S positions of a rank, B sequences, H heads, D size of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """The local spec's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal attention within a sequence, in plain torch: grouped heads, MLA, packed and context-parallel batches."""

    def __init__(self, config: Any, *_: Any, softmax_scale: Any = None, pg_collection: Any = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale, self.group = softmax_scale, pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Any:
        """[S, B, H * D] of [S, B, H, D]; of packed ones [S, H, D] likewise without B."""
        flat = query.ndim == 3
        if flat:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        segment, position = self._places(query.shape[0], packed_seq_params)
        key, value, segments, positions = (self._gather(tensor) for tensor in (key, value, segment, position))
        mask = (segment[:, None] == segments) & (positions <= position[:, None])
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).permute(2, 0, 1, 3)
        out = out.reshape(*out.shape[:2], -1)
        return out.squeeze(1) if flat else out

    def _places(self, length: int, packed: Any) -> tuple[Tensor, Tensor]:
        """Which sequence, and which place in it, each local position is of."""
        size, rank = self.group.size(), self.group.rank()
        whole = length * size
        bounds = [0, whole]
        if packed is not None:
            padded = packed.cu_seqlens_q_padded
            bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
        segment, position = [], []
        for number, (start, end) in enumerate(pairwise(bounds)):
            step = (end - start) // (2 * size)
            spans = [(0, end - start)]
            if size > 1:
                spans = [(c * step, (c + 1) * step) for c in (rank, 2 * size - 1 - rank)]
            held = [place for first, last in spans for place in range(first, last)]
            position += held
            segment += [number] * len(held)
        return torch.tensor(segment), torch.tensor(position)

    def _gather(self, tensor: Tensor) -> Tensor:
        """All ranks' positions, one rank's after the other's."""
        if self.group.size() == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor.contiguous(), self.group)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; a rank's gradient is the sum of all ranks' for its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def localize(spec: Any) -> None:
    """Our attention and norm in a block spec, which is megatron-core's way of choosing parts."""
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = Attention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, None) not in (None, IdentityOp):
                setattr(attention, name, RMSNorm)
