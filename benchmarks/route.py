"""Routing replay against its definition in plain torch, torch.compile of that, and megatron-core's router.

    python -m benchmarks.route --out benchmarks/results

`plain` is `reference.replay_topk`: it also finds the router's own choice of every row, as the counts need it.
`megatron` is `topk_routing_with_score_function`, for replayed rows with its RouterReplay: it gathers what it is given,
checks no row and counts nothing. By itself it returns weights and a map [T, E]; `megatron-topk` asks for [T, K].
`pacenote-map` is the op laid out as such maps, as a fused megatron router of `attach_megatron` does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, peers
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.models import MODELS, Model
from pacenote.kernels import reference
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE
from pacenote.replay.megatron_fused import spread
from tests.kernels import route_oracle
from tests.kernels.route_oracle import Inputs

Route = Callable[[Tensor, Inputs, RouteStats | None], tuple[Tensor, Tensor]]
"""From logits [T, E] to weights and experts [T, K], or of megatron-core weights and a map [T, E]."""
Router = Implementation[Inputs] | Absent


@dataclass(frozen=True, slots=True)
class Work:
    """The forward pass of rows that are replayed or free, counted or not, or forward and backward."""

    name: str
    free: bool = False
    count: bool = False
    backward: bool = False


WORKS = (
    Work("replay"),
    Work("replay, counted", count=True),
    Work("free", free=True),
    Work("replay and backward", backward=True),
)


# --- inputs and what is right ----------------------------------------------------------------------------------------


def make(model: Model, tokens: int, work: Work, device: torch.device, seed: int) -> Inputs:
    """Valid rows from a slightly different router, as a rollout engine's are."""
    family = model.family
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(tokens, model.experts, generator=g, device=device)
    noise = torch.randn(tokens, model.experts, generator=g, device=device)
    bias = torch.randn(model.experts, generator=g, device=device) * 0.1 if family.bias else None
    rows = reference.native_topk(logits + 0.02 * noise, model.k, family.spec, bias)
    state = torch.full((tokens,), FREE, dtype=torch.uint8, device=device) if work.free else None
    return Inputs(logits.to(model.logits), rows.to(model.ids), family.spec, state, bias)


def upstream(inputs: Inputs) -> Tensor:
    """[T, K] a gradient of the weights; not constant, of which renormalised weights would leave nothing."""
    g = torch.Generator(inputs.logits.device).manual_seed(1)
    grad = torch.randn(inputs.rows.shape, generator=g, device=inputs.logits.device)
    return grad.to(reference.weight_dtype(inputs.logits.dtype, inputs.spec))


def floor(inputs_of: Model, tokens: int, work: Work) -> Floor:
    """The least that has to be read and written; the launchers of `route_triton` give the formulas."""
    experts, k, size = inputs_of.experts, inputs_of.k, inputs_of.logits.itemsize
    spec = inputs_of.family.spec
    whole = spec.score == "softmax"
    weight = reference.weight_dtype(inputs_of.logits, spec).itemsize
    chosen = min(32 * k, experts * size)  # single numbers are read in sectors of 32 bytes
    row = experts * size if whole or work.free or work.count else chosen
    total = row + k * (inputs_of.ids.itemsize + weight + 8) + work.free
    if work.backward:
        total += experts * size + (experts * size if whole else chosen) + k * (weight + 8)
    return Floor(bytes=tokens * total)


def check(work: Work, inputs: Inputs, result: Any) -> None:
    """Weights and experts, or the gradient, are those of the definition.

    Raises:
        AssertionError: they are not.
    """
    if work.backward:
        check_gradient(inputs, *result)
        return
    check_choice(inputs, *result)
    if work.count:  # and the op itself against float64, at this size, counts included
        route_oracle.check(inputs, inputs.logits.device)


def check_choice(inputs: Inputs, weights: Tensor, experts: Tensor) -> None:
    """Weights and experts [T, K], or a map [T, E] instead of experts, in any order within a row.

    A router breaks ties as it likes: where it chooses for itself, other experts of the same score are right as well.
    """
    spec, k = inputs.spec, inputs.rows.shape[1]
    if experts.dtype == torch.bool:
        experts = experts.int().sort(dim=1, descending=True, stable=True).indices[:, :k]
        weights = weights.gather(1, experts)
    expected = reference.replay_topk(inputs.logits, inputs.rows, spec, state=inputs.state, bias=inputs.bias)
    (mine, a), (theirs, b) = experts.sort(dim=1), expected.experts.sort(dim=1)
    same = (mine == theirs).all(dim=1)
    other = ~same
    if inputs.state is None:
        assert same.all(), f"other experts than the recorded ones in {int(other.sum())} rows"
    else:
        select = reference.selection(inputs.logits.double(), spec, inputs.bias)
        best, wanted = (select.gather(1, ids).sort(dim=1).values for ids in (mine, theirs))
        other = (best - wanted).abs().amax(dim=1) > 1e-6 * select.abs().max()
        # Groups whose scores tie but for rounding are rare, and open other experts.
        assert other.float().mean() < 1e-4, f"experts of other scores in {int(other.sum())} rows"
    by_expert = (weights.gather(1, a) - expected.weights.gather(1, b))[same]
    by_size = (weights.sort(dim=1).values - expected.weights.sort(dim=1).values)[~other]
    error = torch.cat([by_expert, by_size]).abs().max()
    allowed = 4 * torch.finfo(expected.weights.dtype).eps * expected.weights.max()
    assert error <= allowed, f"weights are {float(error):.3g} off, at most {float(allowed):.3g}"


