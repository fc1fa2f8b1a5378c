"""Advantages of whole episodes, without a critic: what an answer earned above what was to be expected.

Legend: S episodes, groups of G neighbours that answered the same prompt, r rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
STD_EPS = 1e-4  # keeps nearly equal rewards from blowing up


@dataclass(frozen=True, slots=True)
class Advantages:
    """values: float32 [S], NaN where an episode has no reward; zero_std: groups whose rewards are all equal;
    unrewarded: episodes without a countable reward."""

    values: NDArray[np.float32]
    zero_std: int
    unrewarded: int


def advantages(rewards: Sequence[float | None], group: int, estimator: Estimator = "grpo") -> Advantages:
    """Advantages of a step's episodes.

    - grpo: (r - mean) / (std + 1e-4) within the group, the sample's deviation (arXiv 2402.03300, eq. 3).
    - dr_grpo: r - mean within the group: no prompt weighs more for being easy or hard (arXiv 2503.20783).
    - rloo: r - mean of the others in the group, which is (r - mean) G / (G - 1) (arXiv 2402.14740).
    - reinforce_pp: (r - mean) / (std + 1e-4) over the whole step, groups or not (arXiv 2501.03262).
    - reinforce_pp_baseline: r - mean within the group, then divided by the deviation of all of these (the same).

    Args:
        rewards: [S], S a multiple of `group`; None for an episode that earned nothing countable.
        group: episodes a prompt.
        estimator: which.

    Raises:
        ValueError: S is not a multiple of `group`.
    """
    if group < 1 or len(rewards) % group:
        raise ValueError(f"expected a multiple of group={group} rewards, got {len(rewards)}")
    flat = np.array([np.nan if r is None else r for r in rewards], dtype=np.float64)
    table = flat.reshape(-1, group)
    values = np.stack([_in_group(row, estimator) for row in table]) if len(table) else table
    if estimator == "reinforce_pp":
        values = _whitened(table)
    elif estimator == "reinforce_pp_baseline":
        values = values / (_deviation(values) + STD_EPS)
    zero_std = sum(bool(known.size) and not np.ptp(known) for known in (row[~np.isnan(row)] for row in table))
    return Advantages(values.reshape(-1).astype(np.float32), int(zero_std), int(np.isnan(flat).sum()))


def _in_group(row: NDArray[np.float64], estimator: Estimator) -> NDArray[np.float64]:
    """[G] of one group; an answer alone has nobody to beat, and no NaN."""
    count = int((~np.isnan(row)).sum())
    if not count:
        return row
    centred = row - np.nanmean(row)
    if estimator == "grpo":
        return centred / (_deviation(row) + STD_EPS)
    if estimator == "rloo":
        return centred * count / max(1, count - 1)
    return centred


def _whitened(table: NDArray[np.float64]) -> NDArray[np.float64]:
    if np.isnan(table).all():
        return table
    return (table - np.nanmean(table)) / (_deviation(table) + STD_EPS)


def _deviation(values: NDArray[np.float64]) -> float:
    """Of a sample; 0 of one alone."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


def longest_answer(mask: NDArray[np.uint8]) -> int:
    """Tokens of the longest answer, of a sample's loss mask [N]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(np.int8))).reshape(-1, 2)
    return int((edges[:, 1] - edges[:, 0]).max(initial=0))


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of long answers, in [-1, 0] (arXiv 2503.14476, eq. 13).

    Args:
        tokens: of the answer.
        limit: tokens that it may have.
        buffer: the last so many of them are punished, the more the further; 0: none is.
    """
    if buffer <= 0:
        return 0.0
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / buffer))
