"""Which trajectories share an optimizer step and a microbatch, and their packed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pacenote.kernels.pack import PackedBatch, pack
from pacenote.kernels.spec import PROVENANCES, Provenance
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.hf import OptimConfig


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory, the advantage of its episode, and the number of the group that its advantage is relative to."""

    trajectory: Trajectory
    advantage: float
    group: int = 0


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A packed batch, and the trajectories in it as they were cut: number s is the batch's segment s; their groups."""

    batch: PackedBatch
    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...] = ()


def split_steps(count: int, parts: int, seed: int) -> list[NDArray[np.int64]]:
    """Shuffle `count` samples into `parts` optimizer steps of nearly equal size, indices [S]; empty ones go."""
    order = np.random.default_rng(seed).permutation(count)
    return [part for part in np.array_split(order, parts) if len(part)]


def split_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill microbatches of at most `budget` positions, longest first, each into the first that has room.

    A sample longer than the budget gets a microbatch of its own: nothing is dropped here.

    Returns:
        Lists of indices into `lengths`; every index stands in exactly one.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def microbatches(samples: Sequence[Sample], config: OptimConfig, device: str) -> list[Microbatch]:
    """Pack one optimizer step's samples into microbatches of about `config.microbatch_tokens` positions.

    Batches in which nothing is trainable are left out.

    Raises:
        ValueError: as `kernels.pack.pack` says, or a provenance of the configuration that has no such name.
    """
    batches = []
    for picked in split_tokens([len(sample.trajectory.tokens) - 1 for sample in samples], config.microbatch_tokens):
        chosen = [samples[i] for i in picked]
        batch = pack(
            [sample.trajectory for sample in chosen],
            advantages=[sample.advantage for sample in chosen],
            max_len=config.max_len,
            device=device,
            replay_provenance=_codes(config.replay_provenance, "replay_provenance"),
            mask_provenance=_codes(config.mask_provenance, "mask_provenance"),
        )
        if batch.num_samples:
            kept = (chosen[number].trajectory for number in batch.kept)
            cut = tuple(t.truncate(config.max_len) if config.max_len else t for t in kept)
            batches.append(Microbatch(batch, cut, tuple(chosen[number].group for number in batch.kept)))
    return batches


def _codes(names: Sequence[Provenance], field: str) -> list[int]:
    """Codes of provenance by their names."""
    if unknown := [name for name in names if name not in PROVENANCES]:
        raise ValueError(f"optim.{field} expects names among {', '.join(PROVENANCES)}, got {', '.join(unknown)}")
    return [PROVENANCES.index(name) for name in names]