def check_gradient(inputs: Inputs, grad: Tensor) -> None:
    """The gradient [T, E] of the logits, for replayed rows and the upstream gradient."""
    experts, logits = inputs.rows.long(), inputs.logits.double()
    gold = reference.replay_topk_backward(logits, experts, inputs.spec, upstream(inputs).double())
    error = (grad.double() - gold).norm() / gold.norm()
    assert error <= 8 * torch.finfo(grad.dtype).eps, f"gradient is {float(error):.3g} of its norm off"


# --- who does it -----------------------------------------------------------------------------------------------------


def ours(logits: Tensor, inputs: Inputs, stats: RouteStats | None) -> tuple[Tensor, Tensor]:
    """The op; weights and experts [T, K] of logits [T, E]."""
    return replay_topk(logits, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats)


def mapped(logits: Tensor, inputs: Inputs, stats: RouteStats | None) -> tuple[Tensor, Tensor]:
    """The op; probs and map [T, E] of logits [T, E]."""
    return spread(*ours(logits, inputs, stats), logits.shape[1])


def plain(logits: Tensor, inputs: Inputs, stats: RouteStats | None) -> tuple[Tensor, Tensor]:
    """The definition; weights and experts [T, K] of logits [T, E]."""
    rows, spec, bias = inputs.rows, inputs.spec, inputs.bias
    out = reference.replay_topk(logits, rows, spec, state=inputs.state, bias=bias)
    if stats is not None and stats.load is not None:
        stats.counters.add_(reference.route_counts(out, rows))
        stats.margin.add_(reference.route_margin(out, logits, rows, spec, bias))
        stats.load.add_(reference.route_load(out, logits.shape[1]))
    return out.weights, out.experts


def implementation(route: Route, work: Work, note: str = "") -> Implementation[Inputs]:
    """A route whose call gives weights and experts, or the gradient of the logits."""

    def bind(inputs: Inputs) -> Callable[[], Any]:
        experts = inputs.logits.shape[1]
        stats = RouteStats.zeros(inputs.logits.device, experts) if work.count else None
        if not work.backward:
            return torch.no_grad()(lambda: route(inputs.logits, inputs, stats))
        leaf, grad = inputs.logits.detach().requires_grad_(), upstream(inputs)
        dense = grad.new_zeros(leaf.shape).scatter(1, inputs.rows.long(), grad)

        def both() -> Any:
            weights, _ = route(leaf, inputs, stats)
            return torch.autograd.grad(weights, leaf, grad if weights.shape == grad.shape else dense)

        return both

    return Implementation(bind=bind, note=note)


def compiled(work: Work, setting: harness.Setting) -> Router:
    """The definition, compiled."""
    if work.count or work.free:
        return Absent("only plain replay is compiled, with its backward pass: the rest is the same code")
    found = setting.compile(plain)
    return found if isinstance(found, Absent) else implementation(found, work)


def megatron(work: Work, model: Model, **options: Any) -> Router:
    """megatron-core's router; its own replay holds what is replayed, as int64."""
    module, replaying = peers.megatron(), peers.megatron("router_replay")
    if not isinstance(module, ModuleType) or not isinstance(replaying, ModuleType):
        return module if isinstance(module, Absent) else Absent("this megatron-core has no router replay")
    if work.count:
        return Absent("megatron-core counts no replayed, refused or flipped rows")
    if options.get("fused") and not module.HAVE_TE:
        return Absent("megatron-core's fused router is transformer-engine's, which is not installed")
    if options.get("fused") and not work.free:
        return Absent("megatron-core's fused router does not know its router replay")
    spec = model.family.spec
    given = {
        "score_function": "sigmoid" if spec.score == "sigmoid" else "softmax",
        "scaling_factor": None if spec.scale == 1.0 else spec.scale,
        "num_groups": spec.groups if spec.groups > 1 else None,
        "group_topk": spec.topk_groups if spec.groups > 1 else None,
        **options,
    }

    def bind(inputs: Inputs) -> Callable[[], Any]:
        replay = None
        if not work.free:
            replay = replaying.RouterReplay()
            replaying.RouterReplay.clear_global_router_replay_instances()
            replay.set_target_indices(inputs.rows.long())
            replay.set_router_replay_action(replaying.RouterReplayAction.REPLAY_FORWARD)

        def route(logits: Tensor, inputs: Inputs, stats: RouteStats | None) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = module.topk_routing_with_score_function(
                logits, inputs.rows.shape[1], expert_bias=inputs.bias, router_replay=replay, **given
            )
            return found

        return implementation(route, work).bind(inputs)

    return Implementation(bind=bind, note="" if work.free else "rows made int64 beforehand; none is checked")


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """Every work at one shape."""
    model = MODELS[name]
    for work in WORKS:
        implementations: dict[str, Router] = {
            OURS: implementation(ours, work),
            "pacenote-map": implementation(mapped, work),
            "plain": implementation(plain, work),
            "compiled": compiled(work, setting),
            "megatron": megatron(work, model),
            "megatron-topk": megatron(work, model, dense_output=True),
            "megatron-fused": megatron(work, model, fused=True),
            "liger": Absent("liger-kernel has no router: its fused mixture of experts begins with chosen experts"),
            "torch": Absent("torch has no fused router"),
        }
        yield Case(
            model=name,
            tokens=tokens,
            work=work.name,
            shape={
                "experts": model.experts,
                "k": model.k,
                "logits": str(model.logits)[6:],
                "rows": str(model.ids)[6:],
            },
            floor=floor(model, tokens, work),
            make=partial(make, model, tokens, work, setting.device),
            check=partial(check, work),
            implementations=implementations,
        )


if __name__ == "__main__":
    sys.exit(harness.main("route", __doc__.splitlines()[0], cases))
