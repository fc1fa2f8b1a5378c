# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels behind `logprob_ops`: a row of logits read once each way.

A program reads a row in blocks and keeps in every lane the largest logit so far, the sum of exp beside it and the first
moment; lanes meet once, at the end. A row's bits depend on the row alone. Nothing is added atomically.

Legend: C rows, V vocabulary or a part of it, P parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch

BLOCK, SLOPE_BLOCK, WARPS = (256, 256, 4) if launch.INTERPRETED else (4096, 2048, 8)
"""Logits of a row that a program works on at once, forward and backward; fixed: another number is another rounding."""


@triton.jit
def scale(logit, bias, heat, v, mask, BIAS: tl.constexpr, HEAT: tl.constexpr):
    """(logit + bias[v]) / heat in float32, rounded as torch does."""
    z = logit.to(tl.float32)
    if BIAS:
        # What is not there is -inf whatever is added; the interpreter takes a scalar 0 for no value at all.
        z += tl.load(bias + v, mask=mask, other=1.0).to(tl.float32)
    if HEAT:
        z = tl.div_rn(z, heat + tl.zeros_like(z))
    return z


@triton.jit
def base(top):
    """What is taken from logits before exp: the largest one, or 0 where all are -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def step(top, shift):
    """From an older largest logit to a newer one; 0 where there was none, whose sums are 0 as well."""
    return tl.where(top == -float("inf"), 0.0, top - shift)


@triton.jit
def slope_of(z, hit, state, top, logsum, entropy, dlogprob, dentropy, ENTROPY: tl.constexpr):
    """The gradient of scaled logits; NaN of a wrong token, exactly 0 of an ignored one."""
    logp = (z - top) - logsum
    p = tl.exp(logp)
    weight = dlogprob + tl.zeros_like(z)
    if ENTROPY:
        weight += dentropy * (logp + entropy)
    slope = tl.where(p == 0, 0.0, -p * weight) + tl.where(hit, dlogprob, 0.0)
    return tl.where(state == 0, 0.0, tl.where(state == 1, slope, float("nan")))


@triton.jit
def _stats_kernel(
    logits,  # [C, V]
    bias,  # [V] or None
    heat,  # [C], 0-d or None
    targets,  # [C] int64
    out,  # [C, 4]
    V,
    stride,  # of the rows of logits
    TOKEN_HEAT: tl.constexpr,  # heat is [C]
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    degrees = 1.0
    if heat is not None:
        degrees = tl.load(heat + row * TOKEN_HEAT)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf"))
        z = scale(logit, bias, degrees, v, v < V, bias is not None, heat is not None)
        new = tl.maximum(top, z)
        shift = base(new)
        old, away = step(top, shift), z - shift
        e, kept = tl.exp(away), tl.exp(old)
        moment = (moment + old * total) * kept + tl.where(e == 0, 0.0, e * away)
        total = total * kept + e
        top = new
    best = tl.max(top, axis=0)
    old = step(top, base(best))
    kept = tl.exp(old)
    target = tl.load(targets + row)
    here = (target >= 0) & (target < V)
    logit = tl.load(logits + row * stride + target, mask=here, other=-float("inf"))
    chosen = scale(logit, bias, degrees, target, here, bias is not None, heat is not None)
    tl.store(out + row * 4, best)
    tl.store(out + row * 4 + 1, tl.sum(total * kept, axis=0))
    tl.store(out + row * 4 + 2, tl.sum((moment + old * total) * kept, axis=0))
    tl.store(out + row * 4 + 3, chosen)


@triton.jit(do_not_specialize=["C", "parts"])
def _score_kernel(
    stats,  # [P, C, 4]
    state,  # [C] uint8 or None
    out,  # [C, 4]
    C,
    parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < C
    at = stats + row.to(tl.int64) * 4
    top = tl.load(at, mask=inside, other=0.0)
    total = tl.load(at + 1, mask=inside, other=1.0)
    moment = tl.load(at + 2, mask=inside, other=0.0)
    chosen = tl.load(at + 3, mask=inside, other=0.0)
    for _ in range(1, parts):
        at += C.to(tl.int64) * 4
        other = tl.load(at, mask=inside, other=0.0)
        new = tl.maximum(top, other)
        mine, theirs = step(top, base(new)), step(other, base(new))
        other_total = tl.load(at + 1, mask=inside, other=0.0)
        moment = (moment + mine * total) * tl.exp(mine)
        moment += (tl.load(at + 2, mask=inside, other=0.0) + theirs * other_total) * tl.exp(theirs)
        total = total * tl.exp(mine) + other_total * tl.exp(theirs)
        chosen = tl.maximum(chosen, tl.load(at + 3, mask=inside, other=0.0))
        top = new
    if state is None:
        first, second, third, fourth = top, total, moment, chosen
    else:
        logsum = tl.log(total)
        first, second, third, fourth = (chosen - top) - logsum, logsum - moment / total, top, logsum
        known = tl.load(state + row, mask=inside, other=0)
        wrong = tl.where(known == 1, 0.0, float("nan"))
        first, second = tl.where(known == 0, 0.0, first + wrong), tl.where(known == 0, 0.0, second + wrong)
        third, fourth = tl.where(known == 0, 0.0, third + wrong), tl.where(known == 0, 0.0, fourth + wrong)
    to = out + row.to(tl.int64) * 4
    tl.store(to, first, mask=inside)
    tl.store(to + 1, second, mask=inside)
    tl.store(to + 2, third, mask=inside)
    tl.store(to + 3, fourth, mask=inside)


@triton.jit
def _slope_kernel(
    logits,  # [C, V]
    bias,  # [V] or None
    heat,  # [C], 0-d or None
    targets,  # [C] int64
    state,  # [C] uint8
    score,  # [C, 4]
    dlogprob,  # [C]
    dentropy,  # [C] or None
    out,  # [C, V]; may be the logits
    V,
    stride,  # of the rows of logits
    out_stride,
    TOKEN_HEAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    degrees = 1.0
    if heat is not None:
        degrees = tl.load(heat + row * TOKEN_HEAT)
    logit = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf"))
    z = scale(logit, bias, degrees, v, v < V, bias is not None, heat is not None)
    slope_entropy = 0.0
    if dentropy is not None:
        slope_entropy = tl.load(dentropy + row).to(tl.float32)
    slope = slope_of(
        z,
        tl.load(targets + row) == v,
        tl.load(state + row),
        tl.load(score + row * 4 + 2),
        tl.load(score + row * 4 + 3),
        tl.load(score + row * 4 + 1),
        tl.load(dlogprob + row).to(tl.float32),
        slope_entropy,
        dentropy is not None,
    )
    if heat is not None:
        slope = tl.div_rn(slope, degrees + tl.zeros_like(slope))
    tl.store(out + row * out_stride + v, slope.to(out.dtype.element_ty), mask=v < V)


def stats(logits: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    """One launch, a program a row.

    Args:
        logits: [C, V] bfloat16, float16 or float32.
        bias: [V] floating, or None.
        heat: [C] or 0-d float32, or None for 1.
        targets: [C] int64; one outside [0, V) is in another part.

    Returns:
        [C, 4] float32, as `reference.logprob_stats`.
    """
    logits = rowwise(logits)
    out = logits.new_empty((len(logits), 4), dtype=torch.float32)
    if not len(logits):
        return out
    with launch.on_device_of(logits):
        _stats_kernel[(len(logits),)](
            logits,
            None if bias is None else bias.contiguous(),
            heat,
            targets.contiguous(),
            out,
            logits.shape[1],
            logits.stride(0),
            TOKEN_HEAT=int(heat is not None and heat.ndim > 0),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


def score(parts: Tensor, state: Tensor | None) -> Tensor:
    """One launch.

    Args:
        parts: [P, C, 4] float32, added up in their order.
        state: [C] uint8, or None.

    Returns:
        [C, 4] float32: `reference.logprob_score` of their sum; without a state `reference.logprob_fold`.
    """
    count, rows, _ = parts.shape
    out = parts.new_empty((rows, 4))
    if not rows:
        return out
    block = 1024 if launch.INTERPRETED else 128
    with launch.on_device_of(parts):
        _score_kernel[(triton.cdiv(rows, block),)](
            parts.contiguous(),
            None if state is None else state.contiguous(),
            out,
            rows,
            count,
            BLOCK=block,
            num_warps=4,
        )
    return out


def slope(
    logits: Tensor,
    bias: Tensor | None,
    heat: Tensor | None,
    targets: Tensor,
    state: Tensor,
    score: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    """One launch, a program a block of a row; arguments as `logprob_ops.slope`: logits and `out` [C, V]."""
    if not out.numel():
        return
    logits = rowwise(logits)
    with launch.on_device_of(logits):
        _slope_kernel[(len(logits) * triton.cdiv(logits.shape[1], SLOPE_BLOCK),)](
            logits,
            None if bias is None else bias.contiguous(),
            heat,
            targets.contiguous(),
            state.contiguous(),
            score.contiguous(),
            dlogprob.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            out,
            logits.shape[1],
            logits.stride(0),
            out.stride(0),
            TOKEN_HEAT=int(heat is not None and heat.ndim > 0),
            BLOCK=SLOPE_BLOCK,
            num_warps=WARPS,
        )


def rowwise(x: Tensor) -> Tensor:
    """[C, V] with unit stride along V; a copy if it has another."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
