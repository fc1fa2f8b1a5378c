"""Broken kernels of packing, each with the check of `pack_checks` that must catch it: see `mutants`."""

from __future__ import annotations

from pacenote.kernels import pack_triton
from tests.kernels.mutants import Mutant
from tests.kernels.pack_checks import CHECKS

__all__ = ["CHECKS", "MODULES", "MUTANTS"]

MODULES = (pack_triton,)

MUTANTS = (
    Mutant("tail positions are stored", "    here = t < T\n", "    here = t < T + BT\n", "sizes"),
    Mutant("the last position is lost", "    here = t < T\n", "    here = t < T - 1\n", "sizes"),
    Mutant("bisection takes the sample before", "<= t\n", "< t\n", "a_long_sample"),
    Mutant("bisection stops a step early", "for _ in range(steps):", "for _ in range(steps - 1):", "a_long_sample"),
    Mutant("bisection rounds down", "(low + high + 1) // 2", "(low + high) // 2", "sizes"),
    Mutant(
        "no zigzag",
        "tl.where(inside < chunk, cp_rank * chunk + inside, last)",
        "cp_rank * chunk * 2 + inside",
        "zigzag",
    ),
    Mutant("the far chunk is one too far", "(2 * cp_size - 1 - cp_rank)", "(2 * cp_size - cp_rank)", "zigzag"),
    Mutant(
        "the far chunk is the next one",
        "(2 * cp_size - 1 - cp_rank) * chunk",
        "(cp_rank + 1) * chunk",
        "zigzag",
    ),
    Mutant("chunks change at the wrong place", "inside < chunk,", "inside <= chunk,", "zigzag"),
    Mutant(
        "the tail has the last sample's rule",
        "tl.where(behind, inside, ",
        "tl.where(False, inside, ",
        "zigzag",
        also=("end = tl.load(table + sample + 1, mask=sample < samples, other=0)", "end = start + 0 * sample + total"),
    ),
    Mutant("samples have a position too many", "(place < tl.load(", "(place <= tl.load(", "sizes"),
    Mutant("padding is real", "real = here & (place", "real = here | (place", "zigzag"),
    Mutant(
        "targets are inputs",
        "tl.load(tokens + token + 1, mask=real",
        "tl.load(tokens + token, mask=real",
        "sizes",
    ),
    Mutant(
        "inputs are targets",
        "tl.store(out_tokens + t, tl.load(tokens + token, mask",
        "tl.store(out_tokens + t, tl.load(tokens + token + 1, mask",
        "sizes",
    ),
    Mutant("the mask is the input's", "tl.load(loss_mask + token + 1,", "tl.load(loss_mask + token,", "sizes"),
    Mutant("logprobs are the input's", "tl.load(logprobs + token + 1,", "tl.load(logprobs + token,", "sizes"),
    Mutant("advantages are the input's", "tl.load(advantages + token + 1,", "tl.load(advantages + token,", "sizes"),
    Mutant(
        "logprobs of what is not trained",
        "tl.load(logprobs + token + 1, mask=trained",
        "tl.load(logprobs + token + 1, mask=real",
        "sizes",
    ),
    Mutant(
        "advantages of what is not trained",
        "tl.load(advantages + token + 1, mask=trained",
        "tl.load(advantages + token + 1, mask=real",
        "sizes",
    ),
    Mutant(
        "positions go on over samples", "tl.store(out_positions + t, place", "tl.store(out_positions + t, t", "sizes"
    ),
    Mutant("the tail is a sample", "tl.where(sample == samples, -1, sample)", "sample", "zigzag"),
    Mutant("rows are tokens' places", "row = start + place", "row = token", "sizes"),
    Mutant("rows of the token behind", "row = start + place", "row = start + place + 1", "truncation"),
    Mutant("samples without rows read some", "held = real & (start >= 0)", "held = real", "samples_without_rows"),
    Mutant("every provenance is replayed", "(((codes >> code) & 1) > 0)", "(codes >= 0)", "provenance"),
    Mutant("codes are off by one", "((codes >> code) & 1)", "((codes >> (code + 1)) & 1)", "provenance"),
    Mutant("weights do not matter", "known &= tl.load(fresh + row,", "known |= tl.load(fresh + row,", "provenance"),
    Mutant(
        "padding is free", "tl.where(known, _REPLAY, _FREE), _PAD)", "tl.where(known, _REPLAY, _FREE), _FREE)", "zigzag"
    ),
    Mutant("routes are not cut", "r = t - first", "r = t", "sequence_parallel"),
    Mutant("every run writes its state", "mine = (r >= 0) & (r < routed)", "mine = here", "sequence_parallel"),
    Mutant("layers as they come", "layer = tl.load(layers + l, mask=l < taken, other=0)", "layer = l", "layer_table"),
    Mutant("only the first block of layers", "l = part * BL +", "l = 0 * part +", "layer_table"),
    Mutant("row offsets are int32", "row = start + place", "row = (start + place).to(tl.int32)", "far_rows"),
    Mutant("words are not layers", "base = row * num_layers * W", "base = row * num_layers", "sizes"),
    Mutant("words of a layer lie on each other", "(layer * W)[None", "layer[None", "layer_table"),
    Mutant("positions of a layer overlap", "(r * W)[None, :, None]", "r[None, :, None]", "sizes"),
    Mutant("layers overlap", "(l.to(tl.int64) * routed * W)", "(l.to(tl.int64) * routed)", "sizes"),
    Mutant("padding has one place", "((r % E)[:, None] * K", "(0 * r[:, None]", "samples_without_rows"),
    Mutant("ids of a word repeat", "w[None, :] * IDS + i) % E", "w[None, :] * IDS) % E", "samples_without_rows"),
    Mutant("words overlap", "w[None, :] * IDS + i) % E", "w[None, :] + i) % E", "sizes"),
    Mutant("ids of a word stand on each other", "<< (BITS * i)", "<< i", "samples_without_rows"),
    Mutant("padding ids pass E", " + i) % E", " + i)", "sizes"),
    Mutant("a run starts at the first layer", "(run + part * BL) * W", "(part * BL) * W", "layer_table"),
    Mutant("a run stays at its first layers", "(run + part * BL) * W", "run * W", "sizes"),
    Mutant("the tail of a run is read", "(c < (taken - part * BL) * W)", "(c >= 0)", "sizes"),
    Mutant("every table is a run", "if RUN and W == BW:", "if W == BW:", "layer_table"),
    Mutant("a run skips words", "if RUN and W == BW:", "if RUN:", "sizes"),
)
