"""Rows of a whole batch -> the part that one rank's routers see, layer-major.

`kernels.pack` does this for packed samples while it packs them. Here it is for batches that are not: [B, S] sequences,
whose tokens megatron-core's routers see as (sequence, batch), a rank's part of the sequence at a time; and packed ones
whose rows exist already. One index map serves rows, states, inputs and labels, so that they cannot disagree.

Legend: B sequences, S positions, T positions of a packed batch, T' those that this rank's routers see, L MoE layers of
the rows, L' those of this rank, K experts a token, N tokens of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pacenote.kernels.layout import Layout
from pacenote.kernels.pack import Routes
from pacenote.kernels.spec import CACHED, DECODE, FREE, PAD, PREFILL, REPLAY
from pacenote.replay.errors import ScopeError
from pacenote.replay.record import RoutingRecord


def places(moe_layers: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    """Where `layers` stand among `moe_layers`, the layers of the rows; both global ids from 0.

    Rows leave dense layers out, so the place of a layer is not its number; rows of multi-token-prediction layers,
    numbered behind the others, are left alone.

    Raises:
        ScopeError: ids that do not ascend, or a layer that the rows lack.
    """
    if list(moe_layers) != sorted(set(moe_layers)):
        raise ScopeError(f"expected ascending global ids of the rows' layers, got {list(moe_layers)}")
    missing = sorted(set(layers) - set(moe_layers))
    if missing:
        raise ScopeError(
            f"expected rows of layers {list(layers)}, got rows of {list(moe_layers)}: {missing} are missing"
        )
    at = {layer: place for place, layer in enumerate(moe_layers)}
    return tuple(at[layer] for layer in layers)


def zigzag(length: int, layout: Layout) -> Tensor:
    """Positions [S / cp_size] int64 of a sequence of `length` that a context-parallel rank holds, in its order.

    The chunk cp_rank of 2 cp_size, and the one as far from the end: causal attention balances.

    Raises:
        ScopeError: a length that does not divide.
    """
    if layout.cp_size == 1:
        return torch.arange(length)
    if length % (2 * layout.cp_size):
        raise ScopeError(f"expected a length that divides by 2 x {layout.cp_size} context-parallel ranks, got {length}")
    chunks = torch.arange(length).view(2 * layout.cp_size, -1)
    return torch.cat([chunks[layout.cp_rank], chunks[2 * layout.cp_size - 1 - layout.cp_rank]])


def sbhd_index(batch: int, length: int, layout: Layout) -> Tensor:
    """[T'] int64: which of the B x S tokens, counted through [B, S], stands at each place of this rank's routers.

    They see (sequence, batch) flattened, of a context-parallel rank's positions, and a sequence-parallel rank's run
    of those.

    Raises:
        ScopeError: a length that does not divide.
    """
    held = zigzag(length, layout)
    if len(held) % layout.sp_size:
        raise ScopeError(f"expected {len(held)} positions to divide by {layout.sp_size} sequence-parallel ranks")
    return _run(held[:, None] + length * torch.arange(batch), layout)


def thd_index(cu_seqlens_padded: Sequence[int], layout: Layout) -> Tensor:
    """[T'] int64: which position of a packed batch [T] stands at each place of this rank's routers.

    Args:
        cu_seqlens_padded: [S+1], where each sample starts, padding included.
        layout: the rank's.

    Raises:
        ScopeError: a sample, or their sum, that does not divide.
    """
    bounds = [int(bound) for bound in cu_seqlens_padded]
    parts = [start + zigzag(end - start, layout) for start, end in pairwise(bounds)]
    held = torch.cat(parts) if parts else torch.arange(0)
    if len(held) % layout.sp_size:
        raise ScopeError(f"expected {len(held)} positions to divide by {layout.sp_size} sequence-parallel ranks")
    return _run(held, layout)


def _run(tokens: Tensor, layout: Layout) -> Tensor:
    """This sequence-parallel rank's run of tokens of any shape, flattened."""
    return tokens.reshape(layout.sp_size, -1)[layout.sp_rank]


def align(
    rows: Tensor,
    layout: Layout,
    *,
    layers: Sequence[int],
    state: Tensor | None = None,
    cu_seqlens_padded: Sequence[int] | None = None,
    num_experts: int | None = None,
) -> Routes:
    """The routes of one rank, from rows of the whole batch.

    Args:
        rows: [B, S, L, K] of sequences, or [T, L, K] of a packed batch (one sample where no bounds are given).
        layout: the rank's part: `MegatronReplay.layout`.
        layers: places on the L axis, in this order: `MegatronReplay.places`.
        state: [B, S] or [T] uint8; None: replay every row.
        cu_seqlens_padded: [S+1] bounds of a packed batch's samples, padding included.
        num_experts: E, kept with the routes.

    Returns:
        rows [T', L', K] of the same dtype, layer-major, and state [T'].

    Raises:
        ScopeError: shapes that do not fit each other, or lengths that do not divide.
    """
    if rows.ndim not in (3, 4) or (rows.ndim == 4 and cu_seqlens_padded is not None):
        raise ScopeError(f"expected rows [B, S, L, K], or [T, L, K] with or without bounds, got {list(rows.shape)}")
    lead = tuple(rows.shape[:-2])
    if state is not None and (tuple(state.shape) != lead or state.dtype != torch.uint8):
        raise ScopeError(f"expected state {list(lead)} uint8, got {list(state.shape)} {state.dtype}")
    if rows.ndim == 4:
        index = sbhd_index(lead[0], lead[1], layout)
    else:
        bounds = (0, lead[0]) if cu_seqlens_padded is None else cu_seqlens_padded
        if int(bounds[-1]) != lead[0]:
            raise ScopeError(f"expected bounds up to the {lead[0]} positions of the rows, got {int(bounds[-1])}")
        index = thd_index(bounds, layout)
    index = index.to(rows.device)
    take = torch.as_tensor(list(layers), dtype=torch.int64, device=rows.device)
    # One gather makes the narrow, layer-major array that routers read: no copy a layer afterwards.
    major = rows.flatten(0, -3)[index[None, :], take[:, None]]
    flat = torch.full((len(index),), REPLAY, dtype=torch.uint8, device=rows.device)
    return Routes(
        rows=major.transpose(0, 1),
        state=flat if state is None else state.reshape(-1)[index],
        num_experts=num_experts,
    )


def align_records(
    records: Sequence[RoutingRecord], length: int, layout: Layout, *, layers: Sequence[int], first: int = 0
) -> Routes:
    """The routes of one rank, from the records of B sequences of up to `length` input positions, padded at their end.

    A record of N tokens has N - 1 rows, row i for token i as an input; what lies behind them is padding. Rows that the
    engine did not write, or that were recomputed, are routed freely.

    Args:
        records: one a sequence, of one model.
        length: S.
        layout: the rank's part.
        layers: global ids of this rank's layers: `MegatronReplay.layers`.
        first: position of the first token in its sequence (0; more for batches padded at their start).

    Returns:
        rows [T', L', K] in the records' dtype, layer-major, and state [T'].

    Raises:
        ScopeError: no records, records of different models, one that is too long, or a layer that they lack.
    """
    models = {(record.layers, record.num_experts, record.experts.shape[2], record.experts.dtype) for record in records}
    if len(models) != 1:
        raise ScopeError(f"expected records of one model, got {len(models)}: {sorted(map(str, models))}")
    [(moe_layers, num_experts, top_k, dtype)] = models
    rows = np.zeros((len(records), length, len(moe_layers), top_k), dtype)
    state = np.full((len(records), length), PAD, np.uint8)
    for number, record in enumerate(records):
        end = first + len(record.experts)
        if end > length:
            raise ScopeError(f"expected at most {length} positions, record {number} ends at {end}: truncate the record")
        rows[number, first:end] = record.experts
        known = np.isin(record.provenance, (PREFILL, DECODE, CACHED))
        state[number, first:end] = np.where(known, REPLAY, FREE)
    return align(
        torch.from_numpy(rows),
        layout,
        layers=places(moe_layers, layers),
        state=torch.from_numpy(state),
        num_experts=num_experts,
    )
