"""Routing replay: every check of `route_checks`, and the op among autograd, torch.compile, CUDA graphs and users."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels import launch, reference
from pacenote.kernels.route import RouteStats, _backward, _fields, _forward, replay_topk
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec
from tests.kernels.route_checks import CHECKS
from tests.kernels.route_oracle import FAMILIES, Inputs, compare_choice, no_worse, of_family

pytestmark = pytest.mark.usefixtures("poisoned")
SIGMOID = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=1.8)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@pytest.mark.parametrize(
    ("values", "opened", "right", "wrong"),
    [
        # Groups of two; the first two tie but for rounding. The third has an expert as good as the first one's best.
        ([2, 1, 1.6, 1.4 - 2e-7, 2, 0.9, 0, 0], 1, [[0, 1], [2, 3]], [[0, 2], [4, 1], [1, 0], [3, 2], [4, 5]]),
        # No tie: one choice, whatever the scores in closed groups.
        ([2, 1, 1.6, 1.3, 2, 0.9, 0, 0], 1, [[0, 1]], [[2, 3], [4, 1], [0, 5]]),
        # The first group is open, and one of the next two, which tie; an open group must not be passed over.
        ([3, 2, 1, 1, 1.5, 0.5, 0, 0], 2, [[0, 1, 2], [0, 1, 3], [0, 1, 4]], [[0, 1, 5], [0, 4, 2], [0, 4, 1]]),
        # Equal scores within a group change places, and no others.
        ([2, 2 + 2e-7, 1, 0, 0, 0, 0, 0], 1, [[0, 1], [1, 0]], [[0, 2], [2, 0]]),
    ],
)
def test_choices_are_compared_up_to_rounding(
    values: list[float], opened: int, right: list[list[int]], wrong: list[list[int]]
) -> None:
    """What `check` accepts of scores that select is the comparison's own; this is what it lets pass."""
    spec = RouterSpec(score="sigmoid", groups=4, topk_groups=opened)
    inputs = Inputs(torch.zeros(1, 8), torch.zeros(1, len(right[0])).int(), spec, bias=torch.tensor(values))
    every, theirs = torch.tensor([True]), torch.tensor(right[:1])
    for choice in right:
        compare_choice(inputs, torch.tensor([choice]), theirs, every, exact=False)
    for choice in wrong:
        with pytest.raises(AssertionError, match="own choice"):
            compare_choice(inputs, torch.tensor([choice]), theirs, every, exact=False)


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm-4.7-flash", "deepseek-v2", "gpt-oss", "phimoe"])
def test_opcheck(name: str, device: torch.device) -> None:
    inputs = of_family(name, tokens=9).on(device)
    fields = _fields(inputs.spec)
    logits = torch.where((inputs.state == PAD)[:, None], 0.0, inputs.logits).requires_grad_()  # type: ignore[index]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for count, load in ((False, False), (True, False), (True, True)):
        args: tuple[Any, ...] = (logits, inputs.rows, inputs.state, inputs.bias, count, load, *fields)
        torch.library.opcheck(torch.ops.pacenote.replay_topk.default, args, test_utils=checks)
    if not launch.takes_triton(logits) or inputs.spec.score == "sparsemixer":
        return
    weights, experts, *_ = _forward(*args)
    backward = (logits.detach(), experts, inputs.state, torch.ones_like(weights.detach()), *fields)
    torch.library.opcheck(torch.ops.pacenote.replay_topk_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradcheck(name: str, device: torch.device) -> None:
    spec = FAMILIES[name].spec
    experts = 9 if spec.groups == 3 else 8
    logits = torch.randn(3, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    state = torch.tensor([REPLAY, FREE, PAD], dtype=torch.uint8, device=device)
    rows = torch.tensor([[5, 2, 7]] * 3, device=device)[:, : FAMILIES[name].k]
    # The choice does not follow the small steps of a numerical gradient.
    _, chosen = replay_topk(logits, rows, spec, state=state)

    def weights(x: Tensor) -> Tensor:
        return replay_topk(x, chosen, spec, state=state)[0]

    assert torch.autograd.gradcheck(weights, logits.requires_grad_())


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3", "gpt-oss", "phimoe"])
def test_compiles_whole(name: str, device: torch.device) -> None:
    inputs = of_family(name, tokens=33).on(device)
    stats = RouteStats.zeros(device, inputs.logits.shape[1])
    assert stats.load is not None

    def loss(x: Tensor) -> Tensor:
        weights, experts = replay_topk(
            x * 2, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats
        )
        return (weights.float() * (experts % 5 + 1)).sum()

    parts = stats.counters, stats.margin, stats.load
    logits = torch.where((inputs.state == PAD)[:, None], 0.0, inputs.logits)  # type: ignore[index]
    plain, compiled = (logits.clone().requires_grad_() for _ in range(2))
    loss(plain).backward()  # type: ignore[no-untyped-call]
    once = [part.clone() for part in parts]
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert compiled.grad is not None
    assert torch.equal(plain.grad, compiled.grad)
    assert not stats.margin.requires_grad
    for part, first in zip(parts, once, strict=True):
        assert torch.equal(part, 2 * first)
        assert first.any()


def test_compiles_once_for_any_length(device: torch.device) -> None:
    """Microbatches differ in length; the checks of arguments must not ask for a fixed one."""
    inputs = of_family("glm-4.7-flash", tokens=60).on(device)
    stats = RouteStats.zeros(device, inputs.logits.shape[1])
    compiled = torch.compile(replay_topk, backend="aot_eager", fullgraph=True, dynamic=True)
    assert inputs.state is not None
    for tokens in (60, 17, 33):
        logits, rows, state = (x[:tokens].clone() for x in (inputs.logits, inputs.rows, inputs.state))
        args: Any = logits, rows, inputs.spec
        given: dict[str, Any] = {"state": state, "bias": inputs.bias, "stats": stats}
        with torch.compiler.set_stance("fail_on_recompile" if tokens < 60 else "default"):
            got = compiled(*args, **given)
        assert all(torch.equal(a, b) for a, b in zip(got, replay_topk(*args, **given), strict=True))


def test_autocast_changes_nothing(device: torch.device) -> None:
    for name in ("qwen3-plain", "glm-4.7-flash", "gpt-oss", "phimoe"):
        inputs = of_family(name).on(device)
        outs = []
        for enabled in (False, True):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                outs.append(replay_topk(inputs.logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias))
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_unused_weights_have_no_gradient(device: torch.device) -> None:
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    weights, experts = replay_topk(logits, torch.tensor([[0, 1]] * 5, device=device), SIGMOID)
    assert not experts.requires_grad
    (weights * 0).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_gradients_of_strided_arguments(device: torch.device) -> None:
    """The backward op by itself, with a gradient, experts and state that are views."""
    inputs = of_family("qwen3-plain", tokens=70).on(device)
    logits, spec, state = torch.nan_to_num(inputs.logits), inputs.spec, inputs.state
    if not launch.takes_triton(logits):
        pytest.skip("the backward op is the kernel's")
    assert state is not None
    _, experts = replay_topk(logits, inputs.rows, spec, state=state)
    grad = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)).to(device).t()
    views = (experts.t().contiguous().t(), state.repeat_interleave(2)[::2], grad)
    got = _backward(logits.t().contiguous().t(), *views, *_fields(spec))
    plain, gold = (
        reference.replay_topk_backward(x, experts, spec, grad.to(x.dtype), state=state)
        for x in (logits, logits.double())
    )
    no_worse("gradient", got, plain, gold, torch.float32)


