"""Rows cut for a rank: which token stands where in every layout, against loops, and against `pack`'s own map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels.layout import Layout, stage_layers
from pacenote.kernels.pack import pack
from pacenote.kernels.spec import DECODE, FREE, MISSING, PAD, PREFILL, RECOMPUTED, REPLAY
from pacenote.replay.align import align, align_records, places, sbhd_index, thd_index, zigzag
from pacenote.replay.errors import ScopeError
from pacenote.replay.record import RoutingRecord
from pacenote.rollout.trajectory import Trajectory

LAYERS, EXPERTS = (1, 2, 4), 300


def layouts() -> list[Layout]:
    return [
        Layout(cp_size=cp, cp_rank=c, sp_size=sp, sp_rank=s)
        for cp in (1, 2, 3)
        for sp in (1, 2)
        for c in range(cp)
        for s in range(sp)
    ]


def named(tokens: Tensor) -> Tensor:
    """Rows [..., L, K] uint16 that name token and layer."""
    columns = [torch.stack([tokens, (tokens + layer) % EXPERTS], -1) for layer in LAYERS]
    return torch.stack(columns, -2).to(torch.uint16)


def held(length: int, layout: Layout) -> list[int]:
    """A rank's positions, in a loop."""
    if layout.cp_size == 1:
        return list(range(length))
    chunk = length // (2 * layout.cp_size)
    chunks = [list(range(start, start + chunk)) for start in range(0, length, chunk)]
    return chunks[layout.cp_rank] + chunks[-1 - layout.cp_rank]


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_sequences_reach_routers_by_position_and_then_by_sequence(layout: Layout) -> None:
    batch, length = 3, 24
    tokens = torch.arange(batch * length).view(batch, length)
    wanted = [int(tokens[b, position]) for position in held(length, layout) for b in range(batch)]
    run = len(wanted) // layout.sp_size
    wanted = wanted[layout.sp_rank * run : (layout.sp_rank + 1) * run]
    assert sbhd_index(batch, length, layout).tolist() == wanted

    state = torch.where(tokens % 5 == 0, PAD, REPLAY).to(torch.uint8)
    routes = align(named(tokens), layout, layers=(2, 0), state=state, num_experts=EXPERTS)
    assert (routes.rows.dtype, routes.num_experts) == (torch.uint16, EXPERTS)
    assert torch.equal(routes.rows[:, :, 0].long(), torch.tensor(wanted)[:, None].expand(-1, 2))
    assert torch.equal(routes.rows[:, 0].int(), named(torch.tensor(wanted))[:, 2].int())
    assert torch.equal(routes.rows[:, 1].int(), named(torch.tensor(wanted))[:, 0].int())
    assert routes.state.tolist() == [PAD if token % 5 == 0 else REPLAY for token in wanted]
    assert all(routes.rows[:, layer].is_contiguous() for layer in range(2))  # no copy is left for a layer


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_rows_are_cut_as_pack_cuts_them(data: Any) -> None:
    """An independent road to the same rows: samples through `pack`, against rows laid out whole and cut here."""
    cp, sp = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2]))
    layout = Layout(
        cp_size=cp, cp_rank=data.draw(st.integers(0, cp - 1)), sp_size=sp, sp_rank=data.draw(st.integers(0, sp - 1))
    )
    lengths = data.draw(st.lists(st.integers(2, 30), min_size=1, max_size=5))
    starts = np.cumsum([0, *lengths])
    samples = [trajectory(torch.arange(start, start + n)) for start, n in zip(starts[:-1], lengths, strict=True)]
    packed = pack(samples, layout=layout, num_experts=EXPERTS)
    assert packed.routes is not None

    bounds = packed.cu_seqlens_padded.tolist()
    whole = torch.zeros(bounds[-1], dtype=torch.long)
    state = torch.full((bounds[-1],), PAD, dtype=torch.uint8)
    for start, sample in zip(bounds[:-1], samples, strict=True):
        whole[start : start + len(sample.tokens) - 1] = torch.from_numpy(sample.tokens[:-1].copy())
        state[start : start + len(sample.tokens) - 1] = REPLAY
    assume((bounds[-1] // cp) % sp == 0)  # else pack pads the end, so that sequence-parallel runs are equal
    routes = align(named(whole), layout, layers=(0, 1, 2), state=state, cu_seqlens_padded=bounds)
    real = routes.state == REPLAY
    assert torch.equal(routes.state, packed.routes.state)
    assert torch.equal(routes.rows[real].int(), packed.routes.rows[real].int())


def trajectory(tokens: Tensor) -> Trajectory:
    mask = (np.arange(len(tokens)) > 0).astype(np.uint8)
    return Trajectory(
        tokens=tokens.numpy().astype(np.int32),
        loss_mask=mask,
        logprobs=-mask.astype(np.float32),
        experts=named(tokens[:-1]).numpy(),
        provenance=np.full(len(tokens) - 1, DECODE, np.uint8),
        version=np.zeros(len(tokens), np.int32),
        layers=LAYERS,
        num_experts=EXPERTS,
    )


def record(tokens: Tensor, provenance: list[int] | None = None, layers: tuple[int, ...] = LAYERS) -> RoutingRecord:
    """The record of tokens [N]: N - 1 rows."""
    rows = len(tokens) - 1
    return RoutingRecord(
        experts=named(tokens[:-1])[:, : len(layers)].numpy(),
        provenance=np.array(provenance or [PREFILL] * rows, np.uint8),
        version=np.zeros(rows, np.int32),
        layers=layers,
        num_experts=EXPERTS,
    )


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_records_reach_their_tokens_and_the_rest_is_padding(layout: Layout) -> None:
    length, first = 12, 2
    tokens = [torch.arange(10, 18), torch.arange(30, 41)]
    known = [PREFILL, MISSING, DECODE, RECOMPUTED, DECODE, DECODE, DECODE]
    routes = align_records([record(tokens[0], known), record(tokens[1])], length, layout, layers=(4, 1), first=first)
    wanted: list[tuple[int, int]] = []
    for position in held(length, layout):
        for ids, codes in ((tokens[0], known), (tokens[1], [PREFILL] * 10)):
            row = position - first
            inside = 0 <= row < len(ids) - 1
            code = PAD if not inside else REPLAY if codes[row] in (PREFILL, DECODE) else FREE
            wanted.append((int(ids[row]) if inside else 0, code))
    run = len(wanted) // layout.sp_size
    wanted = wanted[layout.sp_rank * run : (layout.sp_rank + 1) * run]
    assert routes.state.tolist() == [code for _, code in wanted]
    for row, (token, code) in zip(routes.rows.int(), wanted, strict=True):
        if code != PAD:
            assert row.tolist() == [[token, (token + 4) % EXPERTS], [token, (token + 1) % EXPERTS]]


def test_places_leave_dense_and_predicting_layers_out() -> None:
    moe = (3, 4, 5, 6, 7)  # three dense layers first, eight layers, and one that predicts tokens
    for rank in range(2):
        for stage in range(2):
            first = (stage * 2 + rank) * 2
            mine = [layer for layer in (first, first + 1) if layer in moe]
            wanted = stage_layers(moe, 8, pp_size=2, pp_rank=rank, vpp_size=2, vpp_rank=stage)
            assert places((*moe, 8), mine) == wanted
    assert places(moe, (7, 3)) == (4, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: places((1, 2), (1, 3)), r"\[3\] are missing"),
        (lambda: places((2, 1), (1,)), "ascending"),
        (lambda: zigzag(10, Layout(cp_size=2)), "2 x 2 context-parallel ranks, got 10"),
        (lambda: sbhd_index(2, 4, Layout(sp_size=3)), "4 positions to divide by 3"),
        (lambda: thd_index([0, 3, 5], Layout(sp_size=2)), "5 positions to divide by 2"),
        (lambda: align(torch.zeros(4, 2, dtype=torch.uint8), Layout(), layers=(0,)), r"got \[4, 2\]"),
        (lambda: align(torch.zeros(2, 4, 1, 2), Layout(), layers=(0,), cu_seqlens_padded=[0, 4]), "with or without"),
        (lambda: align(torch.zeros(4, 1, 2), Layout(), layers=(0,), cu_seqlens_padded=[0, 3]), "up to the 4 positions"),
        (lambda: align(torch.zeros(4, 1, 2), Layout(), layers=(0,), state=torch.zeros(3)), r"state \[4\] uint8"),
        (lambda: align_records([], 4, Layout(), layers=()), "got 0"),
        (lambda: align_records([record(torch.arange(9))], 7, Layout(), layers=(1,)), "record 0 ends at 8"),
        (
            lambda: align_records(
                [record(torch.arange(3)), record(torch.arange(3), layers=(1, 2))], 7, Layout(), layers=()
            ),
            "records of one model, got 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ScopeError, match=message):
        call()
