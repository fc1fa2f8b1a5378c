"""The sort of pairs by expert: every check of `permute_checks`, random shapes, and the op among compilers and users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.kernels import launch, reference
from pacenote.kernels.permute import Permutation, permutation
from pacenote.kernels.route import RouteStats, replay_topk
from tests.kernels.permute_checks import CHECKS, check, random
from tests.kernels.route_oracle import of_family

pytestmark = pytest.mark.usefixtures("poisoned")
IDS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@settings(
    max_examples=40 if launch.INTERPRETED else 100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape(data: Any, device: torch.device) -> None:
    num_experts = data.draw(st.one_of(st.integers(1, 20), st.integers(1, 1024)))
    tokens, k = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 32))
    dtype = data.draw(st.sampled_from(IDS if num_experts < 256 else IDS[1:]))
    share = data.draw(st.sampled_from((0.0, 0.1, 1.0)))
    seed = data.draw(st.integers(0, 2**20))
    check(random(tokens, k, num_experts, dtype=dtype, dropped=share, device=device, seed=seed), num_experts)


@pytest.mark.parametrize("dtype", IDS)
def test_the_definition_is_a_stable_sort(dtype: torch.dtype, device: torch.device) -> None:
    """The definition against Python, one pair at a time."""
    experts = random(60, 3, 7, dtype=dtype, dropped=0.2, device=device)
    bins = [e if 0 <= e < 7 else 7 for row in experts.tolist() for e in row]
    out = reference.permutation(experts, 7)
    assert out.order.tolist() == sorted(range(180), key=lambda pair: bins[pair])
    assert [out.order[place].item() for place in out.place.flatten().tolist()] == list(range(180))
    assert out.offsets.tolist() == [sum(b < e for b in bins) for e in range(8)]


def test_runs_are_the_load_of_a_routing(device: torch.device) -> None:
    """What a router counts is how long the runs are; the experts of padding rows, which it leaves out, set to none."""
    inputs = of_family("glm-4.7-flash", tokens=70).on(device)
    stats = RouteStats.zeros(device, 64)
    _, experts = replay_topk(inputs.logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats)
    assert inputs.state is not None
    assert stats.load is not None
    experts = torch.where((inputs.state == 2)[:, None], -1, experts)
    assert permutation(experts, 64).offsets.diff().tolist() == stats.load.tolist()


# --- the op ----------------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    for experts in (
        random(90, 4, 16, dropped=0.1, device=device),
        random(8, 3, 16, dtype=torch.uint8, device=device).t(),
    ):
        torch.library.opcheck(torch.ops.pacenote.permutation.default, (experts, 16))


def test_compiles_once_for_any_length(device: torch.device) -> None:
    def gathered(experts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        sort = permutation(experts, 16)
        return hidden[sort.token.long()], sort.offsets

    compiled = torch.compile(gathered, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (33, 20, 70):
        experts, hidden = random(tokens, 4, 16, device=device), torch.randn(tokens, 8, device=device)
        with torch.compiler.set_stance("default" if tokens == 33 else "fail_on_recompile"):
            got = compiled(experts, hidden)
        assert all(torch.equal(a, b) for a, b in zip(got, gathered(experts, hidden), strict=True))


def test_mode_is_what_it_says(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU and in the interpreter the kernel runs, else the definition."""
    defined, definition = [], reference.permutation

    def record(experts: Tensor, num_experts: int) -> Permutation:
        defined.append(num_experts)
        return definition(experts, num_experts)

    monkeypatch.setattr(reference, "permutation", record)
    permutation(random(5, 2, 4, device=device), 4)
    assert defined == ([] if launch.INTERPRETED or device.type == "cuda" else [4])


@pytest.mark.parametrize(
    ("experts", "num_experts", "words"),
    [
        (torch.zeros(3).int(), 4, r"expected experts \[any, any\] of uint8 or uint16 or .*, got \[3\] of int32"),
        (torch.zeros(3, 2), 4, r"expected experts .*got \[3, 2\] of float32"),
        (torch.zeros(3, 2).bool(), 4, r"got \[3, 2\] of bool"),
        (torch.zeros(3, 0).int(), 4, r"expected 1 <= K <= 32 and 1 <= E <= 1024, got K=0, E=4"),
        (torch.zeros(3, 33).int(), 4, r"got K=33, E=4"),
        (torch.zeros(3, 2).int(), 0, r"got K=2, E=0"),
        (torch.zeros(3, 2).int(), 1025, r"got K=2, E=1025"),
        (torch.zeros(3, 2).byte(), 257, r"expected ids of 257 experts as uint16, int32 or int64, got uint8"),
        (torch.zeros(1, 1).int().expand(2**29, 4), 4, r"expected T K < 2\^31 pairs, got T=536870912, K=4"),
    ],
)
def test_refuses(experts: Tensor, num_experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        permutation(experts, num_experts)


@pytest.mark.gpu
def test_no_wait_and_graphs(device: torch.device) -> None:
    """Nothing waits for the device; a captured graph sorts what then stands in its argument."""
    experts, other = (random(4096, 8, 256, device=device, seed=seed) for seed in (0, 1))
    permutation(experts, 256)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        permutation(experts, 256)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = permutation(experts, 256)
    experts.copy_(other)
    graph.replay()
    expected = check(other, 256)
    assert torch.equal(out.order, expected.order)
    assert torch.equal(out.offsets, expected.offsets)
