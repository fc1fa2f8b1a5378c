"""Packing against a loop over tokens, with data that carries its token's identity, so that a shift cannot hide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pacenote.kernels import reference
from pacenote.kernels.pack import PackedBatch, pack
from pacenote.kernels.spec import CACHED, DECODE, FREE, MISSING, PAD, PREFILL, RECOMPUTED, REPLAY

NAN = float("nan")
CASES = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[Any]
    loss_mask: NDArray[Any]
    logprobs: NDArray[Any]
    experts: NDArray[Any] | None
    provenance: NDArray[Any]
    version: NDArray[Any]
    num_experts: int | None = None


def token_id(sample: int, place: int) -> int:
    return 1000 * (sample + 1) + place


def logprob_of(token: int) -> float:
    """Exact in float32."""
    return -token / 1024


def expert_of(token: int, layer: int, slot: int, experts: int) -> int:
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
        table = [[[expert_of(t, la, j, experts) for j in range(k)] for la in range(layers)] for t in tokens[:rows]]
        kind = dtype or (np.uint8 if experts <= 256 else np.uint16)
        ids = np.array(table, dtype=kind).reshape(rows, layers, k)
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


def naive_state(sample: Sample, n: int, row: int, codes: Sequence[int]) -> int:
    """Replayed if its passes are known and its weights those of the logprob it serves: the next trained target's."""
    if sample.experts is None or sample.provenance[row] not in codes:
        return FREE
    served = [j + 1 for j in range(n - 1) if sample.loss_mask[j + 1]]
    ahead = [target for target in served if target >= row + 1] or served[-1:]
    return REPLAY if sample.version[row] == sample.version[ahead[0]] else FREE


def naive_pack(samples: Sequence[Sample], max_len: int | None, codes: Sequence[int]) -> list[dict[str, Any]]:
    """One dict a position, of the samples with something to train on."""
    positions: list[dict[str, Any]] = []
    segment = 0
    for number, sample in enumerate(samples):
        n = len(sample.tokens) if max_len is None else min(len(sample.tokens), max_len)
        if not any(sample.loss_mask[i] for i in range(1, n)):
            continue
        for i in range(n - 1):
            trained = bool(sample.loss_mask[i + 1])
            positions.append(
                {
                    "token": token_id(number, i),
                    "target": token_id(number, i + 1),
                    "trained": trained,
                    "logprob": logprob_of(token_id(number, i + 1)) if trained else 0.0,
                    "advantage": token_id(number, i + 1) + 0.5 if trained else 0.0,
                    "position": i,
                    "segment": segment,
                    "number": number,
                    "state": naive_state(sample, n, i, codes),
                }
            )
        segment += 1
    return positions


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from((5, 64, 256, 257, 4000)))
    layers, k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    codes = draw(st.sampled_from([None, (), (DECODE,), (PREFILL, DECODE, CACHED, RECOMPUTED)]))
    dtype = draw(st.sampled_from((np.uint8, np.uint16))) if experts <= 256 else np.uint16
    told = draw(st.booleans())
    samples = []
    for number in range(draw(st.integers(0, 5))):
        n = draw(st.integers(0, 7))
        bits = st.lists(st.sampled_from((0, 1)), min_size=n, max_size=n)
        samples.append(
            make(
                number,
                draw(bits),
                experts=experts if draw(st.integers(0, 3)) else None,
                layers=layers,
                k=k,
                provenance=draw(st.lists(st.integers(MISSING, RECOMPUTED), min_size=n, max_size=n)),
                version=draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)),
                dtype=dtype,
                told=told,
            )
        )
    return {
        "samples": samples,
        "experts": experts,
        "given": None if told and draw(st.booleans()) else experts,
        "k": k,
        "layers": draw(st.none() | st.lists(st.integers(0, layers - 1), max_size=4)),
        "of": layers,
        "max_len": draw(st.none() | st.integers(2, 8)),
        "multiple": draw(st.integers(1, 5)),
        "codes": codes,
    }


def run(case: dict[str, Any], device: torch.device) -> PackedBatch:
    extra = {} if case["codes"] is None else {"replay_provenance": case["codes"]}
    return pack(
        case["samples"],
        max_len=case["max_len"],
        device=device,
        advantages=[s.tokens + np.where(s.loss_mask, 0.5, NAN) for s in case["samples"]],
        pad_to_multiple=case["multiple"],
        num_experts=case["given"],
        layers=case["layers"],
        **extra,
    )


