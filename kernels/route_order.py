# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Scores of a router and their total order, for the Triton kernels of `route_triton`.

The router's own choice needs a total order of experts: score descending (NaN first), then index ascending. `order_of`
folds both into one int64 an expert, all different, so that a top-k is K maxima, each below the last, and a rank is a
count; there is no other tie-break. Lanes run over experts group by group, each group padded to a power of two, so that
groups of any size become an axis.

Legend: E experts, K top-k, G groups; BT rows of a program; BE, BK, BG the blocks that hold E, K, G, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacenote.kernels.spec import MAX_EXPERTS

BITS, SPAN = tl.constexpr(MAX_EXPERTS.bit_length() - 1), tl.constexpr(MAX_EXPERTS)
"""Room for the index below a score in an order."""
LOWEST, HIGHEST = tl.constexpr(-(2**62)), tl.constexpr(2**62)
"""Below and above every order."""


# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """e^x for x <= 0. tl.exp is 2^(x log2 e), whose relative error grows with |x|: whole powers of 2 are taken out."""
    x = tl.where(x < -104.0, -104.0, x)  # e^-104 is 0 in float32; -inf would become inf - inf below
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts; n times the first is exact
    return tl.exp2(n) * tl.exp(r)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), with exponents at or below 0 only."""
    z = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0, 1.0, z), 1.0 + z)


@triton.jit
def rounded(x, like, LOW: tl.constexpr):
    """x as the dtype behind the pointer `like` would hold it, if scores are computed in that."""
    return x.to(like.dtype.element_ty).to(tl.float32) if LOW else x


@triton.jit
def partition(x):
    """Largest logit [BT] and sum of e^(x - largest) [BT] of rows [BT, BE]; a NaN makes the sum NaN, not the maximum."""
    top = tl.max(tl.where(x == x, x, float("-inf")), axis=1)
    return top, tl.sum(exp(x - top[:, None]), axis=1)


@triton.jit
def scores(x, top, total, logits, SCORE: tl.constexpr, LOW: tl.constexpr):
    """Scores of logits x [BT, any], before renormalisation; softmax_topk scores by the logits."""
    if SCORE == "sigmoid":
        return rounded(sigmoid(x), logits, LOW)
    elif SCORE == "softmax":
        return rounded(tl.div_rn(exp(x - top[:, None]), total[:, None]), logits, LOW)
    else:
        return x


@triton.jit
def softmax_topk(x, column):
    """Softmax [BT, BK] over the K columns."""
    top, total = partition(tl.where(column, x, float("-inf")))
    return tl.where(column, tl.div_rn(exp(x - top[:, None]), total[:, None]), 0.0)


# --- order -----------------------------------------------------------------------------------------------------------


@triton.jit
def order_of(x, index, size):
    """int64 [any]: greater for a better score, then for a lower index; LOWEST where the index is not below `size`."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats as integers that sort alike
    key = tl.where(x == 0.0, 0, key)  # -0 equals 0
    key = tl.where(x != x, 0x7FFFFFFF, key)
    return tl.where(index < size, key.to(tl.int64) * SPAN + (SPAN - 1 - index), LOWEST)


@triton.jit
def score_of(order):
    """The score behind an order."""
    key = (order >> BITS).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def next_best(order, best, axis: tl.constexpr):
    """The greatest order along an axis that is below `best`."""
    return tl.max(tl.where(order < tl.expand_dims(best, axis), order, LOWEST), axis=axis)


@triton.jit
def expert_of_lane(E: tl.constexpr, G: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr):
    """The expert [BE] of each lane; E where there is none."""
    lane = tl.arange(0, BE)
    group, place = lane // (BE // BG), lane % (BE // BG)
    return tl.where((group < G) & (place < E // G), group * (E // G) + place, E)


@triton.jit
def load_row(logits, t, stride, live, e, E: tl.constexpr):
    """Logits [BT, BE]; -inf in lanes without an expert and in rows that are not live."""
    mask = live[:, None] & (e < E)[None, :]
    return tl.load(logits + t[:, None] * stride + e[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def close_groups(
    order,
    e,
    E: tl.constexpr,
    G: tl.constexpr,
    OPEN: tl.constexpr,
    DEPTH: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BG: tl.constexpr,
):
    """The order [BT, BE], outside the best OPEN groups that of -inf; a group scores the sum of its best DEPTH."""
    grouped = tl.reshape(order, [BT, BG, BE // BG])
    best = tl.full([BT, BG], HIGHEST, tl.int64)
    score = tl.zeros([BT, BG], tl.float32)
    for _ in range(DEPTH):  # best first: the order of a sum decides its rounding
        best = next_best(grouped, best, 2)
        score += score_of(best)
    g = tl.arange(0, BG)
    standing = order_of(score, g[None, :], G)
    last = tl.full([BT], HIGHEST, tl.int64)
    for _ in range(OPEN):
        last = next_best(standing, last, 1)
    opened = tl.broadcast_to((standing >= last[:, None])[:, :, None], [BT, BG, BE // BG])
    closed = order_of(tl.full([BT, BE], float("-inf"), tl.float32), e[None, :], E)
    return tl.where(tl.reshape(opened, [BT, BE]), order, closed)
