"""Packing: every position of every layout holds its own token, and what pack refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.kernels import launch, reference
from pacenote.kernels import pack as pack_module
from pacenote.kernels.pack import Layout, Ragged, pack, pack_ragged, stage_layers
from pacenote.kernels.spec import CACHED, DECODE, FREE, MISSING, PREFILL, RECOMPUTED, REPLAY
from tests.kernels.pack_checks import CHECKS
from tests.kernels.pack_oracle import NAN, Case, check, make
from tests.spy import spy

pytestmark = pytest.mark.usefixtures("poisoned")
CASES = settings(
    max_examples=60 if launch.INTERPRETED else 150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.sampled_from((5, 64, 256, 257, 4000)))
    layers, k = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    codes = draw(st.sampled_from([(PREFILL, DECODE, CACHED), (), (DECODE,), (PREFILL, DECODE, CACHED, RECOMPUTED)]))
    dtype = draw(st.sampled_from((np.uint8, np.uint16))) if experts <= 256 else np.uint16
    told = draw(st.booleans())
    cp, sp = draw(st.sampled_from((1, 1, 2, 3, 4))), draw(st.sampled_from((1, 1, 2, 3)))
    samples = []
    for number in range(draw(st.integers(0, 5))):
        n = draw(st.integers(0, 20))
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
    return Case(
        samples,
        experts=experts,
        layers=layers,
        k=k,
        max_len=draw(st.none() | st.integers(2, 24)),
        multiple=draw(st.integers(1, 5)),
        given=None if told and draw(st.booleans()) else experts,
        taken=draw(st.none() | st.lists(st.integers(0, layers - 1), max_size=4)),
        codes=codes,
        masked=draw(st.sampled_from([(), (), (RECOMPUTED,), (MISSING, RECOMPUTED), (PREFILL, DECODE)])),
        layout=Layout(
            cp_size=cp, cp_rank=draw(st.integers(0, cp - 1)), sp_size=sp, sp_rank=draw(st.integers(0, sp - 1))
        ),
    )


@CASES
@given(case=cases())
def test_every_position_holds_its_own_token(case: Case, device: torch.device) -> None:
    for sample in case.samples:
        for array in vars(sample).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # the samples are the rollout's
    check(case, device)


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


def test_targets_of_masked_provenance_do_not_train(device: torch.device) -> None:
    """Targets 2, 3 and 6 were generated; the row before 3 was recomputed."""
    mask = [0, 0, 1, 1, 0, 0, 1, 0]
    codes = [PREFILL, PREFILL, RECOMPUTED, DECODE, PREFILL, DECODE, DECODE]
    sample = make(0, mask, provenance=codes)
    batch = pack([sample, make(1, [0, 1], provenance=[RECOMPUTED])], device=device, mask_provenance=[RECOMPUTED])
    assert (batch.kept, batch.dropped) == ((0,), 1), "nothing is left of the second sample"
    assert batch.loss_mask.tolist() == [False, True, False, False, False, True, False]
    assert batch.logprobs[2] == 0


def test_masking_changes_which_version_a_row_serves(device: torch.device) -> None:
    """Row 0 serves the recomputed target's version 3 as long as that target trains, and version 4 when it does not."""
    sample = make(0, [0, 0, 1, 1], version=[4, 3, 3, 4], provenance=[PREFILL, RECOMPUTED, DECODE])
    states = [pack([sample], device=device, mask_provenance=codes).routes for codes in ((), (RECOMPUTED,))]
    assert [None if routes is None else routes.state.tolist() for routes in states] == [
        [FREE, FREE, FREE],
        [REPLAY, FREE, FREE],
    ]


def test_a_masked_logprob_may_be_anything(device: torch.device) -> None:
    spoilt = make(0, [0, 1, 1], provenance=[DECODE, RECOMPUTED])
    spoilt.logprobs[2] = NAN
    with pytest.raises(ValueError, match="finite logprobs"):
        pack([spoilt], device=device)
    batch = pack([spoilt], device=device, mask_provenance=[RECOMPUTED])
    assert batch.logprobs.tolist() == [spoilt.logprobs[1], 0.0]