@CASES
@given(case=cases())
def test_every_position_holds_its_own_token(case: dict[str, Any], device: torch.device) -> None:
    for sample in case["samples"]:
        for array in vars(sample).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # the samples are the rollout's
    codes = (PREFILL, DECODE, CACHED) if case["codes"] is None else case["codes"]
    wanted = naive_pack(case["samples"], case["max_len"], codes)
    batch = run(case, device)
    real, total = len(wanted), len(wanted) + -len(wanted) % case["multiple"]
    assert (batch.num_tokens, batch.padding) == (total, total - real)
    for array, name, filler, dtype in (
        (batch.tokens, "token", 0, torch.int32),
        (batch.targets, "target", 0, torch.int64),
        (batch.loss_mask, "trained", False, torch.bool),
        (batch.logprobs, "logprob", 0.0, torch.float32),
        (batch.advantages, "advantage", 0.0, torch.float32),
        (batch.segment_ids, "segment", -1, torch.int32),
    ):
        assert (array.dtype, array.device.type) == (dtype, device.type)
        assert array.tolist() == [p[name] for p in wanted] + [filler] * batch.padding
    assert batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [p["position"] for p in wanted] + list(range(batch.padding))
    kept = list(dict.fromkeys(p["number"] for p in wanted))
    assert list(batch.kept) == kept
    assert (batch.num_samples, batch.dropped) == (len(kept), len(case["samples"]) - len(kept))
    starts = [i for i, p in enumerate(wanted) if p["position"] == 0]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [*starts, real]
    assert batch.old_logprobs is None
    check_routes(batch, wanted, case)


def check_routes(batch: PackedBatch, wanted: list[dict[str, Any]], case: dict[str, Any]) -> None:
    samples, experts, k = case["samples"], case["experts"], case["k"]
    if all(samples[i].experts is None for i in batch.kept):
        assert batch.routes is None
        return
    assert batch.routes is not None
    rows, state = batch.routes.rows, batch.routes.state
    layers = list(range(case["of"])) if case["layers"] is None else case["layers"]
    assert batch.routes.num_experts == experts
    assert rows.dtype == (torch.uint8 if experts <= 256 else torch.uint16)
    assert rows.shape == (batch.num_tokens, len(layers), k)
    assert all(rows[:, place].is_contiguous() for place in range(len(layers)))
    assert state.dtype == torch.uint8
    assert state.tolist() == [p["state"] for p in wanted] + [PAD] * batch.padding
    for row, position in zip(rows.tolist(), wanted, strict=False):
        if samples[position["number"]].experts is not None:
            token = position["token"]
            assert row == [[expert_of(token, layer, j, experts) for j in range(k)] for layer in layers]
        else:
            assert all(len(set(ids)) == k and max(ids) < experts for ids in row)
    filler = rows[len(wanted) :].long()
    for place in range(len(layers)):
        load = filler[:, place].flatten().bincount(minlength=experts)
        assert all(len(set(ids)) == k for ids in filler[:, place].tolist())
        assert len(load) == experts
        assert not len(filler) or int(load.max() - load.min()) <= 1


def test_inputs_are_left_alone(device: torch.device) -> None:
    samples = [make(0, [0, 1, 1, 0]), make(1, [0, 0, 1])]
    before = [{name: np.copy(value) for name, value in vars(s).items()} for s in samples]
    batch = pack(samples, device=device, num_experts=64, pad_to_multiple=4, advantages=[1.0, 2.0])
    assert batch.routes is not None
    for array in (batch.tokens, batch.loss_mask, batch.logprobs, batch.routes.rows, batch.routes.state):
        array.fill_(1)
    for sample, copies in zip(samples, before, strict=True):
        for name, value in vars(sample).items():
            assert np.array_equal(value, copies[name], equal_nan=name == "logprobs")


def test_inputs_are_what_a_model_takes(device: torch.device) -> None:
    batch = pack([make(0, [0, 1, 1]), make(1, [0, 1])], device=device, pad_to_multiple=4)
    assert set(batch.inputs) == {"input_ids", "position_ids", "use_cache"}
    assert batch.inputs["use_cache"] is False
    assert batch.inputs["input_ids"].tolist() == [[1000, 1001, 2000, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 0]]
    assert batch.inputs["input_ids"].dtype == batch.inputs["position_ids"].dtype == torch.int64


