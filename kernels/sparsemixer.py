"""Weights of sparsemixer, the router of Phi-3.5-MoE (arXiv 2409.12136, section 2), for experts that somebody chose.

The router takes the largest logit, weighs it by softmax over the logits near it, puts it away, and does the same with
what is left. Here the n-th chosen expert stands where the n-th largest did: for the router's own choice that is the
router, bit for bit, as it computes in evaluation. In training it draws experts and gradients at random, which nothing
that replays can repeat.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weights(logits: Tensor, experts: Tensor, jitter: float) -> Tensor:
    """[T, K] weights of `experts` [T, K] from logits [T, E], in their dtype, in which every step is rounded.

    Of each expert in turn: softmax over the logits that are near its own or above it, without the earlier experts. So
    no weight is 0 while its logit is finite, however far below the largest it was recorded.
    """
    left, parts = logits, []
    for n in range(experts.shape[1]):
        chosen = experts[:, n : n + 1]
        gates = left.masked_fill(far_below(logits, chosen, jitter), float("-inf"))
        parts.append(gates.softmax(dim=1, dtype=gates.dtype).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def far_below(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """[T, E] bool: logits [T, E] below that of `chosen` [T, 1] by more than 2 `jitter` as a part.

    Of the chosen logit or of the magnitude of the other, whichever is larger. Where the quotient is NaN nothing is far.
    """
    top = logits.gather(1, chosen)
    return (top - logits) / logits.abs().clamp(min=top) > 2 * jitter
