# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels behind `replay_topk`, forward and backward. `reference.replay_topk` is the definition.

A program takes BT rows. Replayed rows read K logits; the whole row is read for a softmax over all experts, for rows
that are routed freely, and for counting. Everything is computed in float32, no float is added atomically: results
repeat.

Legend: T tokens, E experts, K top-k, G groups; BT rows of a program; BE, BK, BG the blocks that hold E, K, G, powers of
two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch, reference
from pacenote.kernels.route_order import (
    HIGHEST,
    SPAN,
    close_groups,
    exp,
    expert_of_lane,
    load_row,
    next_best,
    order_of,
    partition,
    rounded,
    score_of,
    scores,
    softmax_topk,
)  # fmt: skip
from pacenote.kernels.spec import FREE, PAD, RouterSpec

_REPLAYED, _FREED = tl.constexpr(reference.REPLAYED), tl.constexpr(reference.FREED)
_DUPLICATE, _OUT_OF_RANGE = tl.constexpr(reference.DUPLICATE), tl.constexpr(reference.OUT_OF_RANGE)
_PADDED, _FATES = tl.constexpr(reference.PADDED), tl.constexpr(5)
_FLIPPED, _OVERLAP, _MISSING = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_FREE, _PAD = tl.constexpr(FREE), tl.constexpr(PAD)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def _recorded(rows, state, t, stride, here, k, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Recorded ids int32 [BT, BK], the fate int32 [BT] of rows as `reference.row_fate`, whether they are missing [BT].

    Rows beyond the end are padding.
    """
    column = (k < K)[None, :]
    wide = tl.load(rows + t[:, None] * stride + k[None, :], mask=here[:, None] & column, other=0).to(tl.int64)
    missing = tl.max((column & (wide < 0)).to(tl.int32), axis=1)
    outside = tl.max((column & (wide >= E)).to(tl.int32), axis=1)
    ids = wide.to(tl.int32)  # what this wraps is missing or outside
    later = (k[:, None] < k[None, :]) & column
    same = (ids[:, :, None] == ids[:, None, :]) & later[None, :, :]
    repeats = tl.max(tl.max(same.to(tl.int32), axis=2), axis=1)
    fate = tl.where(repeats > 0, _DUPLICATE, _REPLAYED)
    fate = tl.where(outside > 0, _OUT_OF_RANGE, fate)
    fate = tl.where(missing > 0, _FREED, fate)
    missing = missing > 0
    if state is not None:
        asked = tl.load(state + t, mask=here, other=_PAD).to(tl.int32)
        fate = tl.where(asked == _FREE, _FREED, fate)
        fate = tl.where(asked == _PAD, _PADDED, fate)
        missing = missing & (asked != _FREE) & (asked != _PAD)
    return ids, tl.where(here, fate, _PADDED), missing


@triton.jit
def _among(ids, e, k, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """Which experts e [BE] are in each row of ids [BT, BK], int1 [BT, BE]."""
    among = tl.zeros([BT, BE], tl.int1)
    for n in range(K):
        expert = tl.sum(tl.where((k == n)[None, :], ids, 0), axis=1)
        among = among | (e[None, :] == expert[:, None])
    return among


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    logits,  # [T, E], rows `logits_stride` apart
    rows,  # [T, K], rows `rows_stride` apart
    state,  # [T] or None
    bias,  # [E] or None
    weights,  # [T, K]
    experts,  # [T, K]
    partial,  # [programs, 8] int32 or None
    margins,  # [programs, 1] float32, where there is `partial`
    loads,  # [programs, E] uint8 or None
    T,
    logits_stride,
    rows_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    OPEN: tl.constexpr,
    DEPTH: tl.constexpr,
    SCORE: tl.constexpr,
    LOW: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    here = t < T
    e, k = expert_of_lane(E, G, BE, BG), tl.arange(0, BK)
    column = (k < K)[None, :]
    spread = ((t % E)[:, None] * K + k[None, :]) % E
    t = t.to(tl.int64)
    ids, fate, missing = _recorded(rows, state, t, rows_stride, here, k, E, K, BT)
    live = fate != _PADDED
    own = live & (fate != _REPLAYED)
    chosen = tl.where(live[:, None], ids, spread)

    top = tl.zeros([BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    if SCORE == "softmax":
        top, total = partition(load_row(logits, t, logits_stride, live, e, E))

    overlap = tl.zeros([BT], tl.int32)
    margin = tl.zeros([BT], tl.float32)
    load = tl.zeros([BE], tl.int32)
    ordered = live if partial is not None else own
    if tl.max(ordered.to(tl.int32), axis=0) > 0:
        x = load_row(logits, t, logits_stride, live, e, E)  # after a softmax the row is still in the cache
        if not BY_LOGITS:
            x = scores(x, top, total, logits, SCORE, LOW)
        if bias is not None:
            x += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        order = order_of(x, e[None, :], E)
        any_group = order
        if G > 1:
            order = close_groups(order, e, E, G, OPEN, DEPTH, BT, BE, BG)
        best = tl.full([BT], HIGHEST, tl.int64)
        for n in range(K):
            best = next_best(order, best, 1)
            expert = SPAN - 1 - (best & (SPAN - 1)).to(tl.int32)
            chosen = tl.where(own[:, None] & (k == n)[None, :], expert[:, None], chosen)
        if partial is not None:
            native = order >= best[:, None]
            recorded = _among(ids, e, k, K, BT, BE)
            overlap = tl.sum((native & recorded).to(tl.int32), axis=1)
            worst = tl.min(tl.where(recorded, any_group, HIGHEST), axis=1)
            margin = score_of(best) - score_of(worst)
            sent = live[:, None] & tl.where(own[:, None], native, recorded)
            load = tl.sum(sent.to(tl.int32), axis=0)

    w = tl.load(logits + t[:, None] * logits_stride + chosen, mask=live[:, None] & column, other=0.0).to(tl.float32)
    w = scores(w, top, total, logits, SCORE, LOW)
    if SCORE == "softmax_topk":
        w = rounded(softmax_topk(w, column), logits, LOW)
    if RENORMALIZE:
        share = rounded(tl.sum(tl.where(column, w, 0.0), axis=1), logits, LOW)
        w = rounded(tl.div_rn(w, rounded(share + EPS, logits, LOW)[:, None]), logits, LOW)
    w = tl.where(live[:, None], rounded(w * SCALE, logits, LOW), 0.0)
    place = t[:, None] * K + k[None, :]
    tl.store(weights + place, w.to(weights.dtype.element_ty), mask=here[:, None] & column)
    tl.store(experts + place, chosen.to(tl.int64), mask=here[:, None] & column)

    if partial is not None:
        replayed = here & (fate == _REPLAYED)
        c = tl.arange(0, 8)[None, :]
        count = (here[:, None] & (c < _FATES) & (fate[:, None] == c)).to(tl.int32)
        flipped = replayed & (overlap < K)
        count = tl.where(c == _FLIPPED, flipped.to(tl.int32)[:, None], count)
        count = tl.where((c == _OVERLAP) & replayed[:, None], overlap[:, None], count)
        count = tl.where(c == _MISSING, missing.to(tl.int32)[:, None], count)
        tl.store(partial + tl.program_id(0) * 8 + tl.arange(0, 8), tl.sum(count, axis=0))
        margin = tl.where(flipped & (margin > 0) & (margin < float("inf")), margin, 0.0)  # a NaN is neither
        tl.store(margins + tl.program_id(0), tl.sum(margin, axis=0))
    if loads is not None:
        # A histogram a program, added up afterwards: both masks are there already, a row sends an expert at most one
        # pair, so a byte holds it, and nobody waits for another's atomics on the few addresses of E counters.
        tl.store(loads + tl.program_id(0).to(tl.int64) * E + e, load.to(tl.uint8), mask=e < E)


@triton.jit
def _backward_kernel(
    logits,  # [T, E], rows `logits_stride` apart
    experts,  # [T, K]
    state,  # [T] or None
    grad,  # [T, K]
    dlogits,  # [T, E]
    T,
    logits_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    here = t < T
    t = t.to(tl.int64)
    e, k = tl.arange(0, BE), tl.arange(0, BK)
    live = here
    if state is not None:
        live = here & (tl.load(state + t, mask=here, other=_PAD) != _PAD)
    mask = live[:, None] & (k < K)[None, :]
    ids = tl.load(experts + t[:, None] * K + k[None, :], mask=mask, other=0).to(tl.int32)
    slope = tl.load(grad + t[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32) * SCALE
    score = tl.load(logits + t[:, None] * logits_stride + ids, mask=mask, other=0.0).to(tl.float32)

    top = tl.zeros([BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    dense = tl.zeros([BT, BE], tl.float32)
    if SCORE == "softmax":
        x = load_row(logits, t, logits_stride, live, e, E)
        top, total = partition(x)
        dense = tl.div_rn(exp(x - top[:, None]), total[:, None])
    score = scores(score, top, total, logits, SCORE, False)
    if SCORE == "softmax_topk":
        score = softmax_topk(score, mask)

    # From the gradient of the weights to that of the scores, then of the logits.
    score = tl.where(mask, score, 0.0)
    if RENORMALIZE:
        share = tl.sum(score, axis=1) + EPS
        mean = tl.div_rn(tl.sum(slope * score, axis=1), share)
        slope = tl.div_rn(slope - mean[:, None], share[:, None])
    if SCORE == "sigmoid":
        slope = slope * score * (1.0 - score)
    else:
        dot = tl.sum(tl.where(mask, slope * score, 0.0), axis=1)
        slope = slope * score
        if SCORE == "softmax":
            dense = -dense * dot[:, None]
        else:
            slope -= score * dot[:, None]
    for n in range(K):
        expert = tl.sum(tl.where((k == n)[None, :], ids, 0), axis=1)
        value = tl.sum(tl.where((k == n)[None, :], slope, 0.0), axis=1)
        dense += tl.where(e[None, :] == expert[:, None], value[:, None], 0.0)
    dense = tl.where(live[:, None], dense, 0.0)
    into = dlogits + t[:, None] * E + e[None, :]
    tl.store(into, dense.to(dlogits.dtype.element_ty), mask=here[:, None] & (e < E)[None, :])


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor,
    rows: Tensor,
    state: Tensor | None,
    bias: Tensor | None,
    spec: RouterSpec,
    *,
    count: bool,
    load: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch, and small ones that add up what its programs counted, if that is asked for.

    Floor, with d bytes a logit, b an id and w a weight: T (L + K b + K w + 8 K) bytes; L is min(32 K, E d), sectors of
    32 bytes, where only chosen logits are read, else E d: see the head of this file.

    Args:
        logits: [T, E] bfloat16, float16 or float32, rows at any stride.
        rows: [T, K] uint8, uint16, int32 or int64, rows at any stride.
        state: [T] uint8 or None.
        bias: [E] or None.
        spec: the router's arithmetic.
        count: whether to count, and to measure the margin.
        load: whether to count tokens per expert as well.

    Returns:
        weights [T, K] in the spec's weight dtype, experts [T, K] int64, counts [8] int64, margin [1] float64, load [E]
        int64; the last three [0] if not asked for.
    """
    (tokens, experts), k = logits.shape, rows.shape[1]
    weights = logits.new_empty((tokens, k), dtype=reference.weight_dtype(logits.dtype, spec))
    chosen = logits.new_empty((tokens, k), dtype=torch.int64)
    bk, bg = launch.next_power_of_2(k), launch.next_power_of_2(spec.groups)
    be = bg * launch.next_power_of_2(experts // spec.groups)
    blocks = launch.row_blocks(max(be, bk * bk))
    programs = -(-tokens // blocks.rows)
    partial = logits.new_empty((programs, len(reference.COUNTERS)), dtype=torch.int32) if count else None
    margins = logits.new_empty((programs, 1), dtype=torch.float32) if count else None
    loads = logits.new_empty((programs, experts), dtype=torch.uint8) if count and load else None
    logits, rows = _unit_columns(logits), _unit_columns(rows)
    if tokens:
        with launch.on_device_of(logits):
            _forward_kernel[(programs,)](
                logits,
                rows,
                None if state is None else state.contiguous(),
                None if bias is None else bias.contiguous(),
                weights,
                chosen,
                partial,
                margins,
                loads,
                tokens,
                logits.stride(0),
                rows.stride(0),
                E=experts,
                K=k,
                G=spec.groups,
                OPEN=spec.topk_groups,
                DEPTH=reference.group_depth(k, experts, spec),
                LOW=spec.score_dtype == "logits",
                BY_LOGITS=reference.selects_by_logits(spec, bias),
                BT=blocks.rows,
                BE=be,
                BK=bk,
                BG=bg,
                num_warps=blocks.warps,
                **_arithmetic(spec),
            )
    return (
        weights,
        chosen,
        _total(partial, torch.int64, logits),
        _total(margins, torch.float64, logits),
        _total(loads, torch.int64, logits),
    )


def backward(logits: Tensor, experts: Tensor, state: Tensor | None, grad: Tensor, spec: RouterSpec) -> Tensor:
    """One launch; every row of the gradient is written once, zeros included.

    Floor, with d bytes a logit and w a weight: T (E d written + L + K w + 8 K) bytes; L is E d for a softmax over all
    experts, else min(32 K, E d).
    Scores are recomputed in float32, also where the forward pass rounds them.

    Args:
        logits: [T, E] bfloat16, float16 or float32, rows at any stride.
        experts: [T, K] int64, the forward pass's result.
        state: [T] uint8 or None.
        grad: [T, K] floating, of the weights.
        spec: the router's arithmetic.

    Returns:
        gradient [T, E] of the logits, in their dtype; 0 in padding rows.
    """
    (tokens, num), k = logits.shape, experts.shape[1]
    dlogits = logits.new_empty((tokens, num))
    if not tokens:
        return dlogits
    be, bk = launch.next_power_of_2(num), launch.next_power_of_2(k)
    blocks = launch.row_blocks(be)
    logits = _unit_columns(logits)
    with launch.on_device_of(logits):
        _backward_kernel[(-(-tokens // blocks.rows),)](
            logits,
            experts.contiguous(),
            None if state is None else state.contiguous(),
            grad.contiguous(),
            dlogits,
            tokens,
            logits.stride(0),
            E=num,
            K=k,
            BT=blocks.rows,
            BE=be,
            BK=bk,
            num_warps=blocks.warps,
            **_arithmetic(spec),
        )
    return dlogits


def _total(partial: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """[any] sums over the programs of a `partial` [programs, any], in their order; [0] if there is none."""
    return like.new_empty(0, dtype=dtype) if partial is None else partial.sum(dim=0, dtype=dtype)


def _unit_columns(x: Tensor) -> Tensor:
    """[T, any] with neighbouring columns: rows may be anywhere, as in a layer of many; a transposed view is copied."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _arithmetic(spec: RouterSpec) -> dict[str, Any]:
    """What both kernels need of a spec; constants of the compiled kernel, since a model has one."""
    return {"SCORE": spec.score, "RENORMALIZE": spec.renormalize, "EPS": spec.eps, "SCALE": spec.scale}
