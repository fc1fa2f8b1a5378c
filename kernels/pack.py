"""Ragged samples -> one packed batch: inputs, targets, masks, logprobs, positions and routes, read through one map.

Legend: N tokens of a sample, S samples kept, T positions of the batch, L MoE layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacenote.kernels import reference
from pacenote.kernels.spec import CACHED, DECODE, FREE, PAD, PREFILL, REPLAY


class Sample(Protocol):
    """What is packed: arrays of one length N; rows and their provenance have N - 1. A `num_experts` is used if there.

    tokens [N] integer, loss_mask [N] uint8 or bool, logprobs [N] float32 (of the rollout), experts [N-1, L, K] uint8 or
    uint16 or None, provenance [N-1] uint8, version [N] int32 (the weights that wrote token i and row i).
    """

    @property
    def tokens(self) -> NDArray[Any]:
        """[N] integer."""

    @property
    def loss_mask(self) -> NDArray[Any]:
        """[N] uint8 or bool."""

    @property
    def logprobs(self) -> NDArray[Any]:
        """[N] float32."""

    @property
    def experts(self) -> NDArray[Any] | None:
        """[N-1, L, K] uint8 or uint16."""

    @property
    def provenance(self) -> NDArray[Any]:
        """[N-1] uint8."""

    @property
    def version(self) -> NDArray[Any]:
        """[N] int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """rows [T, L, K] uint8 or uint16, layer-major (rows[:, l] is contiguous); state [T] uint8 of kernels.spec."""

    rows: Tensor
    state: Tensor
    num_experts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Samples end to end; position p reads tokens[p] and predicts targets[p]. Padding stands at the end.

    Attributes:
        tokens: [T] int32, inputs; 0 in padding.
        targets: [T] int64, the next token everywhere; 0 in padding.
        loss_mask: [T] bool, whether the target is trained.
        logprobs: [T] float32, the rollout's, of the target; 0 where the mask is.
        advantages: [T] float32, of the target.
        old_logprobs: [T] float32 of the old policy, or None until the trainer has computed them.
        positions: [T] int64, from 0 in each sample, and in the padding.
        cu_seqlens: [S+1] int32, where each sample starts; the last entry is T without the padding.
        segment_ids: [T] int32, the sample; -1 in padding.
        routes: experts of every position, or None when no sample brought any.
        num_samples: S, the samples with something to train on.
        kept: [S], which of the samples given these are.
        dropped: samples without anything to train on.
        padding: positions of padding.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    segment_ids: Tensor
    routes: Routes | None
    num_samples: int
    kept: tuple[int, ...]
    dropped: int
    padding: int

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.shape[0]

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a transformers model: input_ids, position_ids [1, T] int64; no cache, it would misread these."""
        return {"input_ids": self.tokens.long()[None], "position_ids": self.positions[None], "use_cache": False}


def pack(
    samples: Sequence[Sample],
    *,
    max_len: int | None = None,
    device: torch.device | str = "cpu",
    advantages: Sequence[float | NDArray[Any]] | None = None,
    pad_to_multiple: int = 1,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    replay_provenance: Sequence[int] = (PREFILL, DECODE, CACHED),
) -> PackedBatch:
    """Pack samples [N] into N - 1 positions each: inputs tokens[:-1], targets tokens[1:], row i for input i.

    A row is replayed if its provenance is in `replay_provenance` and its weight version is that of the next trained
    target at or after it (for rows behind the last one: of the last one); every other row is routed freely.

    Args:
        samples: the trajectories.
        max_len: tokens a sample may have; the tail beyond is cut from every array alike.
        device: where the batch goes.
        advantages: a number a sample, or an array [N] of its tokens; None: zeros, for scoring.
        pad_to_multiple: T becomes a multiple of this.
        num_experts: E; None takes it from the samples. Needed for padding, and decides uint8 (E <= 256) or uint16.
        layers: indices into the rows' L axis to take, in this order; None takes all.
        replay_provenance: codes of `kernels.spec`.

    Raises:
        ValueError: arrays of a sample whose lengths disagree or whose dtypes are of another kind, samples whose rows
            have different [L, K], ids that their dtype cannot hold, a logprob or advantage of a trained token that is
            not finite.
    """
    if (max_len is not None and max_len < 2) or pad_to_multiple < 1:
        raise ValueError(f"expected max_len >= 2 and pad_to_multiple >= 1, got {max_len} and {pad_to_multiple}")
    if advantages is not None and len(advantages) != len(samples):
        raise ValueError(f"expected an advantage for each of {len(samples)} samples, got {len(advantages)}")
    for number, sample in enumerate(samples):
        _check_sample(sample, number)
    lengths = [min(len(sample.tokens), max_len or len(sample.tokens)) for sample in samples]
    kept = tuple(i for i, (sample, n) in enumerate(zip(samples, lengths, strict=True)) if sample.loss_mask[1:n].any())
    chosen = [samples[i] for i in kept]

    index = reference.pack_index(
        torch.tensor([len(sample.tokens) for sample in chosen], dtype=torch.int64),
        torch.tensor([lengths[i] for i in kept], dtype=torch.int64),
    )
    length = len(index.token)
    padding = -length % pad_to_multiple
    mask = _joined([np.asarray(s.loss_mask, dtype=bool) for s in chosen], np.bool_)[index.token + 1]
    tokens = _joined([s.tokens for s in chosen], np.int32)
    given = [_by_token(0.0 if advantages is None else advantages[i], s, i) for i, s in enumerate(samples)]
    routes = _routes(chosen, [lengths[i] for i in kept], index, padding, num_experts, layers, replay_provenance)

    def place(values: Tensor, fill: int) -> Tensor:
        """[T] on the device, from [T without padding]."""
        return torch.cat([values, values.new_full((padding,), fill)]).to(device, non_blocking=True)

    counts = torch.tensor([lengths[i] - 1 for i in kept], dtype=torch.int32)
    return PackedBatch(
        tokens=place(tokens[index.token], 0),
        targets=place(tokens[index.token + 1].long(), 0),
        loss_mask=place(mask, 0),
        logprobs=place(_trained([s.logprobs for s in chosen], index, mask, "logprob", kept), 0),
        advantages=place(_trained([given[i] for i in kept], index, mask, "advantage", kept), 0),
        old_logprobs=None,
        positions=torch.cat([index.position, torch.arange(padding)]).to(device, non_blocking=True),
        cu_seqlens=torch.cat([counts.new_zeros(1), counts.cumsum(0).int()]).to(device, non_blocking=True),
        segment_ids=place(index.segment.int(), -1),
        routes=None
        if routes is None
        else Routes(
            rows=routes.rows.to(device, non_blocking=True).transpose(0, 1),
            state=routes.state.to(device, non_blocking=True),
            num_experts=routes.num_experts,
        ),
        num_samples=len(kept),
        kept=kept,
        dropped=len(samples) - len(kept),
        padding=padding,
    )


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> Tensor:
    """Arrays end to end, as a tensor of a dtype."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *(np.asarray(a, dtype) for a in arrays)]))


