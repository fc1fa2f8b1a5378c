"""Broken kernels of the sort of pairs, each with the check of `permute_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import permute_triton
from tests.kernels.mutants import Mutant
from tests.kernels.permute_checks import CHECKS

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (permute_triton,)

MUTANTS = (
    Mutant("the last pair is lost", "here = pair < pairs\n", "here = pair < pairs - 1\n", "by_hand"),
    Mutant("the tail is read", "    here = pair < pairs\n    place", "    here = pair < pairs + C\n    place", "sizes"),
    Mutant("the tail is counted", "tl.where(here, ids, E + 1)", "ids", "sizes"),
    Mutant("the tail is stored", "place + pair, to, mask=here", "place + pair, to, mask=pair >= 0", "sizes"),
    Mutant("negative ids are experts", "(ids < 0) | (ids >= E)", "(ids >= E)", "dropped"),
    Mutant("an id just beyond E is no pair", "(ids >= E)", "(ids > E + 1)", "dropped"),
    Mutant("dropped pairs go to the last expert", "(ids >= E), E, ids)", "(ids >= E), E - 1, ids)", "dropped"),
    Mutant("ids keep 32 bits", "other=0).to(tl.int64)", "other=0).to(tl.int32)", "id_types"),
    Mutant("rows lie close together", "pair // K * token_stride", "pair // K * K", "layer_views"),
    Mutant("columns lie close together", "pair % K * slot_stride", "pair % K", "layer_views"),
    Mutant("offsets are int32", "chunk.to(tl.int64) * C + lane", "chunk * C + lane", "far_rows"),
    Mutant("a pair counts itself", "other[None, :] < lane[:, None]", "other[None, :] <= lane[:, None]", "by_hand"),
    Mutant("equal pairs turn around", "other[None, :] < lane[:, None]", "other[None, :] > lane[:, None]", "by_hand"),
    Mutant("every pair before is equal", "(bins[:, None] == others[None, :])", "(bins[:, None] >= 0)", "by_hand"),
    Mutant("only the first part is compared", "range(0, C, S)", "range(0, S, S)", "uneven"),
    Mutant("only one chunk is counted", "chunk + 1\n", "0 * chunk + 1\n", "uneven"),
    Mutant(
        "chunks stand before experts",
        "tl.arange(0, BE).to(tl.int64) * chunks + chunk + 1",
        "chunk.to(tl.int64) * (E + 1) + tl.arange(0, BE) + 1",
        "uneven",
    ),
    Mutant(
        "the first start is not written",
        "tl.store(counts, 0, mask=chunk == 0)",
        "tl.store(counts, 0, mask=chunk < 0)",
        "by_hand",
    ),
    Mutant(
        "what the last run holds is stored", "mask=into < (E + 1) * chunks", "mask=into <= (E + 1) * chunks", "by_hand"
    ),
    Mutant("bins beyond E + 1 are stored", "mask=into < (E + 1) * chunks", "mask=into >= 0", "sizes"),
    Mutant("starts are those of the first chunk", "* chunks + chunk, mask=here", "* chunks, mask=here", "uneven"),
    Mutant(
        "offsets are those of the last chunk",
        "starts + e.to(tl.int64) * chunks",
        "starts + e.to(tl.int64) * chunks + chunks - 1",
        "uneven",
    ),
    Mutant(
        "the last offset is missing",
        "tl.store(offsets + e, start, mask=e <= E)",
        "tl.store(offsets + e, start, mask=e < E)",
        "by_hand",
    ),
    Mutant(
        "the running sum counts itself twice", "starts = counts.cumsum", "starts = counts + counts.cumsum", "by_hand"
    ),
    Mutant(
        "order is place",
        "tl.store(order + to, pair.to(tl.int32), mask=here)",
        "tl.store(order + pair, to, mask=here)",
        "by_hand",
    ),
)
