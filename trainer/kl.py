"""The KL to a reference policy as a part of the reward: each token costs what it adds, and answers for what follows it.

Legend: T positions of a microbatch, S samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pacenote.kernels.pack import PackedBatch
from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.reference_policy import kl


def charged(batch: PackedBatch, old: Tensor, reference: Tensor, config: PolicyConfig) -> PackedBatch:
    """The batch with `kl_coef` times the KL from each token to the end of its sample taken off the token's advantage.

    That is a reward a token of -kl_coef KL (arXiv 1909.08593, eq. 2) without discount, held against no baseline: a
    constant cost of all answers is not taken out. The KL is estimated as `kl_type` says, of the policy that sampled;
    k1 is the exact gradient's (arXiv 2506.09477). Advantages of a group's deviations stay in these: the coefficient is
    in their unit.

    Args:
        batch: whole samples, of which untrained tokens cost nothing.
        old: [T] logprobs of the policy before the update.
        reference: [T] of the reference policy.
        config: its coefficient and estimator.
    """
    cost = torch.where(batch.loss_mask, kl(old.double(), reference.double(), config.kl_type), 0.0)
    upto = cost.cumsum(0)
    starts = batch.cu_seqlens.long()
    ends = torch.cat([upto.new_zeros(1), upto])[starts[1:]]  # [S]
    samples = batch.segment_ids.long()
    following = torch.where(batch.loss_mask, ends[samples.clamp(min=0)] - upto + cost, 0.0)
    return replace(batch, advantages=(batch.advantages.double() - config.kl_coef * following).to(batch.advantages))
