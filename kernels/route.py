"""Routing replay: recorded experts, weights from the trainer's own logits. See `reference.replay_topk` for the definition.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacenote.kernels import check, reference
from pacenote.kernels.spec import FREE, MAX_EXPERTS, MAX_TOP_K, PAD, REPLAY, RouterSpec

__all__ = ["FREE", "PAD", "REPLAY", "RouteStats", "RouterSpec", "replay_topk"]

NAMES = ("replayed", "free", "duplicate", "out_of_range", "pad", "flipped", "overlap")


@dataclass(frozen=True, slots=True)
class RouteStats:
    """Counters on the device: `counters` [7] int64 in the order of NAMES, added to in place, never synchronised.

    Each row counts once, in one of the first five. `flipped`: replayed rows whose recorded set is not the native one.
    `overlap`: sum over replayed rows of the experts that both sets hold.
    """

    counters: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> RouteStats:
        """Counters at zero."""
        return cls(torch.zeros(len(NAMES), dtype=torch.int64, device=device))

    def reset(self) -> None:
        """Set the counters to zero."""
        self.counters.zero_()

    def counts(self) -> dict[str, int]:
        """The counters by name; the only call that waits for the device."""
        return dict(zip(NAMES, self.counters.tolist(), strict=True))


def replay_topk(
    logits: Tensor,
    rows: Tensor,
    spec: RouterSpec,
    *,
    state: Tensor | None = None,
    bias: Tensor | None = None,
    stats: RouteStats | None = None,
) -> tuple[Tensor, Tensor]:
    """Route with the recorded experts where they are valid, with the router's own top-k where they are not.

    Args:
        logits: [T, E] floating, rows may be strided.
        rows: [T, K] uint8, uint16, int32 or int64; a negative id marks a missing row.
        spec: the router's arithmetic.
        state: [T] uint8 of FREE, REPLAY, PAD; None replays every row.
        bias: [E], for selection only.
        stats: counters to add to.

    Returns:
        weights [T, K] in the spec's weight dtype, experts [T, K] int64. Gradients flow from the weights to the logits.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check(logits, rows, spec, state, bias)
    out = reference.replay_topk(logits, rows, spec, state=state, bias=bias)
    if stats is not None:
        _count(stats, out, rows)
    return out.weights, out.experts


@torch.no_grad()
def _count(stats: RouteStats, out: reference.Routing, rows: Tensor) -> None:
    fates = torch.stack([(out.fate == fate).sum() for fate in range(5)])
    both = (rows.long()[:, :, None] == out.native[:, None, :]).any(dim=2).sum(dim=1)
    both = torch.where(out.fate == reference.REPLAYED, both, rows.shape[1])
    replayed = out.fate == reference.REPLAYED
    flipped = (both < rows.shape[1]).sum()
    overlap = torch.where(replayed, both, 0).sum()
    stats.counters.add_(torch.cat([fates, torch.stack([flipped, overlap])]))


def _check(logits: Tensor, rows: Tensor, spec: RouterSpec, state: Tensor | None, bias: Tensor | None) -> None:
    check.tensor(logits, "logits", (None, None), check.FLOATS, logits)
    tokens, experts = logits.shape
    check.tensor(rows, "rows", (tokens, None), check.IDS, logits)
    if not 1 <= rows.shape[1] <= min(experts, MAX_TOP_K) or experts > MAX_EXPERTS:
        raise ValueError(
            f"expected 1 <= K <= min(E, {MAX_TOP_K}) and E <= {MAX_EXPERTS}, got K={rows.shape[1]}, E={experts}"
        )
    if experts % spec.groups or (spec.groups > 1 and experts // spec.groups * spec.topk_groups < rows.shape[1]):
        raise ValueError(f"expected groups that divide E={experts} and hold K={rows.shape[1]} when open, got {spec}")
    if rows.dtype == torch.uint8 and experts > 256:
        raise ValueError(f"expected rows of {experts} experts as uint16, int32 or int64, got uint8")
    if state is not None:
        check.tensor(state, "state", (tokens,), (torch.uint8,), logits)
    if bias is not None:
        check.tensor(bias, "bias", (experts,), check.FLOATS, logits)