def test_nothing_to_train_on(device: torch.device) -> None:
    """0- and 1-token samples, an empty mask, a mask on the first token only, and one that truncation empties."""
    samples = [make(0, []), make(1, [1]), make(2, [0, 0, 0]), make(3, [1, 0]), make(4, [0, 0, 0, 1])]
    batch = pack(samples, device=device, max_len=3, pad_to_multiple=8)
    assert (batch.num_samples, batch.kept, batch.dropped, batch.num_tokens, batch.padding) == (0, (), 5, 0, 0)
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.routes is None
    assert batch.inputs["input_ids"].shape == (1, 0)
    assert pack(samples, device=device, max_len=4).kept == (4,)
    assert pack([], device=device).num_tokens == 0


def test_max_len_counts_tokens(device: torch.device) -> None:
    batch = pack([make(0, [0, 1, 1, 1, 1])], device=device, max_len=3)
    assert batch.tokens.tolist() == [1000, 1001]
    assert batch.targets.tolist() == [1001, 1002]
    assert batch.cu_seqlens.tolist() == [0, 2]


def test_a_long_sample_without_rows_is_cut_like_any(device: torch.device) -> None:
    """It may have more rows before truncation than the whole batch has positions."""
    batch = pack([make(0, [0, 1, 1]), make(1, [0, 1] + [1] * 50, experts=None)], device=device, max_len=3)
    assert batch.routes is not None
    assert batch.routes.rows.shape == (4, 2, 2)
    assert batch.routes.state.tolist() == [REPLAY, REPLAY, FREE, FREE]


def test_advantages_by_sample(device: torch.device) -> None:
    samples = [make(0, [0, 1, 0, 1]), make(1, [0, 0]), make(2, [0, 1])]
    batch = pack(samples, device=device, advantages=[0.5, NAN, np.array(-2.0)])
    assert batch.advantages.tolist() == [0.5, 0.0, 0.5, -2.0]
    assert not pack(samples, device=device).advantages.any()


def test_a_row_is_replayed_under_the_weights_of_its_logprobs(device: torch.device) -> None:
    """Weights changed between two turns: the first turn's rows are stale for the second turn's targets."""
    mask, version = [0, 0, 1, 1, 0, 0, 1, 0], [3, 3, 3, 3, 3, 4, 4, 4]
    codes = [PREFILL, CACHED, DECODE, DECODE, PREFILL, RECOMPUTED, DECODE]
    batch = pack([make(0, mask, version=version, provenance=codes)], device=device)
    assert batch.routes is not None
    # Rows 0..2 serve targets 2 and 3, of version 3; rows 3..5 serve target 6, of version 4; row 6 follows it.
    assert batch.routes.state.tolist() == [REPLAY, REPLAY, REPLAY, FREE, FREE, FREE, REPLAY]


def test_ids_as_wide_as_the_experts_never_as_the_data(device: torch.device) -> None:
    small = make(0, [0, 1], experts=256)
    assert small.experts is not None
    wide = replace(small, experts=small.experts.astype(np.uint16))
    untold = replace(wide, num_experts=None)
    kinds = []
    for sample, given_experts in ((small, None), (wide, None), (untold, None), (untold, 256), (untold, 257)):
        routes = pack([sample], device=device, num_experts=given_experts).routes
        assert routes is not None
        assert routes.rows.tolist() == small.experts.tolist()
        kinds.append(routes.rows.dtype)
    assert kinds == [torch.uint8, torch.uint8, torch.uint16, torch.uint8, torch.uint16]


