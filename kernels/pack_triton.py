# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernel behind `pack`. `reference.pack_index` and `reference.pack` are the definition.

Destination-driven: a program writes BT positions, for BL of their layers. It finds the sample of each by bisection, the
place in it by the zigzag rule, and from these the one token and the one row that every array of the position is read
from. A row's ids travel as words of up to eight bytes and are turned from token-major to layer-major on the way.

Legend: T positions, T' those whose routes are written, S samples, L layers of the rows and L' taken ones, E experts, K
experts a token, W words a row of ids; BT positions and BL layers of a program, BW the power of two that holds W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels.pack import empty
from pacenote.kernels.spec import FREE, PAD, REPLAY

_FREE, _REPLAY, _PAD = tl.constexpr(FREE), tl.constexpr(REPLAY), tl.constexpr(PAD)


@triton.jit
def sample_of(table, t, samples, steps):
    """The last column of the table [4, S+1] that starts at or before each position t, by bisection."""
    low = tl.zeros_like(t)
    high = low + samples
    for _ in range(steps):
        middle = (low + high + 1) // 2
        before = tl.load(table + middle) <= t
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def place_of(table, t, sample, samples, total, cp_size, cp_rank):
    """The input token's place in its sample, int64; behind the samples, in the padding. See `reference.pack_index`."""
    start = tl.load(table + sample)
    behind = sample == samples
    end = tl.load(table + sample + 1, mask=sample < samples, other=0)
    inside, chunk = t - start, (end - start) // 2
    last = (2 * cp_size - 1 - cp_rank) * chunk + inside - chunk
    return tl.where(behind, inside, tl.where(inside < chunk, cp_rank * chunk + inside, last))


@triton.jit
def spread_words(r, w, word, K: tl.constexpr, E: tl.constexpr, IDS: tl.constexpr, BITS: tl.constexpr):
    """Words [BT, BW] of rows that come from nowhere, as `reference.pad_experts` at rows r [BT]: IDS ids a word."""
    words = tl.zeros([r.shape[0], w.shape[0]], tl.int64)
    for i in tl.static_range(IDS):
        ids = ((r % E)[:, None] * K + w[None, :] * IDS + i) % E
        words |= ids.to(tl.int64) << (BITS * i)
    return words.to(word.dtype.element_ty)


# Numbers that change from batch to batch do not make another kernel by being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T", "samples", "steps", "cp_size", "cp_rank", "first", "codes", "run"])
def _pack_kernel(
    table,  # [4, S+1] int64
    tokens,  # [N]
    loss_mask,  # [N] uint8
    logprobs,  # [N]
    advantages,  # [N]
    words,  # [R, L, W] or None
    provenance,  # [R] or None
    fresh,  # [R] uint8 or None
    layers,  # [L'] int64
    out_tokens,  # [T], as the next six
    out_targets,
    out_mask,  # uint8
    out_logprobs,
    out_advantages,
    out_positions,
    out_segments,
    out_words,  # [L', T', W]
    out_state,  # [T']
    T,
    samples,  # S
    steps,  # of bisection
    cp_size,
    cp_rank,
    first,  # position whose routes are the first of the T'
    routed,  # T'
    codes,
    num_layers,  # L
    taken,  # L'
    run,  # the first of the layers
    layer_blocks,
    W: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    IDS: tl.constexpr,
    BITS: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
    BW: tl.constexpr,
    RUN: tl.constexpr,
):
    block = tl.program_id(0) // layer_blocks
    part = tl.program_id(0) % layer_blocks
    t = (block * BT + tl.arange(0, BT)).to(tl.int64)
    here = t < T
    sample = sample_of(table, t, samples, steps)
    place = place_of(table, t, sample, samples, T, cp_size, cp_rank)
    columns = samples + 1
    real = here & (place < tl.load(table + 3 * columns + sample))
    token = tl.load(table + columns + sample) + place

    if part == 0:
        mask = tl.load(loss_mask + token + 1, mask=real, other=0)
        trained = mask != 0
        tl.store(out_tokens + t, tl.load(tokens + token, mask=real, other=0), mask=here)
        tl.store(out_targets + t, tl.load(tokens + token + 1, mask=real, other=0).to(tl.int64), mask=here)
        tl.store(out_mask + t, mask, mask=here)
        tl.store(out_logprobs + t, tl.load(logprobs + token + 1, mask=trained, other=0.0), mask=here)
        tl.store(out_advantages + t, tl.load(advantages + token + 1, mask=trained, other=0.0), mask=here)
        tl.store(out_positions + t, place, mask=here)
        tl.store(out_segments + t, tl.where(sample == samples, -1, sample).to(tl.int32), mask=here)

    if words is not None:
        r = t - first
        mine = (r >= 0) & (r < routed)
        start = tl.load(table + 2 * columns + sample)
        row = start + place
        held = real & (start >= 0)
        if part == 0:
            code = tl.load(provenance + row, mask=held & mine, other=0).to(tl.int32)
            known = held & (((codes >> code) & 1) > 0)
            if fresh is not None:
                known &= tl.load(fresh + row, mask=held & mine, other=0) != 0
            state = tl.where(real, tl.where(known, _REPLAY, _FREE), _PAD)
            tl.store(out_state + r, state.to(tl.uint8), mask=mine)

        l = part * BL + tl.arange(0, BL)  # noqa: E741
        w = tl.arange(0, BW)
        held_here = (held & mine)[:, None]
        base = row * num_layers * W
        if RUN and W == BW:  # the words of a row stand in one run, and so do the lanes that read them
            c = tl.arange(0, BL * BW)
            there = base[:, None] + (run + part * BL) * W + c[None, :]
            tile = tl.load(words + there, mask=held_here & (c < (taken - part * BL) * W)[None, :], other=0)
            tile = tl.reshape(tile, [BT, BL, BW])
        else:
            layer = tl.load(layers + l, mask=l < taken, other=0)
            inside = (l < taken)[None, :, None] & (w < W)[None, None, :]
            there = base[:, None, None] + (layer * W)[None, :, None] + w[None, None, :]
            tile = tl.load(words + there, mask=held_here[:, :, None] & inside, other=0)
        nowhere = tl.where(r < 0, 0, r).to(tl.int32)
        tile = tl.where(held[:, None, None], tile, spread_words(nowhere, w, words, K, E, IDS, BITS)[:, None, :])
        tile = tl.permute(tile, (1, 0, 2))  # so that neighbours write neighbouring positions of a layer
        into = (l.to(tl.int64) * routed * W)[:, None, None] + (r * W)[None, :, None] + w[None, None, :]
        tl.store(out_words + into, tile, mask=mine[None, :, None] & (l < taken)[:, None, None] & (w < W)[None, None, :])