def test_samples_without_rows_are_masked_as_missing(device: torch.device) -> None:
    """Whatever they say of the provenance of rows that they do not have."""
    sample = make(0, [0, 1, 1], experts=None, provenance=[DECODE, DECODE])
    assert pack([sample], device=device, mask_provenance=[DECODE]).kept == (0,)
    assert pack([sample], device=device, mask_provenance=[MISSING]).dropped == 1


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
BAD: list[tuple[list[Any], dict[str, Any], str]] = [
    ([GOOD], {"max_len": 1}, "max_len >= 2, got 1"),
    ([GOOD], {"pad_to_multiple": 0}, "pad_to_multiple >= 1, got 0"),
    ([GOOD], {"replay_provenance": [5]}, r"codes of provenance within 0\.\.4, got \[5\]"),
    ([GOOD], {"mask_provenance": [-1, 2]}, r"mask_provenance as codes of provenance within 0\.\.4, got \[-1, 2\]"),
    ([GOOD], {"layers": [0.5]}, r"layers as a list of places, got \[1\] of float64"),
    ([GOOD], {"layers": [False, True]}, r"layers as a list of places, got \[2\] of bool"),
    ([GOOD], {"advantages": [None]}, r"advantage as a number or \[3\], got \[\] of object"),
    ([GOOD], {"advantages": [1j]}, r"advantage as a number or \[3\], got \[\] of complex128"),
    ([replace(GOOD, provenance=np.array([258, 2]))], {}, r"sample 0's provenance within 0\.\.4, got 2\.\.258"),
    ([replace(GOOD, experts=np.zeros((2, 2, 0), np.uint8))], {}, r"1 layer or more and 1\.\.32 experts, got L=2, K=0"),
    ([replace(GOOD, experts=np.zeros((2, 0, 2), np.uint8))], {}, "got L=0, K=2"),
    ([replace(GOOD, experts=np.zeros((2, 1, 40), np.uint8))], {}, "got L=1, K=40"),
    (
        [make(0, [0, 1], dtype=np.uint16, told=False)],
        {"num_experts": 70_000},
        r"within 1\.\.65536, which uint16 holds, got 70000",
    ),
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
def test_what_does_not_fit_is_refused(samples: list[Any], arguments: dict[str, Any], words: str) -> None:
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


def test_samples_that_do_not_belong_together(device: torch.device) -> None:
    """A Ragged made by hand is checked: the kernel would read beyond what is too short."""
    samples = [make(0, [0, 1, 1, 0]), make(1, [0, 1])]
    ragged = Ragged.of(samples, max_len=None, advantages=None, num_experts=64, device=device)
    assert ragged.provenance is not None
    assert ragged.experts is not None
    for changed, words in (
        ({"kept": np.array([4])}, r"expected kept \[2\], got \[1\]"),
        ({"kept": np.array([4, 3])}, "tokens kept of each sample"),
        ({"kept": np.array([4, 1])}, "tokens kept of each sample"),
        ({"lengths": np.array([40, 2])}, r"expected tokens \[42\] of int32, got \[6\] of int32"),
        ({"has_rows": np.array([True])}, r"expected has_rows \[2\], got \[1\]"),
        ({"has_rows": np.array([True, False])}, r"expected experts \[3, any, any\]"),
        ({"tokens": ragged.tokens.long()}, r"expected tokens \[6\] of int32, got \[6\] of int64"),
        ({"loss_mask": ragged.loss_mask.byte()}, r"expected loss_mask \[6\] of bool"),
        ({"logprobs": ragged.logprobs.double()}, r"expected logprobs \[6\] of float32"),
        ({"advantages": ragged.advantages[:2]}, r"expected advantages \[6\]"),
        ({"provenance": ragged.provenance[:2]}, r"expected provenance \[4\]"),
        ({"provenance": None}, r"expected provenance as a tensor \[4\] of uint8, got NoneType"),
        ({"experts": ragged.experts[:3]}, r"expected experts \[4, any, any\]"),
        ({"fresh": ragged.loss_mask[:1]}, r"expected fresh \[4\] of bool"),
        ({"num_experts": 300}, "rows of 300 experts as uint16, got uint8"),
        ({"num_experts": 1}, "at most 1 experts a token, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(ragged, **changed)


def test_the_default_device_does_not_matter(device: torch.device) -> None:
    with torch.device("meta"):
        batch = pack([GOOD], device=device)
    assert batch.tokens.tolist() == [1000, 1001]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_stages_share_the_layers() -> None:
    """GLM-4.7-Flash: 47 layers, the first dense; multi-token prediction is layer 47. DeepSeek-V3: 61, three dense."""
    glm, deepseek = range(1, 47), range(3, 61)
    assert stage_layers(glm, 47, pp_size=1, pp_rank=0) == tuple(range(46))
    assert stage_layers([*glm, 47], 48, pp_size=4, pp_rank=0) == tuple(range(11))
    assert stage_layers(deepseek, 61, pp_size=61, pp_rank=2) == ()
    assert stage_layers([*deepseek, 61], 61, pp_size=1, pp_rank=0) == tuple(range(58)), "no row of the 62nd layer"
    for pp, vpp in ((2, 1), (4, 1), (2, 2), (3, 4)):
        chunks = {(v, r): stage_layers(range(1, 24), 24, pp_size=pp, pp_rank=r, vpp_size=vpp, vpp_rank=v)
                  for v in range(vpp) for r in range(pp)}  # fmt: skip
        assert sum((chunks[key] for key in sorted(chunks)), ()) == tuple(range(23)), "in order of chunk, then rank"
        assert len(chunks[0, 0]) == 24 // (pp * vpp) - 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pp_size": 2, "pp_rank": 2}, "0 <= rank < size, got pp_rank=2 of 2 and vpp_rank=0 of 1"),
        ({"pp_size": 5, "pp_rank": 0}, r"layers that divide into 5 x 1 equal runs, got 24: .*pass pack the places"),
        ({"pp_size": 2, "pp_rank": 0, "moe_layers": [3, 2]}, r"ascending ids of layers, got \[3, 2\]"),
    ],
)
def test_stages_that_are_none(fields: dict[str, Any], words: str) -> None:
    given = {"moe_layers": [2, 3], "num_layers": 24, **fields}
    with pytest.raises(ValueError, match=words):
        stage_layers(given.pop("moe_layers"), given.pop("num_layers"), **given)


def test_layouts_that_are_none() -> None:
    with pytest.raises(ValueError, match="0 <= cp_rank < cp_size, got cp_rank=2, cp_size=2"):
        Layout(cp_size=2, cp_rank=2)
    with pytest.raises(ValueError, match="sp_rank=-1, sp_size=1"):
        Layout(sp_rank=-1)
    with pytest.raises(ValueError, match="expected num_experts: padding"):
        pack([replace(GOOD, num_experts=None)], layout=Layout(cp_size=2))


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
def test_opcheck(rows: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's fake results have the shapes and dtypes of the real ones."""
    samples = [make(0, [0, 1, 1, 0], experts=64 if rows else None), make(1, [0, 1], experts=64 if rows else None)]
    calls = spy(monkeypatch, pack_module, "_pack")
    pack(samples, device=device, pad_to_multiple=4, num_experts=64)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pacenote.pack.default, calls[0], test_utils=checks)


def test_the_kernel_runs_where_it_should(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU and in the interpreter the kernel, else the definition."""
    from pacenote.kernels import pack_triton

    kernel, definition = spy(monkeypatch, pack_triton, "pack"), spy(monkeypatch, reference, "pack")
    pack([GOOD], device=device)
    on_triton = launch.INTERPRETED or device.type == "cuda"
    assert (len(kernel), len(definition)) == ((1, 0) if on_triton else (0, 1))


@pytest.mark.gpu
def test_no_wait_and_graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device; a captured launch packs what then stands in the sources."""
    samples = [make(i, [0, 1] * 300, layers=4) for i in range(4)]
    calls = spy(monkeypatch, pack_module, "_pack")
    pack(samples, device=device, num_experts=64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ragged = Ragged.of(samples, max_len=None, advantages=None, num_experts=64, device=device)
        expected = pack_ragged(ragged)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    args = calls[-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fields = torch.ops.pacenote.pack.default(*args)
    ragged.tokens.add_(1)
    graph.replay()
    assert torch.equal(fields[0], expected.tokens + 1)
    assert expected.routes is not None
    assert torch.equal(fields[7].transpose(0, 1), expected.routes.rows)