GOOD = make(0, [0, 1, 1])
BAD: list[tuple[list[Sample], dict[str, Any], str]] = [
    ([GOOD], {"max_len": 1}, "max_len >= 2 and pad_to_multiple >= 1, got 1 and 1"),
    ([GOOD], {"pad_to_multiple": 0}, "got None and 0"),
    ([GOOD], {"advantages": [1.0, 2.0]}, "an advantage for each of 1 samples, got 2"),
    ([GOOD], {"advantages": [np.ones(2)]}, r"sample 0's advantage as a number or \[3\], got \[2\]"),
    ([GOOD], {"advantages": [np.ones(1)]}, r"sample 0's advantage as a number or \[3\], got \[1\]"),
    ([make(0, [0, 0])], {"advantages": [np.ones(3)]}, r"sample 0's advantage as a number or \[2\], got \[3\]"),
    ([GOOD], {"advantages": [NAN]}, "finite advantages for trained tokens, got nan for token 1 of sample 0"),
    ([GOOD], {"layers": [2]}, r"layers within the 2 of the samples' rows, got \[2\]"),
    ([GOOD], {"layers": [-1]}, "layers within the 2"),
    ([GOOD], {"num_experts": 65}, r"one number of experts, got \[64, 65\]"),
    ([GOOD, make(1, [0, 1], experts=32)], {}, r"one number of experts, got \[32, 64\]"),
    ([GOOD, make(1, [0, 1], layers=3)], {}, r"rows of one shape \[L, K\], got \[\(2, 2\), \(3, 2\)\]"),
    ([replace(GOOD, num_experts=None)], {"pad_to_multiple": 4}, "expected num_experts: padding"),
    ([replace(GOOD, num_experts=None), make(1, [0, 1], experts=None)], {}, "samples without rows"),
    ([replace(GOOD, num_experts=None)], {"num_experts": 300}, "rows of 300 experts as uint16, got uint8"),
    ([make(0, [0, 1, 1], experts=4000, told=False)], {"num_experts": 256}, "ids above 255"),
    ([make(0, [0, 1], experts=4, k=4, told=False)], {"num_experts": 3}, "at most 3 experts a token, got 4"),
    ([replace(GOOD, loss_mask=GOOD.loss_mask[:2])], {}, r"sample 0's loss_mask \[3\] for its 3 tokens, got \[2\]"),
    ([GOOD, replace(GOOD, logprobs=GOOD.logprobs[1:])], {}, r"sample 1's logprobs \[3\] .*got \[2\]"),
    ([replace(GOOD, version=GOOD.version[1:])], {}, r"version \[3\]"),
    ([replace(GOOD, provenance=np.zeros(3, np.uint8))], {}, r"provenance \[2\] for its 3 tokens, got \[3\]"),
    ([replace(GOOD, experts=np.zeros((3, 2, 2), np.uint8))], {}, r"experts \[2, L, K\] .*got \[3, 2, 2\] of uint8"),
    ([replace(GOOD, experts=np.zeros((2, 2), np.uint8))], {}, r"got \[2, 2\] of uint8"),
    ([replace(GOOD, experts=np.zeros((2, 2, 2), np.int32))], {}, r"uint8 or uint16 .*got \[2, 2, 2\] of int32"),
    ([replace(GOOD, tokens=GOOD.tokens + 0.5)], {}, "sample 0's tokens as integers, got float64"),
    ([replace(GOOD, tokens=GOOD.tokens.astype(np.int64) + 2**32)], {}, "sample 0's tokens within int32"),
    ([replace(GOOD, loss_mask=GOOD.loss_mask * 0.5)], {}, "loss_mask as integers or booleans, got float64"),
]


@pytest.mark.parametrize(("samples", "arguments", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_does_not_fit_is_refused(samples: list[Sample], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(samples, **arguments)


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_a_trained_token_has_a_finite_logprob(value: float) -> None:
    """The message names the sample as it was given, not as it was kept."""
    spoilt = make(1, [0, 0, 1, 1])
    spoilt.logprobs[2] = value
    words = f"expected finite logprobs for trained tokens, got {value} for token 2 of sample 1: mask the token or drop"
    with pytest.raises(ValueError, match=words):
        pack([make(0, [0, 0]), spoilt])
    assert pack([make(0, [0, 1]), spoilt], max_len=2).dropped == 1, "what is cut away is not looked at"


# --- sums by segment -------------------------------------------------------------------------------------------------


@CASES
@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
def test_segments_are_summed_in_order(
    lengths: list[int], padding: int, seed: int, wide: bool, device: torch.device
) -> None:
    rng = np.random.default_rng(seed)
    ids = [s for s, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    kind = np.float64 if wide else np.float32
    values = (rng.normal(size=len(ids)) * 10.0 ** rng.integers(-6, 6, size=len(ids))).astype(kind)
    mask, sums, means = rng.random(len(ids)) < 0.6, [], []
    for s in range(len(lengths)):
        total, part, count = kind(0), kind(0), 0
        for value, owner, on in zip(values, ids, mask, strict=True):
            if owner == s:
                total = total + value
                part, count = (part + value, count + 1) if on else (part, count)
        sums.append(float(total))
        means.append(float(part / kind(max(count, 1))))
    packed = torch.tensor(values, device=device), torch.tensor(ids, dtype=torch.int32, device=device)
    got = reference.segment_sum(*packed, len(lengths))
    average = reference.segment_mean(packed[0], torch.tensor(mask, device=device), packed[1], len(lengths))
    if got.is_cuda:
        assert got.tolist() == pytest.approx(sums, rel=1e-5, abs=1e-5)
    else:
        assert got.tolist() == sums
        assert average.tolist() == means
