"""Packing against a loop over tokens, with data that carries its token's identity, so that a shift cannot hide.

No pytest, so that a machine without it can run the checks as well. Legend: N tokens of a sample, T positions of a
rank's batch, L layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacenote.kernels.pack import Layout, PackedBatch, pack
from pacenote.kernels.spec import CACHED, DECODE, FREE, MISSING, PAD, PREFILL, REPLAY

NAN = float("nan")


@dataclass(frozen=True)
class Sample:
    """A trajectory as `kernels.ragged.Sample` says."""

    tokens: NDArray[Any]
    loss_mask: NDArray[Any]
    logprobs: NDArray[Any]
    experts: NDArray[Any] | None
    provenance: NDArray[Any]
    version: NDArray[Any]
    num_experts: int | None = None


def token_id(sample: int, place: int) -> int:
    """Another one for each token of each sample."""
    return 1000 * (sample + 1) + place


def logprob_of(token: int) -> float:
    """Exact in float32."""
    return -token / 1024


def expert_of(token: int, layer: int, slot: int, experts: int) -> int:
    """Another one for most tokens, layers and slots."""
    return (7 * token + 3 * layer + slot) % experts


def make(
    number: int,
    mask: Sequence[int],
    *,
    experts: int | None = 64,
    layers: int = 2,
    k: int = 2,
    provenance: Sequence[int] | None = None,
    version: Sequence[int] | None = None,
    dtype: Any = None,
    told: bool = True,
) -> Sample:
    """A sample of len(mask) tokens; everything about a token says which one it is."""
    n, rows = len(mask), max(len(mask) - 1, 0)
    tokens = [token_id(number, i) for i in range(n)]
    ids = None
    if experts is not None:
        token, layer, slot = np.array(tokens[:rows])[:, None, None], np.arange(layers)[:, None], np.arange(k)
        kind = dtype or (np.uint8 if experts <= 256 else np.uint16)
        ids = expert_of(token, layer, slot, experts).astype(kind).reshape(rows, layers, k)  # type: ignore[arg-type, attr-defined]
    trained = [bool(m) and i > 0 for i, m in enumerate(mask)]
    return Sample(
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array(mask, np.uint8),
        # what is not trained may be anything
        logprobs=np.array([logprob_of(t) if on else NAN for t, on in zip(tokens, trained, strict=True)], np.float32),
        experts=ids,
        provenance=np.array([DECODE] * rows if provenance is None else provenance[:rows], np.uint8),
        version=np.array([1] * n if version is None else version[:n], np.int32),
        num_experts=experts if told else None,
    )


@dataclass(frozen=True)
class Case:
    """Samples of rows [L, K] over `experts`, and the arguments of pack; `given` is its num_experts."""

    samples: Sequence[Sample]
    experts: int = 64
    layers: int = 2
    k: int = 2
    max_len: int | None = None
    multiple: int = 1
    given: int | None = None
    taken: Sequence[int] | None = None
    codes: Sequence[int] = (PREFILL, DECODE, CACHED)
    masked: Sequence[int] = ()
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Position:
    """What a position must hold; `token` is None in padding, `row` says whether it has one of its own."""

    segment: int
    position: int
    token: int | None = None
    trained: bool = False
    state: int = PAD
    row: bool = False


def naive_trained(sample: Sample, target: int, masked: Sequence[int]) -> bool:
    """Whether the loss mask and the provenance of the row before it let a token train."""
    row = MISSING if sample.experts is None else sample.provenance[target - 1]
    return bool(sample.loss_mask[target]) and row not in masked


def naive_state(sample: Sample, n: int, row: int, codes: Sequence[int], masked: Sequence[int]) -> int:
    """Replayed if its passes are known and its weights those of the logprob it serves: the next trained target's."""
    if sample.experts is None or sample.provenance[row] not in codes:
        return FREE
    served = [j + 1 for j in range(n - 1) if naive_trained(sample, j + 1, masked)]
    ahead = [target for target in served if target >= row + 1] or served[-1:]
    return REPLAY if sample.version[row] == sample.version[ahead[0]] else FREE