def _by_token(advantage: float | NDArray[Any], sample: Sample, number: int) -> NDArray[Any]:
    """[N] advantages of a sample's tokens."""
    values, n = np.asarray(advantage), len(sample.tokens)
    if values.shape not in ((), (n,)):
        raise ValueError(f"expected sample {number}'s advantage as a number or [{n}], got {list(values.shape)}")
    return np.broadcast_to(values, n)


def _trained(
    arrays: Sequence[NDArray[Any]], index: reference.PackIndex, mask: Tensor, name: str, kept: Sequence[int]
) -> Tensor:
    """[T] float32 of the targets, 0 where the mask [T] is; refuses what is not finite where it is set."""
    values = torch.where(mask, _joined(arrays, np.float32)[index.token + 1], 0.0)
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"expected finite {name}s for trained tokens, got {float(values[at])} for token "
            f"{int(index.position[at]) + 1} of sample {kept[int(index.segment[at])]}: mask the token or drop the sample"
        )
    return values


_KINDS = (
    ("tokens", "iu", "integers"),
    ("loss_mask", "biu", "integers or booleans"),
    ("logprobs", "f", "floats"),
    ("version", "iu", "integers"),
    ("provenance", "iu", "integers"),
)


def _check_sample(sample: Sample, index: int) -> None:
    n = len(sample.tokens)
    rows = max(n - 1, 0)
    wanted = {"tokens": n, "loss_mask": n, "logprobs": n, "version": n, "provenance": rows}
    for name, size in wanted.items():
        shape = np.shape(getattr(sample, name))
        if shape != (size,):
            raise ValueError(f"expected sample {index}'s {name} [{size}] for its {n} tokens, got {list(shape)}")
    for name, kinds, words in _KINDS:
        array = np.asarray(getattr(sample, name))
        if array.size and array.dtype.kind not in kinds:
            raise ValueError(f"expected sample {index}'s {name} as {words}, got {array.dtype}")
    tokens = np.asarray(sample.tokens)
    if n and (int(tokens.min()) < -(2**31) or int(tokens.max()) >= 2**31):
        raise ValueError(f"expected sample {index}'s tokens within int32, got {int(tokens.min())}..{int(tokens.max())}")
    experts = sample.experts
    if experts is None:
        return
    if experts.ndim != 3 or len(experts) != rows or experts.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"expected sample {index}'s experts [{rows}, L, K] of uint8 or uint16 for its {n} tokens, "
            f"got {list(experts.shape)} of {experts.dtype}"
        )


