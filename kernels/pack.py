"""Ragged samples -> one packed training batch, every array of it written from one index map.

A sample of N tokens becomes N-1 positions: inputs tokens[:-1], targets tokens[1:], and row i beside input i.
Legend: N tokens of a sample, T positions of the batch, S samples, L MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pacenote.kernels import reference
from pacenote.kernels.spec import CACHED, DECODE, FREE, PAD, PREFILL, REPLAY

REPLAYED_PROVENANCE = (PREFILL, DECODE, CACHED)


class Sample(Protocol):
    """What `pack` reads of a sample; `rollout.trajectory.Trajectory` is one.

    tokens [N] int32, loss_mask [N] uint8, logprobs [N] float32, experts [N-1, L, K] uint8 | uint16 or None,
    provenance [N-1] uint8, version [N] int32 (weight version that wrote token and row i), num_experts E or None.
    """

    @property
    def tokens(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def loss_mask(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def logprobs(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def experts(self) -> NDArray[Any] | None: ...  # noqa: D102
    @property
    def provenance(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def version(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def num_experts(self) -> int | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Routes:
    """Rows and what may be done with them, inseparable.

    rows: [T, L, K] uint8 | uint16 (or a signed type); stored layer-major, so that rows[:, l] is contiguous.
    state: [T] uint8 of FREE, REPLAY, PAD.
    num_experts: E, if known.
    """

    rows: Tensor
    state: Tensor
    num_experts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A packed batch of T positions on one device.

    tokens [T] int32 inputs; targets [T] int64 the token after each; loss_mask [T] bool whether the target is trained;
    logprobs [T] float32 the rollout's logprob of the target, 0 where it is not trained; advantages [T] float32;
    old_logprobs [T] float32 or None: the old policy's, which the trainer fills in; positions [T] int64, restarting;
    cu_seqlens [S+1] int32, padding not counted; segment_ids [T] int32, -1 for padding; routes or None.
    kept: index among the given samples of each of the `num_samples` packed ones; dropped: samples that had nothing
    left to train on; padding: positions of padding at the end.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    segment_ids: Tensor
    routes: Routes | None
    kept: tuple[int, ...]
    dropped: int
    padding: int
    old_logprobs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, positions including padding."""
        return int(self.tokens.shape[0])

    @property
    def num_samples(self) -> int:
        """S, samples packed."""
        return len(self.kept)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a transformers model: input_ids [1, T] and restarting position_ids [1, T], without a cache.

        With a cache, restarting positions are silently wrong, so it is switched off here.
        """
        return {"input_ids": self.tokens.long()[None], "position_ids": self.positions[None], "use_cache": False}


def pack(
    samples: Sequence[Sample],
    *,
    max_len: int | None = None,
    device: torch.device | str = "cpu",
    advantages: Sequence[float | ArrayLike] | None = None,
    pad_to_multiple: int = 1,
    replay_provenance: Sequence[int] = REPLAYED_PROVENANCE,
) -> PackedBatch:
    """Pack samples into one batch.

    Args:
        samples: ragged samples; all with experts of one shape, or none with experts.
        max_len: longest sample in tokens: the beginning is kept, the tail is cut.
        device: where the batch goes; arrays travel once, in their narrow dtypes.
        advantages: one number a sample, or one [N] array a sample (of the token that is trained); None: zeros.
        pad_to_multiple: T is rounded up to a multiple of this.
        replay_provenance: provenance codes whose rows may be replayed. A row is, if in addition its weight version is
            that of the logprobs it serves: of the first trained token after it (the last one, behind it).

    Raises:
        ValueError: no samples, samples that disagree about their experts, or arguments out of range.
    """
    _check(samples, max_len, advantages, pad_to_multiple)
    lengths = [len(s.tokens) if max_len is None else min(len(s.tokens), max_len) for s in samples]
    kept = [i for i, s in enumerate(samples) if np.asarray(s.loss_mask[1 : lengths[i]]).any()]
    picked = [(samples[i], lengths[i]) for i in kept]
    sizes = np.array([length - 1 for _, length in picked], dtype=np.int64)
    padding = -int(sizes.sum()) % pad_to_multiple
    source = reference.index_map(torch.from_numpy(sizes), padding)

    def ragged(arrays: list[NDArray[Any]], dtype: torch.dtype) -> Tensor:
        joined = np.concatenate(arrays) if arrays else np.zeros(0)
        return torch.from_numpy(joined).to(dtype).to(device, non_blocking=True)

    index = reference.IndexMap(*(part.to(device) for part in source))
    mask = reference.place(ragged([np.asarray(s.loss_mask[1:n]) for s, n in picked], torch.bool), index)
    logprobs = reference.place(ragged([np.asarray(s.logprobs[1:n]) for s, n in picked], torch.float32), index)
    gains = [_advantage(advantages, i, n) for i, (_, n) in zip(kept, picked, strict=True)]
    return PackedBatch(
        tokens=reference.place(ragged([s.tokens[: n - 1] for s, n in picked], torch.int32), index),
        targets=reference.place(ragged([s.tokens[1:n] for s, n in picked], torch.int64), index),
        loss_mask=mask,
        logprobs=torch.where(mask, logprobs, 0.0),
        advantages=torch.where(mask, reference.place(ragged(gains, torch.float32), index), 0.0),
        positions=index.position,
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)).to(device),
        segment_ids=index.segment,
        routes=_routes(picked, index, device, tuple(replay_provenance)),
        kept=tuple(kept),
        dropped=len(samples) - len(kept),
        padding=padding,
    )


def _routes(
    picked: Sequence[tuple[Sample, int]], index: reference.IndexMap, device: torch.device | str, allowed: tuple[int, ...]
) -> Routes | None:
    if not picked or picked[0][0].experts is None:
        return None
    rows = [np.asarray(s.experts)[: n - 1] for s, n in picked]
    num_experts = picked[0][0].num_experts
    limit = num_experts or (1 << (8 * rows[0].dtype.itemsize))
    joined = np.concatenate(rows)
    narrow = torch.from_numpy(joined).dtype
    # uint16 has few operators in torch; its bits travel as int16.
    flat = torch.from_numpy(joined.view(np.int16) if narrow == torch.uint16 else joined).to(device, non_blocking=True)
    states = [row_states(s, n, allowed) for s, n in picked]
    state = torch.from_numpy(np.concatenate(states)).to(device)
    pads = reference.pad_experts(index.source.shape[0], rows[0].shape[2], limit, flat.device).to(flat.dtype)
    layer_major = torch.stack(
        [reference.place(flat[:, layer], index, padding=pads) for layer in range(flat.shape[1])]
    )
    return Routes(layer_major.view(narrow).permute(1, 0, 2), reference.place(state, index, padding=PAD), num_experts)


def row_states(sample: Sample, length: int, allowed: Sequence[int]) -> NDArray[np.uint8]:
    """State [length-1] uint8 of each row of a sample cut to `length` tokens: REPLAY or FREE, as `pack` defines it."""
    rows = length - 1
    trained = np.flatnonzero(np.asarray(sample.loss_mask[:length]))
    trained = trained[trained > 0]
    version = np.asarray(sample.version)
    if not len(trained):
        return np.full(rows, FREE, dtype=np.uint8)
    following = np.minimum(np.searchsorted(trained, np.arange(1, rows + 1)), len(trained) - 1)
    same = version[:rows] == version[trained[following]]
    return np.where(np.isin(sample.provenance[:rows], allowed) & same, REPLAY, FREE).astype(np.uint8)


def _advantage(advantages: Sequence[float | ArrayLike] | None, i: int, length: int) -> NDArray[Any]:
    value = np.asarray(0.0 if advantages is None else advantages[i], dtype=np.float32)
    return np.broadcast_to(value, (length - 1,)) if value.ndim == 0 else value[1:length]


def _check(
    samples: Sequence[Sample], max_len: int | None, advantages: Sequence[float | ArrayLike] | None, multiple: int
) -> None:
    if max_len is not None and max_len < 2:
        raise ValueError(f"expected max_len of at least 2 tokens, an input and a target, got {max_len}")
    if multiple < 1:
        raise ValueError(f"expected pad_to_multiple of at least 1, got {multiple}")
    if advantages is not None and len(advantages) != len(samples):
        raise ValueError(f"expected one advantage a sample ({len(samples)}), got {len(advantages)}")
    shapes = set()
    for number, sample in enumerate(samples):
        n = len(sample.tokens)
        for name, want in (("loss_mask", n), ("logprobs", n), ("version", n), ("provenance", max(n - 1, 0))):
            if len(getattr(sample, name)) != want:
                raise ValueError(
                    f"sample {number}: expected {name} of {want} for {n} tokens, got {len(getattr(sample, name))}"
                )
        rows = sample.experts
        if rows is not None and len(rows) != max(n - 1, 0):
            raise ValueError(f"sample {number}: expected {n - 1} rows for {n} tokens, got {len(rows)}")
        shapes.add(None if rows is None else (*rows.shape[1:], rows.dtype.name, sample.num_experts))
        if advantages is not None and np.ndim(advantages[number]) and np.shape(advantages[number]) != (n,):
            raise ValueError(f"sample {number}: expected advantages [{n}], got {list(np.shape(advantages[number]))}")
    if len(shapes) > 1:
        raise ValueError(f"expected samples with experts of one shape, dtype and E, or all without, got {sorted(map(str, shapes))}")
