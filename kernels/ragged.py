"""Samples of any length end to end: checked on the host, brought to a device in one copy, in their narrow dtypes.

Legend: N tokens of a sample, or of all of them; R rows of the samples that have any; S samples, L MoE layers, E
experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from pacenote.kernels import check
from pacenote.kernels.spec import MAX_TOP_K, MISSING, RECOMPUTED


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
class Ragged:
    """Samples end to end on a device, uncut; and on the host the numbers that decide the shape of a batch of them.

    Attributes:
        tokens: [N] int32.
        loss_mask: [N] bool.
        logprobs: [N] float32, of the rollout.
        advantages: [N] float32.
        experts: [R, L, K] uint8 or uint16, or None if no sample has rows.
        provenance: [R] uint8, or None without experts.
        fresh: [R] bool, the row is of the weights whose logprob it serves; None: all are.
        lengths: [S] int64 on the host, tokens of each sample.
        kept: [S] int64 on the host, how many of them a batch may take; 0 drops the sample.
        has_rows: [S] bool on the host.
        num_experts: E, if known.
        trained: [S] int64 on the host, trained targets among the tokens kept; None: nobody counted them.
    """

    tokens: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    experts: Tensor | None
    provenance: Tensor | None
    fresh: Tensor | None
    lengths: NDArray[np.int64]
    kept: NDArray[np.int64]
    has_rows: NDArray[np.bool_]
    num_experts: int | None
    trained: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Check that the arrays belong together: a kernel would read beyond one that is too short.

        Raises:
            ValueError: they do not.
        """
        device, samples = self.tokens.device, (len(self.lengths),)
        for name in ("kept", "has_rows", "trained"):
            if getattr(self, name) is not None and np.shape(getattr(self, name)) != samples:
                raise ValueError(f"expected {name} {list(samples)}, got {list(np.shape(getattr(self, name)))}")
        if not ((self.kept >= 0) & (self.kept <= self.lengths) & (self.kept != 1)).all():
            raise ValueError("expected 0, or 2 to lengths, tokens kept of each sample, got others")
        if self.num_experts is not None and not 1 <= self.num_experts <= 1 << 16:
            raise ValueError(f"expected num_experts within 1..65536, which uint16 holds, got {self.num_experts}")
        tokens = int(np.sum(self.lengths))
        for name, dtype in (
            ("tokens", torch.int32),
            ("loss_mask", torch.bool),
            ("logprobs", torch.float32),
            ("advantages", torch.float32),
        ):
            check.tensor(getattr(self, name), name, (tokens,), (dtype,), device)
        if self.experts is None:
            return
        rows = int((self.lengths - 1)[self.has_rows].sum())
        check.tensor(self.experts, "experts", (rows, None, None), (torch.uint8, torch.uint16), device)
        check.tensor(self.provenance, "provenance", (rows,), (torch.uint8,), device)
        if self.fresh is not None:
            check.tensor(self.fresh, "fresh", (rows,), (torch.bool,), device)
        layers, k = self.experts.shape[1:]
        if layers < 1 or not 1 <= k <= MAX_TOP_K:
            raise ValueError(f"expected rows of 1 layer or more and 1..{MAX_TOP_K} experts, got L={layers}, K={k}")
        if self.num_experts is None:
            return
        if self.experts.dtype == torch.uint8 and self.num_experts > 256:
            raise ValueError(f"expected rows of {self.num_experts} experts as uint16, got uint8")
        if k > self.num_experts:
            raise ValueError(f"expected rows of at most {self.num_experts} experts a token, got {k}")

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        *,
        max_len: int | None,
        advantages: Sequence[float | NDArray[Any]] | None,
        num_experts: int | None,
        device: torch.device | str,
        mask_provenance: Sequence[int] = (),
    ) -> Ragged:
        """Check samples and bring those with something to train on to a device; the others are there with 0 tokens.

        Args:
            samples: S of them.
            max_len: tokens a sample may have; what is behind is not looked at.
            advantages: a number a sample, or an array [N] of its tokens; None: zeros.
            num_experts: E; None takes it from the samples.
            device: where they go; to a GPU from pinned memory, without waiting.
            mask_provenance: codes of `kernels.spec`; targets whose own row has one do not train.

        Raises:
            ValueError: as `pack.pack` says.
        """
        if max_len is not None and max_len < 2:
            raise ValueError(f"expected max_len >= 2, got {max_len}")
        if advantages is not None and len(advantages) != len(samples):
            raise ValueError(f"expected an advantage for each of {len(samples)} samples, got {len(advantages)}")
        for number, sample in enumerate(samples):
            _check_sample(sample, number)
        codes = provenance_codes(mask_provenance, "mask_provenance")
        masks = [_loss_mask(sample, codes) for sample in samples]
        kept = [_kept(mask, max_len) for mask in masks]
        chosen, given = [], []
        for number, (sample, n) in enumerate(zip(samples, kept, strict=True)):
            advantage = _by_token(0.0 if advantages is None else advantages[number], sample, number)
            _check_trained("logprob", sample.logprobs, masks[number], n, number)
            _check_trained("advantage", advantage, masks[number], n, number)
            if n:
                chosen.append(sample)
                given.append(advantage)
        rows = [sample.experts for sample in chosen if sample.experts is not None]
        num_experts, dtype, shape = _geometry(rows, chosen, num_experts)
        parts = [
            Part("tokens", [sample.tokens for sample in chosen], np.int32),
            Part("loss_mask", [mask for mask, n in zip(masks, kept, strict=True) if n], np.bool_),
            Part("logprobs", [sample.logprobs for sample in chosen], np.float32),
            Part("advantages", given, np.float32),
        ]
        if rows:
            parts.append(Part("experts", rows, dtype, shape))
            parts.append(Part("provenance", [s.provenance for s in chosen if s.experts is not None], np.uint8))
        routed = [(s, m, n) for s, m, n in zip(samples, masks, kept, strict=True) if n and s.experts is not None]
        fresh = [_fresh(sample, mask, n) for sample, mask, n in routed]
        if not all(part.all() for part in fresh):
            parts.append(Part("fresh", fresh, np.bool_))
        there = upload(parts, torch.device(device))
        return cls(
            tokens=there["tokens"],
            loss_mask=there["loss_mask"],
            logprobs=there["logprobs"],
            advantages=there["advantages"],
            experts=there.get("experts"),
            provenance=there.get("provenance"),
            fresh=there.get("fresh"),
            lengths=np.array([len(s.tokens) if n else 0 for s, n in zip(samples, kept, strict=True)], np.int64),
            kept=np.array(kept, np.int64),
            has_rows=np.array([n > 0 and s.experts is not None for s, n in zip(samples, kept, strict=True)], np.bool_),
            num_experts=num_experts,
            trained=np.array([int(mask[1:n].sum()) for mask, n in zip(masks, kept, strict=True)], np.int64),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Arrays [N, *shape] that stand end to end in one of a dtype."""

    name: str
    arrays: Sequence[NDArray[Any]]
    dtype: DTypeLike
    shape: tuple[int, ...] = ()


_ALIGN = 128
"""Bytes that each part starts at a multiple of: rows are read in words of up to eight."""


def upload(parts: Sequence[Part], device: torch.device) -> dict[str, Tensor]:
    """Each part's tensor [N, *shape], views of one buffer that goes to the device in one copy; nobody waits for it.

    To a GPU it goes from pinned memory, which torch keeps until the copy is done.
    """
    places, end = [], 0
    for part in parts:
        size = sum(np.size(array) for array in part.arrays) * np.dtype(part.dtype).itemsize
        places.append(slice(end, end + size))
        end = -(-(end + size) // _ALIGN) * _ALIGN
    buffer = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    host, kinds = buffer.numpy(), []
    for part, place in zip(parts, places, strict=True):
        rows = sum(len(array) for array in part.arrays)
        out = host[place].view(part.dtype).reshape(rows, *part.shape)
        kinds.append(torch.from_numpy(out).dtype)
        if part.arrays:
            with np.errstate(over="ignore"):  # a logprob that is not trained may be anything; all else was checked
                np.concatenate(part.arrays, out=out, casting="unsafe")
    buffer = buffer.to(device, non_blocking=True)
    return {
        part.name: buffer[place].view(kind).reshape(sum(len(array) for array in part.arrays), *part.shape)
        for part, place, kind in zip(parts, places, kinds, strict=True)
    }


# --- checks ----------------------------------------------------------------------------------------------------------

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
    codes = np.asarray(sample.provenance)
    if rows and not (codes.min() >= MISSING and codes.max() <= RECOMPUTED):
        raise ValueError(
            f"expected sample {index}'s provenance within {MISSING}..{RECOMPUTED}, got {codes.min()}..{codes.max()}"
        )
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


def _by_token(advantage: float | NDArray[Any], sample: Sample, number: int) -> NDArray[Any]:
    """[N] advantages of a sample's tokens."""
    values, n = np.asarray(advantage), len(sample.tokens)
    if values.shape not in ((), (n,)) or values.dtype.kind not in "biuf":
        raise ValueError(
            f"expected sample {number}'s advantage as a number or [{n}], got {list(values.shape)} of {values.dtype}"
        )
    return np.broadcast_to(values, n)


def provenance_codes(given: Sequence[int], name: str) -> frozenset[int]:
    """The codes of provenance in the argument of that name.

    Raises:
        ValueError: one that `kernels.spec` does not have.
    """
    codes = frozenset(int(code) for code in given)
    if not codes <= set(range(MISSING, RECOMPUTED + 1)):
        raise ValueError(f"expected {name} as codes of provenance within {MISSING}..{RECOMPUTED}, got {sorted(codes)}")
    return codes


def _loss_mask(sample: Sample, codes: frozenset[int]) -> NDArray[np.bool_]:
    """[N] bool: what is trained, without the targets i + 1 whose row i has one of these codes of provenance."""
    mask = np.asarray(sample.loss_mask, dtype=np.bool_)
    if not codes or not len(mask):
        return mask
    # what a sample without experts says of their provenance is about rows that it does not have
    row = np.full(len(mask) - 1, MISSING) if sample.experts is None else np.asarray(sample.provenance)
    return np.concatenate([mask[:1], mask[1:] & ~np.isin(row, list(codes))])


def _kept(mask: NDArray[np.bool_], max_len: int | None) -> int:
    """Tokens that stay of a sample with this mask [N]: the first `max_len`, or none if they hold nothing to train."""
    n = len(mask) if max_len is None else min(len(mask), max_len)
    return n if mask[1:n].any() else 0


def _check_trained(name: str, values: NDArray[Any], mask: NDArray[np.bool_], kept: int, number: int) -> None:
    """What is trained on is finite: `values` [N] where `mask` [N] is."""
    trained = np.flatnonzero(mask[1:kept]) + 1
    spoilt = trained[~np.isfinite(np.asarray(values)[trained].astype(np.float32))]
    if len(spoilt):
        raise ValueError(
            f"expected finite {name}s for trained tokens, got {float(values[spoilt[0]])} for token {int(spoilt[0])} of "
            f"sample {number}: mask the token or drop the sample"
        )


def _geometry(
    experts: Sequence[NDArray[Any]], chosen: Sequence[Sample], given: int | None
) -> tuple[int | None, DTypeLike, tuple[int, ...]]:
    """E, the dtype of rows, and their [L, K]."""
    shapes = {array.shape[1:] for array in experts}
    if len(shapes) > 1:
        raise ValueError(f"expected samples with rows of one shape [L, K], got {sorted(shapes)}")
    named = [given, *(getattr(sample, "num_experts", None) for sample in chosen if sample.experts is not None)]
    known = {int(number) for number in named if number is not None}
    if len(known) > 1:
        raise ValueError(f"expected samples of one number of experts, got {sorted(known)}")
    num_experts = next(iter(known), None)
    shape = next(iter(shapes), (0, 0))
    return num_experts, _row_dtype(experts, num_experts), shape


def _row_dtype(experts: Sequence[NDArray[Any]], num_experts: int | None) -> DTypeLike:
    """uint8 or uint16 by the number of experts, never by the data."""
    given = {array.dtype for array in experts}
    if num_experts is None:
        return np.uint16 if np.dtype(np.uint16) in given else np.uint8
    if num_experts > 256 and np.dtype(np.uint8) in given:
        raise ValueError(f"expected rows of {num_experts} experts as uint16, got uint8")
    if num_experts <= 256 and any(a.max() > 255 for a in experts if a.dtype == np.uint16 and a.size):
        raise ValueError(f"expected ids below {num_experts} in rows of {num_experts} experts, got ids above 255")
    return np.uint8 if num_experts <= 256 else np.uint16


def _fresh(sample: Sample, mask: NDArray[np.bool_], kept: int) -> NDArray[np.bool_]:
    """[N-1] bool: rows of the weights of the next trained target at or behind them; at the end, of the last one.

    A target i + 1 that `mask` [N] trains belongs to row i. What is cut away counts for nothing.
    """
    version = np.asarray(sample.version)
    trained = np.flatnonzero(mask[1:kept])
    follows = np.minimum(np.searchsorted(trained, np.arange(len(version) - 1)), len(trained) - 1)
    return np.asarray(version[:-1] == version[trained[follows] + 1], dtype=np.bool_)