def _routes(
    samples: Sequence[Sample],
    lengths: Sequence[int],
    index: reference.PackIndex,
    padding: int,
    num_experts: int | None,
    layers: Sequence[int] | None,
    replay_provenance: Sequence[int],
) -> Routes | None:
    """Routes whose rows are [L, T, K], on the host. Samples without rows get the padding's experts, routed freely."""
    shapes = {sample.experts.shape[1:] for sample in samples if sample.experts is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"expected samples with rows of one shape [L, K], got {sorted(shapes)}")
    [(num_layers, k)] = shapes
    num_experts = _num_experts(samples, num_experts)
    if num_experts is None and (padding or any(sample.experts is None for sample in samples)):
        raise ValueError("expected num_experts: padding, and samples without rows, are spread over the expert range")
    if num_experts is not None and k > num_experts:
        raise ValueError(f"expected rows of at most {num_experts} experts a token, got {k}")
    dtype = _row_dtype(samples, num_experts)
    longest = max(len(index.row) + padding, *(len(s.tokens) - 1 for s in samples))  # rows before any is cut
    spread = reference.pad_experts(longest, k, num_experts or 1, "cpu").numpy().astype(dtype)
    flat = np.concatenate(
        [
            np.broadcast_to(spread[: len(s.tokens) - 1, None], (len(s.tokens) - 1, num_layers, k))
            if s.experts is None
            else s.experts
            for s in samples
        ]
    ).astype(dtype, copy=False)
    take = np.arange(num_layers) if layers is None else np.asarray(layers, dtype=np.int64)
    if len(take) and (take.min() < 0 or take.max() >= num_layers):
        raise ValueError(f"expected layers within the {num_layers} of the samples' rows, got {take.tolist()}")
    rows = np.empty((len(take), len(index.row) + padding, k), dtype)
    source = index.row.numpy()
    for place, layer in enumerate(take):
        rows[place, : len(source)] = flat[source, layer]
        rows[place, len(source) :] = spread[len(source) : len(source) + padding]
    state = np.full(len(source) + padding, PAD, np.uint8)
    replayed = [_replayed(s, n, replay_provenance) for s, n in zip(samples, lengths, strict=True)]
    state[: len(source)] = np.where(np.concatenate(replayed), REPLAY, FREE)
    return Routes(rows=torch.from_numpy(rows), state=torch.from_numpy(state), num_experts=num_experts)


def _num_experts(samples: Sequence[Sample], given: int | None) -> int | None:
    """E as given, or as the samples say."""
    named = [given, *(getattr(sample, "num_experts", None) for sample in samples if sample.experts is not None)]
    known = {int(number) for number in named if number is not None}
    if len(known) > 1:
        raise ValueError(f"expected samples of one number of experts, got {sorted(known)}")
    return next(iter(known), None)


def _row_dtype(samples: Sequence[Sample], num_experts: int | None) -> Any:
    """uint8 or uint16 by the number of experts, never by the data."""
    given = {sample.experts.dtype for sample in samples if sample.experts is not None}
    if num_experts is None:
        return np.uint16 if np.dtype(np.uint16) in given else np.uint8
    if num_experts > 256 and np.dtype(np.uint8) in given:
        raise ValueError(f"expected rows of {num_experts} experts as uint16, got uint8")
    wide = (s.experts for s in samples if s.experts is not None and s.experts.dtype == np.uint16 and s.experts.size)
    if num_experts <= 256 and any(experts.max() > 255 for experts in wide):
        raise ValueError(f"expected ids below {num_experts} in rows of {num_experts} experts, got ids above 255")
    return np.uint8 if num_experts <= 256 else np.uint16


def _replayed(sample: Sample, length: int, replay_provenance: Sequence[int]) -> NDArray[np.bool_]:
    """[length - 1] bool: rows that were written by known passes of the very weights whose logprobs are trained on."""
    rows = length - 1
    if sample.experts is None:
        return np.zeros(rows, np.bool_)
    trained = np.flatnonzero(sample.loss_mask[1:length])  # target i + 1 belongs to row i
    follows = np.minimum(np.searchsorted(trained, np.arange(rows)), len(trained) - 1)
    version = np.asarray(sample.version)
    same = version[:rows] == version[trained[follows] + 1]
    return np.asarray(np.isin(sample.provenance[:rows], list(replay_provenance)) & same, dtype=np.bool_)
