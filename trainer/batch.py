"""Which trajectories share an optimizer step and a microbatch, and their packed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pacenote.kernels.layout import Layout
from pacenote.kernels.pack import PackedBatch, pack
from pacenote.kernels.spec import PROVENANCES, Provenance
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.shares import deal
from pacenote.trainer.world import Place

FILLER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory, the advantage of its episode, and the number of the group that its advantage is relative to."""

    trajectory: Trajectory
    advantage: float
    group: int = 0


Step = list[list[Sample]]
"""One optimizer step of one data-parallel rank: the samples of each microbatch. A microbatch without any keeps step
with the other ranks."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A packed batch, and the trajectories in it as they were cut: number s is the batch's segment s; their groups.

    A filler has no trajectories: it passes through the model because other ranks wait there, and trains nothing.
    """

    batch: PackedBatch
    trajectories: tuple[Trajectory, ...]
    groups: tuple[int, ...] = ()
    local: PackedBatch | None = None
    """What this rank's part of the model sees of the batch; None: all of it."""

    @property
    def seen(self) -> PackedBatch:
        """What this rank's part of the model sees."""
        return self.batch if self.local is None else self.local


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What one rank's part of a model needs of a batch.

    Attributes:
        layers: places on the rows' L axis; None is all.
        layout: its positions.
        pad_to_multiple: positions of a batch are a multiple of this.
    """

    layers: tuple[int, ...] | None = None
    layout: Layout
    pad_to_multiple: int = 1


def split_steps(count: int, parts: int, seed: int) -> list[NDArray[np.int64]]:
    """Shuffle `count` samples into `parts` optimizer steps of nearly equal size, indices [S]; empty ones go."""
    order = np.random.default_rng(seed).permutation(count)
    return [part for part in np.array_split(order, parts) if len(part)]


def share_out(samples: Sequence[Sample], config: OptimConfig, place: Place, *, seed: int) -> list[list[Step]]:
    """A training step's samples by data-parallel rank, optimizer step and microbatch.

    Samples that have nothing to train on are left out; an optimizer step may be of fillers alone for a rank.
    """
    parts: list[list[Step]] = [[] for _ in range(place.data_size)]
    for chosen in split_steps(len(samples), config.minibatches, seed):
        step = [samples[i] for i in chosen if place.data_size == 1 or trains(samples[i], config)]
        lengths = [_positions(sample, config) for sample in step]
        for rank, bins in enumerate(deal(lengths, config.microbatch_tokens, place.data_size, place.multiple)):
            parts[rank].append([[step[i] for i in indices] for indices in bins])
    return parts


def trains(sample: Sample, config: OptimConfig) -> bool:
    """Whether any of its tokens does, before provenance is looked at."""
    return bool(sample.trajectory.loss_mask[1 : config.max_len].any())


def _positions(sample: Sample, config: OptimConfig) -> int:
    tokens = len(sample.trajectory.tokens)
    return min(tokens, config.max_len or tokens) - 1


def pack_samples(
    samples: Sequence[Sample], config: OptimConfig, device: str, *, cut: Cut | None = None
) -> Microbatch | None:
    """Pack the samples of a microbatch; None where nothing is trainable.

    Args:
        samples: at least one.
        config: longest sample, and the provenance of rows.
        device: of the tensors.
        cut: this rank's part, where it is not all.

    Raises:
        ValueError: as `kernels.pack.pack` says, or a provenance of the configuration that has no such name.
    """

    def packed(cut: Cut) -> PackedBatch:
        return pack(
            [sample.trajectory for sample in samples],
            advantages=[sample.advantage for sample in samples],
            max_len=config.max_len,
            device=device,
            layers=cut.layers,
            layout=cut.layout,
            pad_to_multiple=cut.pad_to_multiple,
            replay_provenance=_codes(config.replay_provenance, "replay_provenance"),
            mask_provenance=_codes(config.mask_provenance, "mask_provenance"),
        )

    batch = packed(Cut(layout=Layout()))
    if not batch.num_samples:
        return None
    kept = (samples[number].trajectory for number in batch.kept)
    trajectories = tuple(t.truncate(config.max_len) if config.max_len else t for t in kept)
    groups = tuple(samples[number].group for number in batch.kept)
    return Microbatch(batch, trajectories, groups, None if cut is None else packed(cut))


def filler(sample: Sample, config: OptimConfig, device: str, *, cut: Cut | None = None) -> Microbatch:
    """A microbatch of the first tokens of a sample, none of which trains."""
    trajectory = sample.trajectory.truncate(min(FILLER_TOKENS, len(sample.trajectory.tokens)))
    mask = (np.arange(len(trajectory.tokens)) > 0).astype(np.uint8)
    short = replace(sample, trajectory=replace(trajectory, loss_mask=mask))
    packed = pack_samples([short], replace(config, max_len=None, mask_provenance=()), device, cut=cut)
    assert packed is not None, "all its tokens train"
    mute = [
        None if batch is None else replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), num_trained=0)
        for batch in (packed.batch, packed.local)
    ]
    assert mute[0] is not None
    return Microbatch(mute[0], (), (), mute[1])


def microbatches(
    samples: Sequence[Sample], config: OptimConfig, device: str, *, cut: Cut | None = None
) -> list[Microbatch]:
    """Pack one optimizer step's samples into microbatches of about `config.microbatch_tokens` positions.

    Batches in which nothing is trainable are left out.
    """
    bins = deal([_positions(sample, config) for sample in samples], config.microbatch_tokens)[0]
    packed = (pack_samples([samples[i] for i in picked], config, device, cut=cut) for picked in bins)
    return [batch for batch in packed if batch is not None]


def pack_step(
    step: Step, spare: Sample | None, config: OptimConfig, device: str, *, cut: Cut | None = None, lockstep: bool
) -> list[Microbatch]:
    """Pack a rank's share of an optimizer step.

    Args:
        step: its samples by microbatch.
        spare: any sample of the training step, of which fillers are made.
        config: as for `pack_samples`.
        device: of the tensors.
        cut: this rank's part of a batch.
        lockstep: ranks must pass equally often, so what trains nothing is replaced by a filler, and not left out.
    """
    found = []
    for samples in step:
        batch = pack_samples(samples, config, device, cut=cut) if samples else None
        if batch is None and lockstep:
            assert spare is not None, "a step has samples"
            batch = filler(spare, config, device, cut=cut)
        if batch is not None:
            found.append(batch)
    return found


def _codes(names: Sequence[Provenance], field: str) -> list[int]:
    """Codes of provenance by their names."""
    if unknown := [name for name in names if name not in PROVENANCES]:
        raise ValueError(f"optim.{field} expects names among {', '.join(PROVENANCES)}, got {', '.join(unknown)}")
    return [PROVENANCES.index(name) for name in names]
