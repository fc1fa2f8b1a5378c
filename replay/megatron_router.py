"""megatron-core's TopKRouter: what can be replayed of it, its spec, and the object that answers its top-k.

TopKRouter (megatron-core 0.19) asks `self.router_replay.get_replay_topk(...)`, where that attribute is set, for the
experts of every token, and computes the weights itself from the scores at those experts. So an object of ours on the
attribute is the whole integration: weights and gradients are Megatron's own arithmetic on the router's own logits.

Legend: T tokens at a router (sequence and batch flattened, in this order), E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE, REPLAY, RouterSpec
from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.megatron_step import Read

_CHECK_ROWS = 64

Choose = Callable[..., tuple[Tensor, Tensor]]


class Driver(Protocol):
    """Who knows which rows are current."""

    def take(self, seat: Seat, scores: Tensor) -> tuple[Read, RouteStats | None] | None:
        """Rows for the router with scores [T, E], and where to count them; None leaves the choice to it."""

    def chosen(self, seat: Seat, experts: Tensor) -> None:
        """The experts [T, K] that the router goes on with."""


class Seat:
    """Sits at `router.router_replay`, and behind the router as a forward hook that takes padding out of its answer.

    Attributes:
        router: the TopKRouter.
        chunk: number of the model chunk it is in.
        index: place of its layer on the L axis of this rank's rows.
        layer: global id of the layer, from 0.
    """

    def __init__(self, router: Any, driver: Driver, selection: RouterSpec, *, chunk: int, index: int) -> None:
        """Nothing is put on the router yet: `take_seat` does."""
        self.router, self.chunk, self.index, self.layer = router, chunk, index, router.layer_number - 1
        # TopKRouter.set_layer_number writes here.
        self.layer_number: int = router.layer_number
        self._driver, self._selection = driver, selection
        self._pads: Tensor | None = None
        self._before: Any = None
        self._handle: Any = None

    def take_seat(self) -> None:
        """Put this object on the router."""
        self._before, self.router.router_replay = self.router.router_replay, self
        self._handle = self.router.register_forward_hook(self._leave_padding_out)

    def leave_seat(self) -> None:
        """Give the router back what it had."""
        self.router.router_replay = self._before
        self._handle.remove()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Choose | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, K] and experts [T, K] int64 of scores [T, E]: TopKRouter's question, by its name and signature."""
        assert default_compute_topk is not None, "TopKRouter always passes its own choice"
        taken = self._driver.take(self, scores)
        self._pads = None if taken is None else taken[0].pads
        if taken is None:
            values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        else:
            read, stats = taken
            values, experts = replayed(scores, read.experts, self._selection, state=read.state, stats=stats)
        self._driver.chosen(self, experts)
        return values, experts

    def _leave_padding_out(self, router: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Padding keeps its K spread experts, since dispatchers count on K a token, with weight 0 and uncounted."""
        pads, self._pads = self._pads, None
        if pads is None:
            return None
        probs, routing_map = output
        uncount_padding(router, routing_map, pads)
        return probs.masked_fill(pads, 0.0), routing_map


def uncount_padding(router: Any, routing_map: Tensor, pads: Tensor) -> None:
    """Take the pads [T, 1] bool of a map [T, E] out of the tokens per expert that TopKRouter counts for its biases.

    Where it counts none, in evaluation and in a checkpointed forward pass, none are taken out.
    """
    if router.enable_expert_bias and torch.is_grad_enabled():
        with torch.no_grad():
            router.local_tokens_per_expert -= (routing_map & pads).sum(dim=0)


def replayed(
    scores: Tensor, rows: Tensor, selection: RouterSpec, *, state: Tensor | None = None, stats: RouteStats | None = None
) -> tuple[Tensor, Tensor]:
    """Values [T, K] of scores [T, E] at the experts [T, K] that rows [T, K] name, or the best where they cannot.

    One launch checks, falls back and counts; the values are gathered from the scores, so that gradients reach them.
    """
    with torch.no_grad():
        _, experts = replay_topk(scores, rows, selection, state=state, stats=stats)
    return scores.gather(1, experts), experts


def router_spec(config: Any) -> RouterSpec:
    """How routers of a TransformerConfig weigh experts (`topk_routing_with_score_function` of moe_utils.py).

    Raises:
        UnsupportedModel: a score function that no spec describes.
    """
    score, pre_softmax = config.moe_router_score_function, config.moe_router_pre_softmax
    if score not in ("softmax", "sigmoid"):
        raise UnsupportedModel(f"expected moe_router_score_function softmax or sigmoid, got {score!r}")
    kind: Literal["softmax", "sigmoid", "softmax_topk"] = "softmax" if pre_softmax else "softmax_topk"
    kind = "sigmoid" if score == "sigmoid" else kind
    renormalize = score == "sigmoid" and config.moe_router_topk > 1
    return RouterSpec(
        score=kind,
        renormalize=renormalize,
        eps=1e-20 if renormalize else 0.0,
        scale=float(config.moe_router_topk_scaling_factor or 1.0),
        weight_dtype="logits",
        **_groups(config),
    )


def selection_spec(config: Any) -> RouterSpec:
    """How the experts are chosen from what TopKRouter passes for it: scores, biased already, that count as they are."""
    return RouterSpec(score="softmax_topk", **_groups(config))


def _groups(config: Any) -> dict[str, Any]:
    if not config.moe_router_group_topk:
        return {}
    groups, topk = config.moe_router_num_groups, config.moe_router_group_topk
    return {"groups": groups, "topk_groups": topk, "group_score": "topk_share"}


def refuse(config: Any) -> None:
    """Raise for settings of a TransformerConfig under which replay would be silently off or inexact.

    Raises:
        UnsupportedModel: with every such setting and its reason.
    """
    reasons = list(_reasons(config))
    if reasons:
        raise UnsupportedModel("expected a config whose routing can be replayed exactly, got " + "; ".join(reasons))


def _reasons(config: Any) -> Iterator[str]:
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if config.num_moe_experts is None:
        yield "num_moe_experts=None: the model has no routers"
        return
    if config.moe_router_fusion:
        yield "moe_router_fusion=True: the fused kernel never asks for recorded experts; set it to False"
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in kinds:
            yield f"moe_router_load_balancing_type={kind}: it balances a batch and never asks for recorded experts"
    if config.moe_expert_capacity_factor is not None or config.moe_token_dropping:
        yield "token dropping (moe_expert_capacity_factor, moe_token_dropping): recorded experts would be dropped again"
    if config.moe_expert_rank_capacity_factor is not None:
        yield "moe_expert_rank_capacity_factor: a rank that is full drops recorded experts"
    if config.moe_router_force_load_balancing or config.moe_router_force_biased is not None:
        yield "moe_router_force_load_balancing or moe_router_force_biased: logits are not the router's own"
    if config.overlap_moe_expert_parallel_comm:
        yield "overlap_moe_expert_parallel_comm: its schedule takes layers apart, so no forward pass of a chunk is seen"
    if config.transformer_impl == "inference_optimized":
        yield "transformer_impl=inference_optimized: a compiled router that is not the training one"
    captured = {str(getattr(name, "name", name)) for name in config.cuda_graph_modules or ()}
    if config.cuda_graph_impl != "none" and not (captured and captured <= {"attn", "mlp", "mamba"}):
        yield "cuda_graph_impl over routers: a captured graph repeats the rows of its capture; capture attn or mlp only"


class _Probe:
    """Answers a router during the self-check, and counts how often it was asked."""

    def __init__(self, rows: Tensor, state: Tensor, selection: RouterSpec) -> None:
        self.asked, self._rows, self._state, self._selection = 0, rows, state, selection

    def get_replay_topk(self, scores: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.asked += 1
        return replayed(scores, self._rows, self._selection, state=self._state)


@torch.no_grad()
def self_check(router: Any, spec: RouterSpec, selection: RouterSpec) -> None:
    """Route random logits [64, 1, E] through the module: own choice, rows half free and half recorded, and weights.

    Without gradients TopKRouter counts nothing and records no loss, so nothing of the module changes.

    Raises:
        UnsupportedModel: the module does not ask for experts, chooses or weighs them in another way than its spec.
    """
    where = name(router)
    if router.weight.device.type == "meta":
        raise UnsupportedModel(f"expected loaded weights, got {where} on the meta device: attach after loading")
    logits, rows, state = example(router)
    probe, before = _Probe(rows, state, selection), router.router_replay
    try:
        router.router_replay = None
        _, own = router.routing(logits)
        router.router_replay = probe
        probs, used = router.routing(logits)
    finally:
        router.router_replay = before
    if probe.asked != 1:
        raise UnsupportedModel(
            f"expected {where} to ask its router_replay for experts once, it did {probe.asked} times"
        )
    wanted = torch.where((state == FREE)[:, None], own, torch.zeros_like(own).scatter(1, rows, True))
    if not torch.equal(used, wanted):
        share = float((used != wanted).any(1).float().mean())
        raise UnsupportedModel(f"expected {where} to choose as {selection}, {share:.0%} of the choices differ")
    chosen = used.nonzero()[:, 1].view(rows.shape)
    mine, _ = replay_topk(logits.flatten(0, 1), chosen, spec)
    error = float((mine - probs.gather(1, chosen)).abs().max())
    if not error <= rounding(spec):
        raise UnsupportedModel(f"expected {where} to weigh as {spec}, the weights differ by {error:.3g}")


def example(router: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits [64, 1, E], valid rows [64, K] int64, and states [64] of which half are free, on its device."""
    device, experts = router.weight.device, router.config.num_moe_experts
    generator = torch.Generator().manual_seed(router.layer_number)
    logits = torch.randn(_CHECK_ROWS, 1, experts, generator=generator)
    rows = torch.rand(_CHECK_ROWS, experts, generator=generator).argsort(1)[:, : router.topk]
    state = torch.tensor([FREE, REPLAY], dtype=torch.uint8).repeat(_CHECK_ROWS // 2)
    return logits.to(device), rows.to(device), state.to(device)


def rounding(spec: RouterSpec) -> float:
    """How far apart float32 weights may be: at most `scale` large, a few steps off by another order of the same sum."""
    return 4 * torch.finfo(torch.float32).eps * max(1.0, spec.scale)


def name(router: Any) -> str:
    """What errors call a router."""
    return f"the router of layer {router.layer_number - 1} ({type(router).__name__})"


def find_routers(chunk: nn.Module) -> list[Any]:
    """The TopKRouters of a chunk's decoder layers by layer number; those of multi-token-prediction layers are left out.

    Raises:
        UnsupportedModel: a router of another class, or two of one layer.
    """
    from megatron.core.transformer.moe.router import Router, TopKRouter

    routers: list[Any] = [m for m in chunk.modules() if isinstance(m, Router) and not m.is_mtp_layer]
    for router in routers:
        if not isinstance(router, TopKRouter):
            raise UnsupportedModel(f"expected TopKRouter modules, got {type(router).__name__}: nothing can answer it")
    numbers = [router.layer_number for router in routers]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedModel(f"expected one router a layer, got layer numbers {numbers}")
    return sorted(routers, key=lambda router: int(router.layer_number))