def test_backward_fills_no_zeros_for_results_without_a_gradient(device: torch.device) -> None:
    """Experts, counts, margin and load have none; each would cost a launch a layer."""
    inputs, filled = of_family("glm-4.7-flash", tokens=9).on(device), []
    logits, stats = inputs.logits.requires_grad_(), RouteStats.zeros(device)
    weights, _ = replay_topk(logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats)

    class Zeros(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            filled.extend([str(func)] if func.overloadpacket.__name__ == "zeros" else [])
            return func(*args, **(kwargs or {}))

    grad = torch.ones_like(weights)
    with Zeros():  # type: ignore[no-untyped-call]
        assert torch.autograd.grad(weights, logits, grad)[0].shape == logits.shape
    assert filled == []
    given = (logits, inputs.rows, inputs.state, inputs.bias, True, False, *_fields(inputs.spec))
    margin = _forward(*given)[3]  # a count, though a float
    (nothing,) = torch.autograd.grad(margin, logits, torch.ones_like(margin), allow_unused=True)
    assert nothing is None


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"logits": torch.zeros(3, 4, 5)},
            r"expected logits \[any, any\] of float64 or .*, got \[3, 4, 5\] of float32",
        ),
        ({"logits": torch.zeros(3, 4).long()}, r"expected logits .*got \[3, 4\] of int64"),
        ({"rows": torch.zeros(2, 2).int()}, r"expected rows \[3, any\] of uint8 or .*, got \[2, 2\] of int32"),
        ({"rows": torch.zeros(3, 2)}, r"expected rows .*got \[3, 2\] of float32"),
        ({"rows": torch.zeros(3, 2).int().numpy()}, r"expected rows as a tensor \[3, any\] .*got ndarray"),
        ({"rows": torch.zeros(3, 0).int()}, r"expected 1 <= K <= min\(E, 32\) and E <= 1024, got K=0, E=4"),
        ({"rows": torch.zeros(3, 5).int()}, r"got K=5, E=4"),
        ({"logits": torch.zeros(3, 1025)}, r"got K=2, E=1025"),
        ({"logits": torch.zeros(3, 40), "rows": torch.zeros(3, 33).int()}, r"got K=33, E=40"),
        (
            {"logits": torch.zeros(3, 257), "rows": torch.zeros(3, 2).byte()},
            r"rows of 257 experts as uint16.*got uint8",
        ),
        (
            {"spec": RouterSpec(score="sigmoid", groups=3)},
            r"groups that divide E=4 and hold K=2 .*groups=3, topk_groups=1",
        ),
        ({"spec": RouterSpec(score="sigmoid", groups=4)}, r"hold K=2 experts when open, got groups=4, topk_groups=1"),
        ({"state": torch.ones(3)}, r"expected state \[3\] of uint8, got \[3\] of float32"),
        ({"state": torch.ones(4).byte()}, r"expected state \[3\] of uint8, got \[4\] of uint8"),
        ({"bias": torch.zeros(3)}, r"expected bias \[4\] of float32 or bfloat16 or float16, got \[3\] of float32"),
        ({"bias": torch.zeros(4).double()}, r"expected bias \[4\] .*got \[4\] of float64"),
        ({"rows": torch.zeros(3, 2, device="meta").int()}, r"expected rows on .* as the other arguments, got meta"),
        (
            {"stats": replace(RouteStats.zeros(), counters=torch.zeros(8))},
            r"expected stats\.counters \[8\] of int64, got \[8\] of float32",
        ),
        (
            {"stats": replace(RouteStats.zeros(), margin=torch.zeros(1))},
            r"expected stats\.margin \[1\] of float64, got \[1\] of float32",
        ),
        ({"stats": RouteStats.zeros(num_experts=5)}, r"expected stats\.load \[4\] of int64, got \[5\] of int64"),
        ({"stats": RouteStats.zeros("meta")}, r"expected stats\.counters on .* got meta: move it first"),
    ],
)
def test_refuses(changed: dict[str, Any], words: str, device: torch.device) -> None:
    args: dict[str, Any] = {"logits": torch.zeros(3, 4), "rows": torch.zeros(3, 2).int(), "spec": SIGMOID, **changed}
    args = {
        key: value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value
        for key, value in args.items()
    }
    stats = args.setdefault("stats", RouteStats.zeros(device))
    if stats.counters.device.type != "meta":
        load = None if stats.load is None else stats.load.to(device)
        stats = args["stats"] = RouteStats(stats.counters.to(device), stats.margin.to(device), load)
    with pytest.raises(ValueError, match=words):
        replay_topk(args.pop("logits"), args.pop("rows"), args.pop("spec"), **args)
    if stats.counters.device.type != "meta":
        assert not any(stats.counts().values())
        assert stats.margin == 0
        assert stats.load is None or not stats.load.any()


