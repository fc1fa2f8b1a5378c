"""Broken kernels of ragged sums, each with the check of `segment_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import segment_triton
from tests.kernels.mutants import Mutant
from tests.kernels.segment_checks import CHECKS

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (segment_triton,)

MUTANTS = (
    Mutant("bisection stops a step early", "for _ in range(steps):", "for _ in range(steps - 1):", "sizes"),
    Mutant("padding is the first segment", "tl.where(found < 0, samples, found)", "found", "padding_counts_nothing"),
    Mutant(
        "padding is the last segment",
        "tl.where(found < 0, samples, found)",
        "tl.where(found < 0, samples - 1, found)",
        "padding_counts_nothing",
    ),
    Mutant(
        "a segment starts late",
        "tl.where(more & below, middle + 1, low)",
        "tl.where(more & below, middle, low)",
        "sizes",
    ),
    Mutant("equal ids are below", "found) < edge", "found) <= edge", "sizes"),
    Mutant("splits add the same", "range(start + split * BLOCK, end", "range(start, end", "sizes"),
    Mutant("splits take one step", "SPLITS * BLOCK):", "SPLITS * BLOCK * 1000):", "sizes"),
    Mutant("splits overlap", "SPLITS * BLOCK):", "BLOCK):", "sizes"),
    Mutant("a block's end is the batch's", "here = t < end", "here = t < T", "sizes"),
    Mutant("the last position is lost", "here = t < end", "here = t < end - 1", "sizes"),
    Mutant(
        "the mask is not looked at", "here &= tl.load(mask + t, mask=here, other=0) != 0", "here &= t >= 0", "sizes"
    ),
    Mutant("means count what is masked", "count += here.to(tl.int32)", "count += (t < end).to(tl.int32)", "sizes"),
    Mutant("blocks replace each other", "total += tl.load", "total = tl.load", "sizes"),
    Mutant(
        "blocks start where the batch does",
        "range(start + split * BLOCK, end",
        "range(start // BLOCK * BLOCK + split * BLOCK, end",
        "sizes",
    ),
    Mutant(
        "gradients ignore the mask", "taken &= tl.load(mask + t, mask=t < T, other=0) != 0", "taken &= t >= 0", "sizes"
    ),
    Mutant(
        "padding has a gradient",
        "(segment >= 0) & (segment < samples)",
        "(segment >= -1) & (segment < samples)",
        "padding_counts_nothing",
    ),
    Mutant("gradients of the segment behind", "tl.load(grad + segment,", "tl.load(grad + segment - 1,", "sizes"),
    Mutant("the last gradient is lost", "mask=t < T)\n", "mask=t < T - 1)\n", "types"),
    Mutant(
        "gradients beyond the last segment", "(segment >= 0) & (segment < samples)", "segment >= 0", "unknown_segments"
    ),
)
