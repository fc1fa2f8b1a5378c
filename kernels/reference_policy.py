"""The policy loss in plain torch: ratios, clipping, importance weights, KL, entropy, and every metric of them.

All terms are per position [T]; what the mask leaves out is replaced before any arithmetic, so a NaN there leaks nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # exp(20) = 4.9e8: far beyond any clip, far below overflow in float32


class Terms(NamedTuple):
    """Per-position terms [T]: objective (to be maximised), ratio, clipped (bool: the clipped branch was taken),
    importance weight, its raw value before truncation and masks, kl to the reference."""

    objective: Tensor
    ratio: Tensor
    clipped: Tensor
    weight: Tensor
    raw_weight: Tensor
    kl: Tensor


def ratio_of(new: Tensor, old: Tensor) -> Tensor:
    """exp(new - old) [T], with the exponent held within LOG_RATIO_BOUND so that it cannot overflow."""
    return (new - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def clipped_objective(
    ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's min(r A, clip(r) A) [T] (arXiv 1707.06347, eq. 7) and where the clipped branch was taken [T] bool.

    With `dual`, a negative advantage is bounded by dual * A (arXiv 1912.09729).
    """
    plain, held = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    objective, clipped = torch.minimum(plain, held), held < plain
    if dual is not None:
        floor = dual * advantage
        bounded = (advantage < 0) & (objective < floor)
        objective, clipped = torch.where(bounded, floor, objective), clipped | bounded
    return objective, clipped


def importance_weight(
    old: Tensor, rollout: Tensor, cap: float | None, band: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Weight [T] of exp(old - rollout), truncated at `cap` (TIS), zero outside of `band`, whose edges are inside
    (IcePop); and its raw value [T]. No gradient."""
    raw = ratio_of(old.detach(), rollout)
    weight = raw if cap is None else raw.clamp(max=cap)
    if band is not None:
        weight = torch.where((raw >= band[0]) & (raw <= band[1]), weight, torch.zeros_like(weight))
    return weight, raw


def kl(new: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Schulman's estimates [T] of KL(new || reference) for tokens of the new policy, d = reference - new:
    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d."""
    d = (reference - new).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return {"k1": lambda: -d, "k2": lambda: 0.5 * d * d, "k3": lambda: torch.expm1(d) - d}[kind]()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (0-d) over the masked positions of values [T]; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