# --- where it runs ---------------------------------------------------------------------------------------------------


def test_mode_is_what_it_says(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU and in the interpreter the kernel runs, else the definition, as float64 and sparsemixer always do."""
    from pacenote.kernels import route_triton

    launched: list[torch.dtype] = []
    monkeypatch.setattr(route_triton, "forward", lambda logits, rows, *_, **__: _record(launched, logits, rows))
    for dtype, spec in (
        (torch.float32, SIGMOID),
        (torch.float64, SIGMOID),
        (torch.float32, FAMILIES["phimoe"].spec),
    ):
        logits = torch.zeros(3, 4, dtype=dtype, device=device)
        replay_topk(logits, torch.zeros(3, 2, dtype=torch.int32, device=device), spec)
    assert launched == ([torch.float32] if launch.INTERPRETED or device.type == "cuda" else [])


def _record(into: list[torch.dtype], logits: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    into.append(logits.dtype)
    empty = [logits.new_zeros(0, dtype=kind) for kind in (torch.int64, torch.float64, torch.int64)]
    return torch.zeros(rows.shape, device=logits.device), rows.long(), *empty


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepseek-v3", "phimoe"])
def test_no_wait_and_graphs(name: str, device: torch.device) -> None:
    """Nothing waits for the device; a captured graph replays with what then stands in its arguments."""
    inputs = of_family(name, tokens=4096).on(device)
    logits = torch.nan_to_num(inputs.logits).requires_grad_()
    stats = RouteStats.zeros(device, inputs.logits.shape[1])
    given: dict[str, Any] = {"state": inputs.state, "bias": inputs.bias, "stats": stats}

    def step() -> tuple[Tensor, Tensor]:
        weights, experts = replay_topk(logits, inputs.rows, inputs.spec, **given)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        return experts, grad

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts, grad = step()
    with torch.no_grad():
        logits.copy_(logits.roll(1, dims=0))
    graph.replay()
    got = experts.clone(), grad.clone()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
def test_more_than_2_31_logits(device: torch.device) -> None:
    tokens = 2**31 // 1024 + 70
    logits = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device=device)
    logits[-3:] = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    logits.requires_grad_()
    rows = torch.full((tokens, 2), -1, dtype=torch.int32, device=device)
    spec = RouterSpec(score="softmax")
    weights, experts = replay_topk(logits, rows, spec)
    weights[-3:].sum().backward()  # type: ignore[no-untyped-call]
    tail = Inputs(logits.detach()[-3:], rows[-3:], spec)
    definition = reference.replay_topk(tail.logits, tail.rows, spec)
    assert torch.equal(experts[-3:], definition.experts)
    assert logits.grad is not None
    expected = reference.replay_topk_backward(tail.logits, experts[-3:], spec, torch.ones(3, 2, device=device))
    torch.testing.assert_close(logits.grad[-3:], expected)
    assert not logits.grad[: tokens // 2].any()
