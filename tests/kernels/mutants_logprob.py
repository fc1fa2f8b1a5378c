"""Broken kernels of logprobs, each with the check of `logprob_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import logprob_tiles_triton, logprob_triton
from tests.kernels.logprob_checks import CHECKS
from tests.kernels.mutants import Mutant

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (logprob_triton, logprob_tiles_triton)

LOAD = 'logit = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf"))'
MOMENT = "moment = (moment + old * total) * kept + tl.where(e == 0, 0.0, e * away)"

MUTANTS = (
    # the row forward
    Mutant("the vocabulary's tail is 0", LOAD, LOAD.replace('-float("inf")', "0.0"), "edges"),
    Mutant("the last block is lost", "range(0, V, BLOCK)", "range(0, V - BLOCK + 1, BLOCK)", "edges"),
    Mutant("the last logit is lost", "mask=v < V, other=-f", "mask=v < V - 1, other=-f", "edges"),
    Mutant(
        "the largest logit begins at 0",
        'top = tl.full([BLOCK], -float("inf")',
        "top = tl.full([BLOCK], 0.0",
        "order_of_logits",
    ),
    Mutant(
        "blocks forget the largest logit",
        "new = tl.maximum(top, z)\n        shift = base(new)\n        old, away = step(top, shift), z - shift\n",
        "new = z\n        shift = base(new)\n        old, away = step(top, shift), z - shift\n",
        "order_of_logits",
    ),
    Mutant("older sums are not scaled", "total = total * kept + e\n", "total = total + e\n", "order_of_logits"),
    Mutant("older moments are not moved", MOMENT, MOMENT.replace("old * total", "0.0"), "order_of_logits"),
    Mutant("older moments are not scaled", MOMENT, MOMENT.replace(" * kept", ""), "order_of_logits"),
    Mutant("0 times -inf in the entropy", MOMENT, "moment = (moment + old * total) * kept + e * away", "impossible"),
    Mutant("lanes are not scaled", "tl.sum(total * kept, axis=0)", "tl.sum(total, axis=0)", "logits"),
    Mutant("lanes' moments are not moved", "tl.sum((moment + old * total) * kept", "tl.sum(moment * kept", "logits"),
    Mutant("all of -inf is subtracted", 'tl.where(top == -float("inf"), 0.0, top)', "top", "impossible"),
    Mutant("a step from nothing", 'tl.where(top == -float("inf"), 0.0, top - shift)', "top - shift", "impossible"),
    Mutant("rows lie next to each other", LOAD, LOAD.replace("stride", "V"), "strides"),
    Mutant(
        "rows are 2^31 apart at most",
        "row = tl.program_id(0).to(tl.int64)\n    degrees",
        "row = tl.program_id(0)\n    degrees",
        "far_rows",
    ),
    Mutant(
        "targets of the next row", "tl.load(targets + row)\n    here", "tl.load(targets + row * 0)\n    here", "logits"
    ),
    Mutant("targets elsewhere are here", "here = (target >= 0) & (target < V)", "here = target < V", "parts"),
    Mutant(
        "targets have no temperature",
        "chosen = scale(logit, bias, degrees,",
        "chosen = scale(logit, bias, 1.0,",
        "temperatures",
    ),
    Mutant(
        "targets have no bias",
        "degrees, target, here, bias is not None",
        "degrees, target, here, False",
        "temperatures",
    ),
    # both ways
    Mutant("temperatures multiply", "z = tl.div_rn(z, heat + tl.zeros_like(z))", "z = z * heat", "temperatures"),
    Mutant(
        "one temperature for all", "TOKEN_HEAT=int(heat is not None and heat.ndim > 0)", "TOKEN_HEAT=0", "temperatures"
    ),
    Mutant(
        "bias after temperature",
        "z += tl.load(bias + v, mask=mask, other=1.0).to(tl.float32)",
        "z += tl.load(bias + v, mask=mask, other=1.0).to(tl.float32) * heat",
        "temperatures",
    ),
    # parts and score
    Mutant("one part is enough", "for _ in range(1, parts):", "for _ in range(1, parts - 1):", "parts"),
    Mutant(
        "parts of other rows",
        "at += C.to(tl.int64) * 4",
        "at += 4",
        "parts",
        ("mask=inside, other=0.0)\n        new", "mask=inside & (row < C - 2), other=0.0)\n        new"),
    ),
    Mutant("parts are not scaled", "other_total * tl.exp(theirs)", "other_total", "parts"),
    Mutant(
        "parts' moments are not moved",
        "other=0.0) + theirs * other_total) * tl.exp(theirs)",
        "other=0.0)) * tl.exp(theirs)",
        "parts",
    ),
    Mutant(
        "the last part has the target",
        "chosen = tl.maximum(chosen, tl.load(at + 3, mask=inside, other=0.0))",
        "chosen = tl.load(at + 3, mask=inside, other=0.0)",
        "parts",
    ),
    Mutant(
        "the largest logit is left out",
        "first, second, third, fourth = (chosen - top) - logsum",
        "first, second, third, fourth = chosen - logsum",
        "logits",
    ),
    Mutant("moments are not divided", "logsum - moment / total", "logsum - moment", "logits"),
    Mutant("ignored tokens have a score", "tl.where(known == 0, 0.0, first + wrong)", "first + wrong", "parts"),
    Mutant(
        "wrong tokens have a score",
        'wrong = tl.where(known == 1, 0.0, float("nan"))',
        'wrong = tl.where(known <= 2, 0.0, float("nan"))',
        "parts",
    ),
    Mutant(
        "scores of the first rows alone",
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n    inside = row < C\n",
        "row = tl.arange(0, BLOCK)\n    inside = row < C - 1\n",
        "parts",
    ),
    # the gradient
    Mutant("the gradient has no target", "+ tl.where(hit, dlogprob, 0.0)", "+ tl.where(hit, 0.0, 0.0)", "logits"),
    Mutant(
        "a target elsewhere has a gradient",
        "tl.load(targets + row) == v",
        "tl.abs(tl.load(targets + row)) == v",
        "wrong_rows",
    ),
    Mutant("0 times -inf in the gradient", "tl.where(p == 0, 0.0, -p * weight)", "(-p * weight)", "impossible"),
    Mutant("the entropy's gradient lacks the entropy", "(logp + entropy)", "(logp + 0 * entropy)", "logits"),
    Mutant("the entropy has no gradient", "if ENTROPY:", "if not ENTROPY:", "logits"),
    Mutant("the entropy's gradient upside down", "weight += dentropy", "weight -= dentropy", "logits"),
    Mutant(
        "gradients are not divided by the temperature",
        "slope = tl.div_rn(slope, degrees + tl.zeros_like(slope))",
        "slope = slope + 0",
        "temperatures",
    ),
    Mutant(
        "ignored tokens have a gradient",
        'tl.where(state == 0, 0.0, tl.where(state == 1, slope, float("nan")))',
        'tl.where(state <= 1, slope, float("nan"))',
        "ignored",
    ),
    Mutant("wrong tokens have a gradient", 'tl.where(state == 1, slope, float("nan"))', "slope", "wrong_rows"),
    Mutant(
        "ignored tokens times zero",
        'tl.where(state == 0, 0.0, tl.where(state == 1, slope, float("nan")))',
        'tl.where(state == 2, float("nan"), slope * state.to(tl.float32))',
        "ignored",
    ),
    Mutant("gradients of the first block alone", "% blocks * BLOCK", "% blocks * 0", "logits"),
    Mutant(
        "gradients of the tail are not written",
        "slope.to(out.dtype.element_ty), mask=v < V)",
        "slope.to(out.dtype.element_ty), mask=v < V - 1)",
        "edges",
    ),
    Mutant(
        "gradients lie as the logits do",
        "tl.store(out + row * out_stride + v",
        "tl.store(out + row * stride + v",
        "strides",
    ),
    Mutant(
        "gradients are 2^31 apart at most",
        "row = (tl.program_id(0) // blocks).to(tl.int64)",
        "row = tl.program_id(0) // blocks",
        "far_rows",
    ),
    # invariant
    Mutant(
        "padding columns have probability",
        'z = tl.where(there, z, -float("inf"))',
        "z = tl.where(there, z, 0.0)",
        "tiles",
    ),
    Mutant("splits overlap", "tl.minimum(V, (split + 1) * SPLIT)", "V", "tiles"),
    Mutant(
        "splits end early",
        "tl.minimum(V, (split + 1) * SPLIT)",
        "tl.minimum(V, (split + 1) * SPLIT) - BLOCK_N",
        "tiles",
    ),
    Mutant("tiles forget each other", "total = total * kept + tl.sum(e, axis=1)", "total = tl.sum(e, axis=1)", "tiles"),
    Mutant(
        "tiles' moments are not moved",
        "moment = (moment + old * total) * kept + tl.sum(",
        "moment = moment * kept + tl.sum(",
        "tiles",
    ),
    Mutant(
        "0 times -inf in a tile",
        "tl.sum(tl.where(e == 0, 0.0, e * away), axis=1)",
        "tl.sum(e * away, axis=1)",
        "tiles_impossible",
    ),
    Mutant(
        "the last tile has the target",
        'chosen = tl.maximum(chosen, tl.max(tl.where(hit, z, -float("inf")), axis=1))',
        'chosen = tl.max(tl.where(hit, z, -float("inf")), axis=1)',
        "tiles",
    ),
    Mutant("tiles have one temperature", "heat + m * TOKEN_HEAT", "heat + m * 0", "tiles"),
    Mutant(
        "parts of a tile of other rows",
        "(split.to(tl.int64) * C + m) * 4",
        "(split.to(tl.int64) * tl.cdiv(C, BLOCK_M) + m) * 4",
        "tiles",
    ),
    Mutant(
        "columns of a tile by the number of rows",
        "tile, (count, dim), vocab = tiles(hidden.dtype), hidden.shape",
        "tile, (count, dim), vocab = Tiles(32, 64 if len(hidden) > 1 else 16, 32, 4, 1), hidden.shape",
        "rows_alone",
    ),
    Mutant(
        "tiles by the number of rows",
        "tile, (count, dim), vocab = tiles(hidden.dtype), hidden.shape",
        "tile, (count, dim), vocab = Tiles(32, 64, 32 if len(hidden) > 20 else 16, 4, 1), hidden.shape",
        "rows_alone",
    ),
)