def naive(case: Case) -> tuple[list[Position], list[int]]:
    """The rank's positions one by one, and the numbers of the samples that have something to train on."""
    here: list[Position] = []
    kept: list[int] = []
    cp, rank = case.layout.cp_size, case.layout.cp_rank
    for number, sample in enumerate(case.samples):
        n = len(sample.tokens) if case.max_len is None else min(len(sample.tokens), case.max_len)
        if not any(naive_trained(sample, i, case.masked) for i in range(1, n)):
            continue
        segment = len(kept)
        kept.append(number)
        whole = [
            Position(
                segment,
                i,
                token_id(number, i),
                naive_trained(sample, i + 1, case.masked),
                naive_state(sample, n, i, case.codes, case.masked),
                sample.experts is not None,
            )
            for i in range(n - 1)
        ]
        if cp == 1:
            here += whole
            continue
        while len(whole) % (2 * cp):
            whole.append(Position(segment, len(whole)))
        size = len(whole) // (2 * cp)
        chunks = [whole[c * size : (c + 1) * size] for c in range(2 * cp)]
        here += chunks[rank] + chunks[2 * cp - 1 - rank]
    tail = 0
    while len(here) % case.multiple or len(here) % case.layout.sp_size:
        here.append(Position(-1, tail))
        tail += 1
    return here, kept


def run(case: Case, device: torch.device) -> PackedBatch:
    """The batch; advantages are as distinct as tokens."""
    return pack(
        case.samples,
        max_len=case.max_len,
        device=device,
        advantages=[s.tokens + np.where(s.loss_mask, 0.5, NAN) for s in case.samples],
        pad_to_multiple=case.multiple,
        num_experts=case.given,
        layers=case.taken,
        replay_provenance=case.codes,
        mask_provenance=case.masked,
        layout=case.layout,
    )


def check(case: Case, device: torch.device) -> PackedBatch:
    """Compare every array of the batch with the loop.

    Raises:
        AssertionError: they differ.
    """
    wanted, kept = naive(case)
    batch = run(case, device)
    assert batch.num_tokens == len(wanted), "positions"
    assert batch.padding == sum(p.token is None for p in wanted), "padding"
    assert (list(batch.kept), batch.num_samples, batch.dropped) == (kept, len(kept), len(case.samples) - len(kept))
    for array, dtype, values in (
        (batch.tokens, torch.int32, [p.token or 0 for p in wanted]),
        (batch.targets, torch.int64, [0 if p.token is None else p.token + 1 for p in wanted]),
        (batch.loss_mask, torch.bool, [p.trained for p in wanted]),
        (batch.logprobs, torch.float32, [logprob_of(p.token + 1) if p.token and p.trained else 0 for p in wanted]),
        (batch.advantages, torch.float32, [p.token + 1.5 if p.token and p.trained else 0 for p in wanted]),
        (batch.positions, torch.int64, [p.position for p in wanted]),
        (batch.segment_ids, torch.int32, [p.segment for p in wanted]),
    ):
        assert (array.dtype, array.device.type) == (dtype, device.type)
        assert array.tolist() == values
    lengths = [min(len(case.samples[i].tokens), case.max_len or 10**9) - 1 for i in kept]
    multiple = 2 * case.layout.cp_size if case.layout.cp_size > 1 else 1
    assert batch.cu_seqlens.dtype == batch.cu_seqlens_padded.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    padded = [n + -n % multiple for n in lengths]
    assert batch.cu_seqlens_padded.tolist() == [sum(padded[:i]) for i in range(len(lengths) + 1)]
    assert batch.old_logprobs is None
    check_routes(batch, wanted, kept, case)
    return batch


def check_routes(batch: PackedBatch, wanted: Sequence[Position], kept: Sequence[int], case: Case) -> None:
    """Rows and state of this rank's run of positions."""
    if all(case.samples[i].experts is None for i in kept):
        assert batch.routes is None
        return
    assert batch.routes is not None
    rows, state = batch.routes.rows, batch.routes.state
    run_ = len(wanted) // case.layout.sp_size
    mine = wanted[case.layout.sp_rank * run_ : (case.layout.sp_rank + 1) * run_]
    taken = range(case.layers) if case.taken is None else case.taken
    assert batch.routes.num_experts == case.experts
    assert rows.dtype == (torch.uint8 if case.experts <= 256 else torch.uint16)
    assert rows.shape == (run_, len(taken), case.k)
    assert all(rows[:, place].is_contiguous() for place in range(len(taken)))
    assert (state.dtype, state.tolist()) == (torch.uint8, [p.state for p in mine])
    for r, (row, p) in enumerate(zip(rows.tolist(), mine, strict=True)):
        nowhere = [(r * case.k + j) % case.experts for j in range(case.k)]
        for layer, ids in zip(taken, row, strict=True):
            own = [expert_of(p.token or 0, layer, j, case.experts) for j in range(case.k)]
            assert ids == (own if p.row else nowhere), f"row {r}, layer {layer}"
