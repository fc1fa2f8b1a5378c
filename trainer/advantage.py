"""Group-relative advantages: what an answer earned above the mean of its siblings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STD_EPS = 1e-4  # keeps a group of nearly equal rewards from blowing up


@dataclass(frozen=True, slots=True)
class Advantages:
    """values: float32 [S], NaN where an episode has no reward; zero_std: groups whose rewards are all equal;
    unrewarded: episodes without a countable reward."""

    values: NDArray[np.float32]
    zero_std: int
    unrewarded: int


def group_advantages(rewards: list[float | None], group: int, *, normalize: bool = True) -> Advantages:
    """GRPO's advantage (arXiv 2402.03300, eq. 3): (r - mean) / (std + 1e-4) within each group of `group` neighbours.

    Args:
        rewards: [S], S a multiple of `group`; None for an episode that earned nothing countable.
        group: episodes a prompt.
        normalize: divide by the group's standard deviation; off is Dr. GRPO (arXiv 2503.20783).

    Raises:
        ValueError: S is not a multiple of `group`.
    """
    if group < 1 or len(rewards) % group:
        raise ValueError(f"expected a multiple of group={group} rewards, got {len(rewards)}")
    table = np.array([np.nan if r is None else r for r in rewards], dtype=np.float64).reshape(-1, group)
    values, zero_std = np.full_like(table, np.nan), 0
    for row, out in zip(table, values, strict=True):
        known = ~np.isnan(row)
        if not known.any():
            continue
        centred = row[known] - row[known].mean()
        spread = centred.std(ddof=1) if known.sum() > 1 else 0.0  # a group of one has no spread, not a NaN
        zero_std += int(spread == 0.0)
        out[known] = centred / (spread + STD_EPS) if normalize else centred
    return Advantages(values.reshape(-1).astype(np.float32), zero_std, int(np.isnan(table).sum()))
