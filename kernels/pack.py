"""Ragged samples -> one packed batch: inputs, targets, masks, logprobs, positions and routes, read through one map.

`reference.pack_index` and `reference.pack` are the definition. CPU tensors take it; CUDA and ROCm take the kernel of
`pack_triton`, and so does the CPU in Triton's interpreter.

Legend: N tokens of a sample, S samples kept, T positions of this rank's batch, T' those whose routes it holds, L MoE
layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacenote.kernels import launch, reference
from pacenote.kernels.layout import Layout, stage_layers
from pacenote.kernels.ragged import Part, Ragged, Sample, provenance_codes, upload
from pacenote.kernels.spec import CACHED, DECODE, MAX_EXPERTS, PREFILL

__all__ = ["Layout", "PackedBatch", "Ragged", "Routes", "Sample", "pack", "pack_ragged", "stage_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """rows [T', L, K] uint8 or uint16, layer-major (rows[:, l] is contiguous); state [T'] uint8 of kernels.spec."""

    rows: Tensor
    state: Tensor
    num_experts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Samples end to end; position p reads tokens[p] and predicts targets[p]. Padding stands at the end.

    Under context parallelism every sample is padded as well; that padding carries its sample's number in `segment_ids`
    and goes on with its positions, but is neither trained nor replayed.

    Attributes:
        tokens: [T] int32, inputs; 0 in padding.
        targets: [T] int64, the next token everywhere; 0 in padding.
        loss_mask: [T] bool, whether the target is trained.
        logprobs: [T] float32, the rollout's, of the target; 0 where the mask is.
        advantages: [T] float32, of the target.
        old_logprobs: [T] float32 of the old policy, or None until the trainer has computed them.
        positions: [T] int64, from 0 in each sample, and in the padding at the end.
        cu_seqlens: [S+1] int32, where each sample starts on all ranks together, samples unpadded; without context
            parallelism that is its place in this batch, and the last entry is T without the padding.
        cu_seqlens_padded: [S+1] int32, the same with padded samples (the `_padded` of megatron-core's PackedSeqParams);
            divided by cp_size it is the sample's place in this batch. What stands behind the last entry belongs to no
            sample: attention over variable lengths leaves it unwritten, so let it have a sequence of its own there.
        segment_ids: [T] int32, the sample; -1 in the padding at the end.
        routes: experts of every position, or None when no sample brought any.
        num_samples: S, the samples with something to train on.
        kept: [S], which of the samples given these are.
        dropped: samples without anything to train on.
        padding: positions of padding among the T.
        layout: this rank's part of the batch.
        num_trained: trained tokens of the batch on all ranks together, so at least as many as here; None: nobody
            counted them on the host.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    cu_seqlens_padded: Tensor
    segment_ids: Tensor
    routes: Routes | None
    num_samples: int
    kept: tuple[int, ...]
    dropped: int
    padding: int
    layout: Layout
    num_trained: int | None = None

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
    mask_provenance: Sequence[int] = (),
    layout: Layout | None = None,
) -> PackedBatch:
    """Pack samples [N] into N - 1 positions each: inputs tokens[:-1], targets tokens[1:], row i for input i.

    A row is replayed if its provenance is in `replay_provenance` and its weight version is that of the next trained
    target at or after it (for rows behind the last one: of the last one); every other row is routed freely.

    A target whose own row (row i for target i + 1) has a provenance in `mask_provenance` is as if the loss mask had
    left it out: it does not train, gives no row its version, and a sample of nothing else is dropped. The rows of a
    sample without experts are MISSING. One choice does not decide the other: a masked target's row is still replayed,
    if it may be, for the sake of the tokens behind it.

    Args:
        samples: the trajectories.
        max_len: tokens a sample may have; the tail beyond is cut from every array alike.
        device: where the batch goes; to a GPU from pinned memory, nothing waits for it.
        advantages: a number a sample, or an array [N] of its tokens; None: zeros, for scoring.
        pad_to_multiple: T becomes a multiple of this.
        num_experts: E; None takes it from the samples. Needed for padding, and decides uint8 (E <= 256) or uint16.
        layers: indices into the rows' L axis to take, in this order; None takes all. `stage_layers` gives a pipeline
            stage's.
        replay_provenance: codes of `kernels.spec` whose rows are replayed.
        mask_provenance: codes of `kernels.spec` whose targets do not train.
        layout: this rank's part of the batch; None is all of it.

    Raises:
        ValueError: arrays of a sample whose lengths disagree or whose dtypes are of another kind, samples whose rows
            have different [L, K], ids that their dtype cannot hold, a logprob or advantage of a trained token that is
            not finite.
    """
    ragged = Ragged.of(
        samples,
        max_len=max_len,
        advantages=advantages,
        num_experts=num_experts,
        device=device,
        mask_provenance=mask_provenance,
    )
    return pack_ragged(
        ragged, pad_to_multiple=pad_to_multiple, layers=layers, replay_provenance=replay_provenance, layout=layout
    )


def pack_ragged(
    ragged: Ragged,
    *,
    pad_to_multiple: int = 1,
    layers: Sequence[int] | None = None,
    replay_provenance: Sequence[int] = (PREFILL, DECODE, CACHED),
    layout: Layout | None = None,
) -> PackedBatch:
    """Pack samples that are on the device: one small copy (a table of some 40 bytes a sample), one launch.

    Several layouts can be cut from one Ragged. Arguments as for `pack`. Not for a CUDA graph, which would keep the
    address of the copy's source.

    Raises:
        ValueError: an argument that does not fit, padding without a number of experts, T of 2^31 or more.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"expected pad_to_multiple >= 1, got {pad_to_multiple}")
    codes = provenance_codes(replay_provenance, "replay_provenance")
    layout = layout or Layout()
    kept = np.flatnonzero(ragged.kept)
    plan = _Plan.of(ragged, kept, pad_to_multiple, layout)
    device, experts = ragged.tokens.device, ragged.experts
    if experts is not None and ragged.num_experts is None and (plan.padding or not ragged.has_rows[kept].all()):
        raise ValueError("expected num_experts: padding, and samples without rows, are spread over the expert range")
    part = plan.total // layout.sp_size
    take = _layer_table(layers, 0 if experts is None else experts.shape[1])
    small = upload(
        [
            Part("table", [plan.table.reshape(-1)], np.int64),
            Part("layers", [take], np.int64),
            Part("cu_seqlens", [plan.cu_seqlens], np.int32),
            Part("cu_seqlens_padded", [plan.cu_seqlens_padded], np.int32),
        ],
        device,
    )
    fields = _pack(
        small["table"].view(4, -1),
        ragged.tokens,
        ragged.loss_mask,
        ragged.logprobs,
        ragged.advantages,
        experts,
        ragged.provenance,
        ragged.fresh,
        small["layers"],
        _first_of_run(take),
        plan.total,
        layout.cp_size,
        layout.cp_rank,
        layout.sp_rank * part,
        part,
        ragged.num_experts or MAX_EXPERTS,
        sum(1 << code for code in codes),
    )
    packed = reference.Packed(*fields)
    routes = None
    if experts is not None:
        routes = Routes(rows=packed.rows.transpose(0, 1), state=packed.state, num_experts=ragged.num_experts)
    return PackedBatch(
        tokens=packed.tokens,
        targets=packed.targets,
        loss_mask=packed.loss_mask,
        logprobs=packed.logprobs,
        advantages=packed.advantages,
        old_logprobs=None,
        positions=packed.positions,
        cu_seqlens=small["cu_seqlens"],
        cu_seqlens_padded=small["cu_seqlens_padded"],
        segment_ids=packed.segment_ids,
        routes=routes,
        num_samples=len(kept),
        kept=tuple(kept.tolist()),
        dropped=len(ragged.kept) - len(kept),
        padding=plan.padding,
        layout=layout,
        num_trained=None if ragged.trained is None else int(ragged.trained.sum()),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """On the host: table [4, S+1] int64 of `reference.pack_index`, total T, cu_seqlens [S+1] int32, padding among T."""

    table: NDArray[np.int64]
    total: int
    cu_seqlens: NDArray[np.int32]
    cu_seqlens_padded: NDArray[np.int32]
    padding: int

    @classmethod
    def of(cls, ragged: Ragged, kept: NDArray[np.int64], pad_to_multiple: int, layout: Layout) -> _Plan:
        """For the samples `kept` [S], numbers into those of `ragged`."""
        positions = ragged.kept[kept] - 1
        multiple = layout.sample_multiple
        padded = np.concatenate([[0], np.cumsum(-(-positions // multiple) * multiple)])
        length = int(padded[-1]) // layout.cp_size
        total = length + -length % layout.local_multiple(pad_to_multiple)
        if total * layout.cp_size >= 2**31:
            raise ValueError(f"expected fewer than 2^31 positions, got {total * layout.cp_size}: pack fewer samples")
        first_token = np.cumsum(ragged.lengths) - ragged.lengths
        rows = np.where(ragged.has_rows, ragged.lengths - 1, 0)
        first_row = np.where(ragged.has_rows, np.cumsum(rows) - rows, -1)
        columns = (first_token[kept], first_row[kept], positions)
        table = np.zeros((4, len(kept) + 1), np.int64)
        table[0] = padded // layout.cp_size
        for row, column in zip(table[1:], columns, strict=True):
            row[:-1] = column
        chunk, mine = np.diff(padded) // (2 * layout.cp_size), positions
        if layout.cp_size > 1:
            held = (layout.cp_rank, 2 * layout.cp_size - 1 - layout.cp_rank)
            mine = sum((positions - number * chunk).clip(0, chunk) for number in held)
        return cls(
            table=table,
            total=total,
            cu_seqlens=np.concatenate([[0], np.cumsum(positions)]).astype(np.int32),
            cu_seqlens_padded=padded.astype(np.int32),
            padding=total - int(np.sum(mine)),
        )


def _layer_table(layers: Sequence[int] | None, num_layers: int) -> NDArray[np.int64]:
    """[L'] places on the L axis."""
    if layers is None:
        return np.arange(num_layers)
    take = np.asarray(layers)
    if take.ndim != 1 or (take.size and take.dtype.kind not in "iu"):
        raise ValueError(f"expected layers as a list of places, got {list(take.shape)} of {take.dtype}")
    if num_layers and take.size and (take.min() < 0 or take.max() >= num_layers):
        raise ValueError(f"expected layers within the {num_layers} of the samples' rows, got {take.tolist()}")
    return take.astype(np.int64)


def _first_of_run(take: NDArray[np.int64]) -> int:
    """The first place if they all follow one another, as all layers and a stage's do; else -1."""
    return int(take[0]) if take.size and (np.diff(take) == 1).all() else -1


@torch.library.custom_op(
    "pacenote::pack",
    mutates_args=(),
    schema="(Tensor table, Tensor tokens, Tensor loss_mask, Tensor logprobs, Tensor advantages, Tensor? experts, "
    "Tensor? provenance, Tensor? fresh, Tensor layers, SymInt run, SymInt total, SymInt cp_size, SymInt cp_rank, "
    "SymInt first, SymInt routed, SymInt num_experts, SymInt codes) -> (" + ", ".join(["Tensor"] * 9) + ")",
)
def _pack(
    table: Tensor,
    tokens: Tensor,
    loss_mask: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    experts: Tensor | None,
    provenance: Tensor | None,
    fresh: Tensor | None,
    layers: Tensor,
    run: int,
    total: int,
    cp_size: int,
    cp_rank: int,
    first: int,
    routed: int,
    num_experts: int,
    codes: int,
) -> tuple[Tensor, ...]:
    """The fields of `reference.Packed`; `routed` positions from `first` on are those whose routes are written.

    table [4, S+1] int64 as `reference.pack_index` says; tokens, loss_mask, logprobs, advantages [N]; experts [R, L, K];
    provenance, fresh [R]; layers [L'] int64, of which `run` is the first if each is one more than the last, else -1.
    """
    sources = (tokens, loss_mask, logprobs, advantages, experts, provenance, fresh)
    if launch.takes_triton(tokens):
        from pacenote.kernels import pack_triton

        return pack_triton.pack(
            table, *sources, layers, run, total, cp_size, cp_rank, first, routed, num_experts=num_experts, codes=codes
        )
    index = reference.pack_index(table, total, cp_size, cp_rank)
    packed = reference.pack(
        index, *sources, layers=layers, routed=slice(first, first + routed), num_experts=num_experts, codes=codes
    )
    return tuple(getattr(packed, name) for name in packed.__slots__)


@_pack.register_fake
def _(
    table: Tensor,
    tokens: Tensor,
    loss_mask: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    experts: Tensor | None,
    provenance: Tensor | None,
    fresh: Tensor | None,
    layers: Tensor,
    run: int,
    total: int,
    cp_size: int,
    cp_rank: int,
    first: int,
    routed: int,
    num_experts: int,
    codes: int,
) -> tuple[Tensor, ...]:
    return empty(tokens, experts, layers, total, routed)


def empty(tokens: Tensor, experts: Tensor | None, layers: Tensor, total: int, routed: int) -> tuple[Tensor, ...]:
    """Unwritten fields of `reference.Packed` for experts [R, L, K] and layers [L'], T = `total` and T' = `routed`.

    They are on the device of the tokens [N].
    """
    kinds = (torch.int32, torch.int64, torch.bool, torch.float32, torch.float32, torch.int64, torch.int32)
    rows = (0, 0, 0) if experts is None else (len(layers), routed, experts.shape[2])
    return (
        *(tokens.new_empty(total, dtype=kind) for kind in kinds),
        tokens.new_empty(rows, dtype=torch.uint8 if experts is None else experts.dtype),
        tokens.new_empty(0 if experts is None else routed, dtype=torch.uint8),
    )
