"""Gradients that must not reach the optimizer: those that are not finite, and those far above what they usually are."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pacenote.trainer.errors import NotFinite

Reason = Literal["not_finite", "spike"]
SEEN, ENOUGH = 64, 16  # norms that the median is of, and how many it takes before anything is a spike


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """Which optimizer steps are skipped."""

    spike: float | None = None
    """Skip an optimizer step whose gradient norm is above so many times the median of the last 64; none: never."""
    max_skips: int = 8
    """Optimizer steps in a row that may be skipped before the run stops: weights that are NaN do not get better."""


class Guard:
    """Judges one optimizer step after the other.

    Args:
        config: what it goes by.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=SEEN)
        self._in_a_row = 0

    def judge(self, norm: float) -> Reason | None:
        """Why a gradient of this norm, before clipping, must not be used; None: it may be.

        Raises:
            NotFinite: too many in a row must not.
        """
        reason = self._reason(norm)
        if reason is None:
            self._norms.append(norm)
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row > self._config.max_skips:
            raise NotFinite(
                f"{self._in_a_row} optimizer steps in a row were skipped, the last for a loss or gradient norm of "
                f"{norm:g} ({reason}), and --optim.guard.max-skips is {self._config.max_skips}: the weights of the "
                "last good optimizer step are kept; try a smaller --optim.lr or look at the step's samples"
            )
        return reason

    def _reason(self, norm: float) -> Reason | None:
        if not math.isfinite(norm):
            return "not_finite"
        bound = self._config.spike
        if bound is not None and len(self._norms) >= ENOUGH and norm > bound * median(self._norms):
            return "spike"
        return None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._norms = deque(state["norms"], maxlen=SEEN)
        self._in_a_row = state["in_a_row"]