def pack(
    table: Tensor,
    tokens: Tensor,
    loss_mask: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    experts: Tensor | None,
    provenance: Tensor | None,
    fresh: Tensor | None,
    layers: Tensor,
    run: int,
    total: int,
    cp_size: int,
    cp_rank: int,
    first: int,
    routed: int,
    *,
    num_experts: int,
    codes: int,
) -> tuple[Tensor, ...]:
    """One launch; every number of the batch is written once.

    Floor: with b bytes an id, 2 T' L' K b bytes of rows read and written, and 46 T + 2 T' of the rest (a token, a mask,
    a logprob, an advantage read; 33 bytes written).

    Args:
        table: [4, S+1] int64, see `reference.pack_index`.
        tokens: [N] int32, as are the next three of one length.
        loss_mask: [N] bool.
        logprobs: [N] float32.
        advantages: [N] float32.
        experts: [R, L, K] uint8 or uint16, or None.
        provenance: [R] uint8, or None without experts.
        fresh: [R] bool or None.
        layers: [L'] int64, places on the L axis.
        run: the first of them, if each is one more than the last, else -1.
        total: T.
        cp_size: context-parallel ranks.
        cp_rank: this one.
        first: the first position whose routes are written.
        routed: T', how many there are of them.
        num_experts: E.
        codes: bit c is set if provenance c is replayed.

    Returns:
        The fields of `reference.Packed`.
    """
    fields = empty(tokens, experts, layers, total, routed)
    *arrays, rows, state = fields
    if not total:
        return fields
    samples = table.shape[1] - 1
    words, out_words, ids = None, None, 1
    num_layers, k, width, bits = 1, 1, 1, 8
    if experts is not None:
        words = as_words(experts.contiguous())
        num_layers, k = experts.shape[1:]
        width, bits = words.shape[2], 8 * experts.element_size()
        ids = words.element_size() // experts.element_size()
        out_words = rows.view(words.dtype)
    taken = len(layers) if experts is not None else 0
    bw = launch.next_power_of_2(width)
    bl = launch.next_power_of_2(max(2, min(taken, 64)))  # a block of one zero reads as no block in the interpreter
    layer_blocks = max(1, -(-taken // bl))
    bt = launch.copy_rows(bl * bw)
    with launch.on_device_of(tokens):
        _pack_kernel[(-(-total // bt) * layer_blocks,)](
            table,
            tokens.contiguous(),
            loss_mask.contiguous().view(torch.uint8),
            logprobs.contiguous(),
            advantages.contiguous(),
            words,
            None if provenance is None else provenance.contiguous(),
            None if fresh is None else fresh.contiguous().view(torch.uint8),
            layers,
            *(array.view(torch.uint8) if array.dtype == torch.bool else array for array in arrays),
            out_words,
            state,
            total,
            samples,
            samples.bit_length(),
            cp_size,
            cp_rank,
            first,
            routed,
            codes,
            num_layers,
            taken,
            max(run, 0),
            layer_blocks,
            W=width,
            K=k,
            E=num_experts,
            IDS=ids,
            BITS=bits,
            BT=bt,
            BL=bl,
            BW=bw,
            RUN=run >= 0,
            num_warps=4,
        )
    return fields


def as_words(experts: Tensor) -> Tensor:
    """Ids [R, L, K] as the widest words [R, L, W] that a row's ids fill and its place in memory allows."""
    narrow = experts.element_size()
    for word in (torch.int64, torch.int32, torch.int16):
        fits = experts.shape[2] * narrow % word.itemsize == 0 and experts.data_ptr() % word.itemsize == 0
        if fits and word.itemsize > narrow:
            return experts.view(word)
    return experts.view(torch.int16 if narrow == 2 else torch.uint8)
