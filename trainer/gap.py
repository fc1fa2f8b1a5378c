"""What engine and trainer disagree on over a step's tokens: whole, and by groups of tokens.

Experts are compared on the device; what comes to the host is a few numbers a token.

Legend: T positions of a batch, R of them compared, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacenote.kernels.spec import REPLAY
from pacenote.replay.audit import (
    Flips,
    Labels,
    Mismatch,
    by_provenance,
    by_role,
    by_staleness,
    by_turn,
    mismatch,
    split,
)
from pacenote.trainer.backend import Native
from pacenote.trainer.batch import Microbatch


@dataclass(frozen=True, slots=True)
class GroupGap:
    """The gap over the tokens of one label.

    Attributes:
        trained, native: mismatch over the label's trained tokens; see `Gap`.
        compared: tokens whose routes were compared, prompts included.
        flipped: share of these that the trainer's own routing sends elsewhere in at least one layer; NaN if none.
    """

    trained: Mismatch
    native: Mismatch
    compared: int
    flipped: float


@dataclass(frozen=True, slots=True)
class Gap:
    """What engine and trainer disagree on, over the same tokens: as trained, and with the trainer's own routing.

    Attributes:
        trained, native: mismatch of logprobs over trained tokens; native is of no token if it was not measured.
        flips: the engine's experts against the trainer's own choice; None if no batch had routes, or likewise.
        missing: positions without a row to replay.
        groups: by role, turn, staleness and provenance, and there by label.
    """

    trained: Mismatch
    native: Mismatch
    flips: Flips | None
    missing: int
    groups: dict[str, dict[str, GroupGap]]


class Meter:
    """Gathers microbatches; `gap` sums them up."""

    def __init__(self) -> None:
        self._logprobs: list[NDArray[np.float32]] = []  # [3, T]: as trained, native, the rollout's
        self._facts: list[NDArray[np.int64]] = []  # [4, T]: mask, segment, version, provenance
        self._differs: list[NDArray[np.float64]] = []  # [T], as `audit.token_flips`
        self._by_layer: list[NDArray[np.int64]] = []  # [3, L]: tokens compared, of them flipped, experts shared
        self._missing = 0
        self._top_k = 0
        self._samples = 0

    def add(self, item: Microbatch, trained: Tensor, native: Native | None) -> None:
        """Take a microbatch in.

        Args:
            item: with the rollout's logprobs and routes.
            trained: [T] float32, logprobs under the routing that the update uses.
            native: of a pass under the trainer's own, and that routing; None: not measured.
        """
        batch = item.batch
        real = batch.segment_ids >= 0  # a batch's padding belongs to nobody
        own = torch.full_like(trained, torch.nan) if native is None else native.logprobs
        logprobs = torch.stack([trained, own, batch.logprobs])[:, real]
        self._logprobs.append(logprobs.cpu().numpy())
        places = torch.stack([batch.loss_mask.int(), batch.segment_ids])[:, real].cpu().numpy()
        version = np.concatenate([t.version[1:] for t in item.trajectories])
        provenance = np.concatenate([t.provenance for t in item.trajectories])
        self._facts.append(np.stack([places[0], places[1] + self._samples, version, provenance]).astype(np.int64))
        self._samples += batch.num_samples
        differs = np.full(len(version), np.nan)
        compared = torch.zeros_like(real) if batch.routes is None else (batch.routes.state == REPLAY) & real
        self._missing += len(version) - int(compared.sum())
        if batch.routes is not None and native is not None:
            rows = native.routes.rows
            changed, shared = _compare(batch.routes.rows[compared], rows[compared])
            differs[compared[real].cpu().numpy()] = changed.any(1).cpu().numpy()
            layers = torch.stack([torch.ones_like(shared).sum(0), changed.sum(0), shared.sum(0)])
            self._by_layer.append(layers.cpu().numpy())
            self._top_k = rows.shape[2]
        self._differs.append(differs)

    @classmethod
    def joined(cls, meters: Sequence[Meter]) -> Meter:
        """All that several ranks' meters have gathered."""
        whole = cls()
        for meter in meters:
            whole._logprobs += meter._logprobs
            facts = [np.concatenate([f[:1], f[1:2] + whole._samples, f[2:]]) for f in meter._facts]
            whole._facts += facts
            whole._differs += meter._differs
            whole._by_layer += meter._by_layer
            whole._missing += meter._missing
            whole._top_k = whole._top_k or meter._top_k
            whole._samples += meter._samples
        return whole

    def gap(self, version: int) -> Gap:
        """The gap over all that was added; staleness counts from weights `version`."""
        if not self._facts:
            none = mismatch([], [], [])
            return Gap(trained=none, native=none, flips=None, missing=0, groups={})
        trained, native, rollout = np.concatenate(self._logprobs, axis=1)
        mask, segment, versions, provenance = np.concatenate(self._facts, axis=1)
        differs = np.concatenate(self._differs)
        labels = {
            "role": by_role(mask),
            "turn": by_turn(mask, segment),
            "staleness": by_staleness(versions, version),
            "provenance": by_provenance(provenance),
        }
        return Gap(
            trained=mismatch(trained, rollout, mask),
            native=mismatch(native, rollout, mask),
            flips=self._flips(differs),
            missing=self._missing,
            groups={name: _groups(trained, native, rollout, mask, label, differs) for name, label in labels.items()},
        )

    def _flips(self, differs: NDArray[np.float64]) -> Flips | None:
        if not self._by_layer:
            return None
        compared, flipped, shared = np.sum(self._by_layer, axis=0)
        with np.errstate(invalid="ignore"):  # no token compared: NaN
            by_layer = flipped / compared
            return Flips(
                tokens=int(compared.max(initial=0)),
                flipped_by_layer=by_layer,
                overlap_by_layer=shared / (compared * self._top_k),
                flipped=float(by_layer.mean()),
                any_layer=float(np.nanmean(differs)) if compared.any() else np.nan,
            )


def _compare(recorded: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Where two routings [R, L, K] differ as sets, [R, L] bool, and how many experts they share, [R, L] int64."""
    left, right = recorded.int(), own.int()
    differs = (left.sort(dim=2).values != right.sort(dim=2).values).any(2)
    shared = torch.zeros(left.shape[:2], dtype=torch.int64, device=left.device)
    for slot in range(left.shape[2]):
        shared += (left[:, :, slot, None] == right).any(2)
    return differs, shared


def _groups(
    trained: NDArray[np.float32],
    native: NDArray[np.float32],
    rollout: NDArray[np.float32],
    mask: NDArray[np.int64],
    labels: Labels,
    differs: NDArray[np.float64],
) -> dict[str, GroupGap]:
    """The gap of each label that any token has."""
    with_replay = split(trained, rollout, mask, labels, flipped=differs)
    without = split(native, rollout, mask, labels)
    return {
        name: GroupGap(part.mismatch, without[name].mismatch, part.compared, part.flipped)
        for place, (name, part) in enumerate(with_replay.items())
        if (labels.group == place).any()
    }
