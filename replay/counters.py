"""Route counters of several layers, kept on the layers' own devices, and their sums as an `Audit`.

Legend: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pacenote.kernels.route import RouteStats
from pacenote.replay.audit import COUNTERS, Audit


class LayerCounters:
    """One `RouteStats` a layer. Adding never waits for a device; `audit` does."""

    def __init__(self, layers: Sequence[int]) -> None:
        """Counters of the layers with these global ids, all at zero."""
        self._layers = tuple(layers)
        self._counted = np.zeros((len(COUNTERS), len(self._layers)), dtype=np.int64)
        self._margins = np.zeros(len(self._layers), dtype=np.float64)
        self._stats: list[RouteStats | None] = [None] * len(self._layers)

    def of(self, index: int, device: torch.device) -> RouteStats:
        """Counters of layer number `index` on a device; what was counted on another one is folded into host counts."""
        stats = self._stats[index]
        if stats is None or stats.counters.device != device:
            if stats is not None:
                self._counted, self._margins = self._sums(only=index)
            self._stats[index] = stats = RouteStats.zeros(device)
        return stats

    def audit(self, *, reset: bool) -> Audit:
        """Counts by layer since the start or the last reset; waits for the devices."""
        counted, margins = self._sums()
        if reset:
            self._counted, self._margins = np.zeros_like(counted), np.zeros_like(margins)
            for stats in self._stats:
                if stats is not None:
                    stats.reset()
        counts = dict(zip(COUNTERS, counted, strict=True))
        margin = np.where(counts["flipped"] > 0, margins / np.maximum(counts["flipped"], 1), np.nan)
        return Audit(layers=self._layers, **counts, margin=margin)

    def _sums(self, only: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts [counters, L] and summed margins [L] of the host, with those of all layers, or of one, on devices."""
        counted, margins = self._counted.copy(), self._margins.copy()
        for index, stats in enumerate(self._stats):
            if stats is not None and only in (None, index):
                counts = stats.counts()
                counted[:, index] += [counts[name] for name in COUNTERS]
                margins[index] += stats.margin.item()
        return counted, margins
