"""Broken kernels of the invariant linear layer, each with the check of `invariant_checks` that must catch it."""

from __future__ import annotations

from pacenote.kernels import invariant_triton
from tests.kernels.invariant_checks import CHECKS
from tests.kernels.mutants import Mutant

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (invariant_triton,)

BACKWARDS = """for first in range(0, K, BLOCK_K):
        start = first if M % 2 == 0 else tl.cdiv(K, BLOCK_K) * BLOCK_K - BLOCK_K - first
        a_at = a + m.to(tl.int64)[:, None] * a_m + (k + start)[None, :] * a_k
        b_at = b + n.to(tl.int64)[None, :] * b_n + (k + start)[:, None] * b_k
"""
BEGIN = "acc = tl.load(at, mask=inside, other=0.0) if ADD else tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"

MUTANTS = (
    Mutant("the last K tile is lost", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)", "values"),
    Mutant("K's tail is not masked", "inside = (k < K - start) | EVEN", "inside = (k >= 0) | EVEN", "values"),
    Mutant("K's tail is never there", "| EVEN", "& EVEN", "values"),
    Mutant("K is even without looking", "EVEN=a.shape[1] % tile.k == 0", "EVEN=True", "values"),
    Mutant("rows do not move along K", "a_at += BLOCK_K * a_k", "a_at += 0", "values"),
    Mutant("columns do not move along K", "b_at += BLOCK_K * b_k", "b_at += 0", "values"),
    Mutant("rows beyond the last are read", "(m < M)[:, None] & inside[None, :]", "inside[None, :]", "values"),
    Mutant("columns beyond the last are read", "(n < N)[None, :] & inside[:, None]", "inside[:, None]", "values"),
    Mutant("tiles replace each other", "tl.dot(x, w, acc,", "tl.dot(x, w, acc * 0.0,", "values"),
    Mutant("products in half precision", "x.to(tl.float32), w", "x.to(tl.float16).to(tl.float32), w", "values"),
    Mutant("strides of the rows are not looked at", "[:, None] * a_m", "[:, None] * K", "strides"),
    Mutant("strides along the rows are not looked at", "k[None, :] * a_k", "k[None, :]", "values"),
    Mutant("strides of the weight are not looked at", "[None, :] * b_n", "[None, :] * K", "strides"),
    Mutant("strides along the weight are not looked at", "k[:, None] * b_k", "k[:, None]", "strides"),
    Mutant(
        "rows and columns change places",
        "% rows * BLOCK_M",
        "// rows * BLOCK_M",
        "values",
        ("// rows * BLOCK_N", "% rows * BLOCK_N"),
    ),
    Mutant("the bias is left out", "acc += tl.load(bias + n,", "acc += 0 * tl.load(bias + n,", "values"),
    Mutant("the bias is the first column's", "tl.load(bias + n,", "tl.load(bias + n * 0,", "values"),
    Mutant("the last column is not written", "& (n < N)[None, :]\n    at", "& (n < N - 1)[None, :]\n    at", "values"),
    Mutant("the last row is not written", "inside = (m < M)[:, None]", "inside = (m < M - 1)[:, None]", "values"),
    Mutant("rows of the result are K apart", "[:, None] * N + n", "[:, None] * K + n", "values"),
    Mutant("what stands there is not added to", "if ADD else", "* 0.0 if ADD else", "tokens_in_order"),
    Mutant(
        "what stands there is added last",
        BEGIN,
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        "tokens_in_order",
        (
            "    if bias is not None:",
            "    if ADD:\n        acc += tl.load(at, mask=inside, other=0.0)\n    if bias is not None:",
        ),
    ),
    Mutant(
        "tiles by the number of rows",
        "= tiles(a.dtype)",
        "= Tiles(32, 64, 16 if len(a) > 40 else 32, 4, 1)",
        "rows_alone",
    ),
    Mutant("K from its end for some", "for start in range(0, K, BLOCK_K):\n", BACKWARDS, "rows_alone"),
    Mutant(
        "NaN of one row in all",
        "        if WIDEN:\n",
        "        x = (x + tl.sum(x.to(tl.float32), axis=0)[None, :] * 0).to(x.dtype)\n        if WIDEN:\n",
        "not_a_number",
    ),
)
