"""Broken kernels of routing replay, each with the check of `route_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import route_order, route_triton
from tests.kernels.mutants import Mutant
from tests.kernels.route_checks import CHECKS

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (route_order, route_triton)

MUTANTS = (
    Mutant("tail rows are stored", "    here = t < T\n", "    here = t < T + BT\n", "sizes"),
    Mutant("last row is lost", "    here = t < T\n", "    here = t < T - 1\n", "recorded_order"),
    Mutant(
        "tail experts are loaded", "live[:, None] & (e < E)[None, :]", "live[:, None] & (e >= 0)[None, :]", "groups"
    ),
    Mutant("tail lanes hold 0", 'mask=mask, other=float("-inf"))', "mask=mask, other=0.0)", "qwen3-plain-float32"),
    Mutant(
        "ties go to the highest index",
        "(SPAN - 1 - index), LOWEST",
        "index, LOWEST",
        "ties",
        ("SPAN - 1 - (best & (SPAN - 1)).to(tl.int32)", "(best & (SPAN - 1)).to(tl.int32)"),
    ),
    Mutant("-0 is below 0", "tl.where(x == 0.0, 0, key)", "tl.where(x == 0.0, key, key)", "order_of_logits"),
    Mutant(
        "NaN is an ordinary number",
        "tl.where(x != x, 0x7FFFFFFF, key)",
        "tl.where(x != x, -1, key)",
        "infinities_and_nan",
    ),
    Mutant("negative scores sort backwards", "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "bits", "order_of_logits"),
    Mutant("groups stay open", "tl.where(tl.reshape(opened, [BT, BE]), order, closed)", "order", "groups"),
    Mutant("one group too many is open", "for _ in range(OPEN):", "for _ in range(OPEN + 1):", "groups"),
    Mutant("a group's score is its best alone", "for _ in range(DEPTH):", "for _ in range(1):", "groups"),
    Mutant("scores select where logits do", "if not BY_LOGITS:", "if True:", "order_of_logits"),
    Mutant("the bias is left out", "x += tl.load(bias", "x += 0 * tl.load(bias", "bias_selects_only"),
    Mutant("rows lie close together", "rows + t[:, None] * stride", "rows + t[:, None] * K", "layer_views"),
    Mutant("logits lie close together", "logits + t[:, None] * stride", "logits + t[:, None] * E", "layer_views"),
    Mutant("row offsets are int32", "    t = t.to(tl.int64)\n", "", "far_rows"),
    Mutant(
        "ids keep 32 bits",
        "mask=here[:, None] & column, other=0).to(tl.int64)",
        "mask=here[:, None] & column, other=0).to(tl.int32)",
        "id_types",
    ),
    Mutant("E itself is an expert", "(wide >= E)", "(wide > E)", "invalid_rows"),
    Mutant(
        "a repeat beside is all that is seen",
        "(k[:, None] < k[None, :])",
        "(k[:, None] + 1 == k[None, :])",
        "invalid_rows",
    ),
    Mutant(
        "missing is out of range",
        "tl.where(missing > 0, _FREED, fate)",
        "tl.where(missing > 0, _OUT_OF_RANGE, fate)",
        "invalid_rows",
    ),
    Mutant("free rows are replayed", "tl.where(asked == _FREE, _FREED, fate)", "fate", "kimi-k2-float32"),
    Mutant(
        "padding has one place",
        "((t % E)[:, None] * K + k[None, :]) % E",
        "k[None, :] + 0 * t[:, None]",
        "padding",
    ),
    Mutant(
        "padding has weight",
        "w = tl.where(live[:, None], rounded(w * SCALE, logits, LOW), 0.0)",
        "w = rounded(w * SCALE, logits, LOW)",
        "padding",
    ),
    Mutant("padding has a gradient", "dense = tl.where(live[:, None], dense, 0.0)", "dense = dense", "padding"),
    Mutant("eps is left out", "rounded(share + EPS, logits, LOW)", "share", "renormalisation"),
    Mutant("no rounding to the scores' dtype", "if LOW else x", "if False else x", "narrow_scores"),
    Mutant(
        "empty columns are renormalised",
        "rounded(tl.sum(tl.where(column, w, 0.0), axis=1), logits, LOW)",
        "rounded(tl.sum(w, axis=1), logits, LOW)",
        "minimax-float32",
    ),
    Mutant("rank is off by one", "native = order >= best", "native = order > best", "recorded_order"),
    Mutant("the margin is that of the best", "score_of(best) -", "score_of(tl.max(order, axis=1)) -", "margins"),
    Mutant(
        "the margin is that of the best recorded",
        "worst = tl.min(tl.where(recorded, any_group, HIGHEST), axis=1)",
        "worst = tl.max(tl.where(recorded, any_group, -HIGHEST), axis=1)",
        "margins",
    ),
    Mutant("recorded experts of closed groups are -inf", "any_group, HIGHEST", "order, HIGHEST", "margins_of_odd_rows"),
    Mutant("margins are signed", "(margin > 0) & (margin < ", "(margin == margin) & (margin < ", "margins_of_odd_rows"),
    Mutant("margins are infinite", ' & (margin < float("inf"))', "", "margins_of_odd_rows"),
    Mutant("rows that are not replayed have a margin", "flipped & (margin > 0)", "(margin > 0)", "margins"),
    Mutant("the margin is of scores where logits select", "if not BY_LOGITS:", "if True:", "margins"),
    Mutant("missing counts free rows", "missing & (asked != _FREE)", "missing & (asked == asked)", "missing_rows"),
    Mutant("missing counts padding", " & (asked != _PAD)\n", "\n", "missing_rows"),
    Mutant("the load counts padding", "sent = live[:, None] & ", "sent = ", "loads"),
    Mutant("the load is that of the own choice", "tl.where(own[:, None], native, recorded)", "native", "loads"),
    Mutant("the load is that of the record", "tl.where(own[:, None], native, recorded)", "recorded", "loads"),
    Mutant(
        "padding alone writes no load",
        "    if loads is not None:\n",
        "    if (loads is not None) & (tl.max(live.to(tl.int32), axis=0) > 0):\n",
        "loads",
    ),
    Mutant("the load lies where its lane is", "* E + e, load", "* E + tl.arange(0, BE), load", "groups"),
    Mutant(
        "padding counts",
        "(here[:, None] & (c < _FATES) & (fate[:, None] == c))",
        "((c < _FATES) & (fate[:, None] == c))",
        "counts_add_up",
    ),
    Mutant(
        "softmax's gradient has no mean", "dense = -dense * dot[:, None]", "dense = dense * 0.0", "qwen3-plain-float32"
    ),
    Mutant(
        "renormalisation has no gradient",
        "slope = tl.div_rn(slope - mean[:, None], share[:, None])",
        "slope = tl.div_rn(slope, share[:, None])",
        "mixtral-float32",
    ),
    Mutant("gradients have no scale", ".to(tl.float32) * SCALE", ".to(tl.float32)", "glm-4.7-flash-float32"),
)
