"""Opting routers in: which instances change, what is refused, and how many launches are saved."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pacenote.kernels import reference
from pacenote.replay.errors import ReplayError, ScopeError, UnsupportedModel
from pacenote.replay.megatron import attach_megatron
from pacenote.replay.megatron_fused import check_fused
from pacenote.replay.megatron_router import router_spec, selection_spec
from tests.replay.megatron.pair import ROUTERS, Pair, assert_alike, mixed
from tests.replay.megatron.single import BATCH, LENGTH, foreign, ids, make, same, step

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "replay.md"


def test_only_the_chosen_instances_change_and_detach_restores_them() -> None:
    """Of the routers of one model, and of two models in one process."""
    from megatron.core.transformer.moe.router import TopKRouter

    from tests.replay.megatron.model import routers

    pair, method = Pair.of(), TopKRouter.routing
    pair.replays[1].detach()
    model, other = pair.models[1], make()
    before = [dict(vars(router)) for router in routers([model]).values()]
    replay = attach_megatron(model, fused={1, 3})
    assert replay.fused == (1, 3)
    assert ["routing" in vars(router) for router in routers([model]).values()] == [True, False, True]
    assert not any("routing" in vars(router) for router in routers([other, pair.models[0]]).values())
    assert TopKRouter.routing is method
    half = Pair(pair.models, (pair.replays[0], replay))
    assert_alike(half, mixed(replay))
    native = step(other)
    second = attach_megatron(other, fused=True)
    with replay.rows([mixed(replay)]):
        assert same(step(other), native)
        step(model)
    second.detach()
    replay.detach()
    replay.detach()
    after = [dict(vars(router)) for router in routers([model]).values()]
    assert [sorted(fields) for fields in after] == [sorted(fields) for fields in before]
    assert all(router.routing.__func__ is method for router in routers([model]).values())
    assert same(step(model), native)


def test_a_fused_model_has_the_state_of_any_other() -> None:
    model = make()
    state = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    replay = attach_megatron(model, fused=True)
    router = model.decoder.layers[1].mlp.router
    assert router.routing.__self__ is router.router_replay  # nothing else hangs on the router
    with replay.rows([mixed(replay)]):
        step(model)
    saved = model.state_dict()
    assert list(saved) == list(state)
    assert all(torch.equal(saved[name], value) for name, value in state.items() if isinstance(value, Tensor))


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts ops that give new numbers: views and empty tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliased = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliased)
        self.count += not (view or func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")))
        return func(*args, **(kwargs or {}))


def launches(fields: dict[str, Any], *, fused: bool) -> tuple[int, int]:
    """Of the second of two routers in training with padding: forward with its gate, and the whole model's backward.

    The op is one launch in either direction, as on a GPU. On a CPU its backward is autograd's, of the definition.
    """
    model = make(num_layers=3, **fields)
    replay, router = attach_megatron(model, fused=fused), model.decoder.layers[2].mlp.router
    forward, backward, whole = Launches(), Launches(), reference.replay_topk_backward

    def as_one(*args: Any, **kwargs: Any) -> Tensor:
        backward.count += 1
        with _disable_current_modes():
            return whole(*args, **kwargs)

    def start(*_: Any) -> None:
        forward.__enter__()  # type: ignore[no-untyped-call]

    def stop(*_: Any) -> None:
        forward.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    with torch.no_grad(), replay.rows([mixed(replay)]):  # makes the counters, once
        model(ids(), torch.arange(LENGTH).expand(BATCH, -1), None)
    router.register_forward_pre_hook(start, prepend=True)
    router.register_forward_hook(stop)
    with replay.rows([mixed(replay)]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "replay_topk_backward", as_one)
        losses = model(ids(), torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids().roll(-1, 1))
        with backward:
            losses.mean().backward()
    return forward.count, backward.count


def test_the_page_counts_the_launches_that_fusion_saves() -> None:
    lines = ["| router | forward | forward, fused | fewer in backward |", "|---|---|---|---|"]
    for title, kind in (
        ("sigmoid, bias (GLM-4.7-Flash)", "glm"),
        ("sigmoid, bias, groups (DeepSeek-V3)", "deepseek"),
        ("softmax over all", "softmax_pre"),
        ("softmax over the chosen", "softmax_post"),
    ):
        plain, fused = (launches(ROUTERS[kind], fused=fused) for fused in (False, True))
        fewer, rest = divmod(plain[1] - fused[1], 2)  # of both routers
        assert rest == 0
        assert fused[0] < plain[0]
        lines.append(f"| {title} | {plain[0]} | {fused[0]} | {fewer} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text("utf-8"), f"docs/replay.md counts other launches; it should say:\n{table}"


def double(router: Any) -> None:
    router.config.moe_router_dtype = "fp64"


def of_its_own(router: Any) -> None:
    asks = router.routing
    router.routing = lambda *args, **kwargs: asks(*args, **kwargs)


def of_another_class(router: Any) -> None:
    class Other(type(router)):  # type: ignore[misc]
        def routing(self, *args: Any, **kwargs: Any) -> Any:
            return super().routing(*args, **kwargs)

    router.__class__ = Other


def redefine(router: Any, code: str) -> None:
    """Another class of this router, with a routing() of this body; it calls by a name of its module, as Megatron's."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function as call

    names: dict[str, Any] = {"torch": torch, "topk_routing_with_score_function": call}
    exec(f"def routing(self, logits, padding_mask=None):\n{indent(dedent(code), '    ')}", names)
    router.__class__ = type("Redefined", (type(router),), {"routing": names["routing"]})


GIVEN = "self.topk, scaling_factor=1.8, score_function='sigmoid', expert_bias=self.expert_bias"


def in_float64(router: Any) -> None:
    redefine(
        router,
        f"""
        logits = logits.flatten(0, 1).double()
        return topk_routing_with_score_function(logits, {GIVEN}, router_replay=self.router_replay)
        """,
    )


def of_weights_a_token(router: Any) -> None:
    redefine(
        router,
        f"""
        logits = logits.flatten(0, 1)
        weights, experts = topk_routing_with_score_function(
            logits, {GIVEN}, router_replay=self.router_replay, dense_output=True
        )
        empty = torch.zeros_like(logits)
        return empty.scatter(1, experts, weights), empty.bool().scatter(1, experts, True)
        """,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_float64, "layer 2 .*got torch.float64"),
        (of_weights_a_token, "layer 2 .*dense_output=True"),
        (double, "layer 2 .*float64 logits"),
        (of_its_own, "layer 2 .*routing.. set on this instance"),
        (of_another_class, "layer 2 .*Other that does not call"),
    ],
)
def test_routers_that_cannot_be_fused_exactly_are_refused(change: Any, reason: str) -> None:
    """Each with its reason, and only where they are opted in; nothing stays on any router."""
    from tests.replay.megatron.model import routers

    model = make()
    router = model.decoder.layers[2].mlp.router
    router.config = copy.copy(router.config)
    change(router)
    before = [dict(vars(found)) for found in routers([model]).values()]
    for fused in (True, {2}):
        with pytest.raises(UnsupportedModel, match=reason):
            attach_megatron(model, fused=fused)
    assert [dict(vars(found)) for found in routers([model]).values()] == before
    attach_megatron(model, fused={1, 3}).detach()


def test_a_router_that_would_route_otherwise_is_refused(one_process: Path) -> None:
    """The last look at attach, before anything is put on a router."""
    model = make()
    router, config = model.decoder.layers[2].mlp.router, model.config
    spec, selection = router_spec(config), selection_spec(config)
    check_fused(router, spec, selection)
    for other in (replace(spec, scale=1.9), replace(spec, groups=4, topk_groups=1), replace(spec, score="softmax")):
        with pytest.raises(UnsupportedModel, match=r"layer 2 .* to route alike when fused"):
            check_fused(router, other, selection)
    assert router.router_replay is None


def test_a_call_that_does_not_ask_for_recorded_experts_is_left_to_megatron() -> None:
    """A class that also looks at its own choice gets that, and the replayed one, each where it asks for it."""
    pair = Pair.of()
    for replay in pair.replays:
        replay.detach()
    for model in pair.models:
        redefine(
            model.decoder.layers[2].mlp.router,
            f"""
            logits = logits.flatten(0, 1)
            self.own = topk_routing_with_score_function(logits, {GIVEN})[1]
            return topk_routing_with_score_function(logits, {GIVEN}, router_replay=self.router_replay)
            """,
        )
    curious = Pair(pair.models, (attach_megatron(pair.models[0]), attach_megatron(pair.models[1], fused=True)))
    found = assert_alike(curious, foreign(curious.replays[1]))
    plain, fused = (model.decoder.layers[2].mlp.router for model in curious.models)
    assert torch.equal(plain.own, fused.own)
    assert not torch.equal(fused.own, found.routed[1][1])


@pytest.mark.parametrize("fused", [{0}, [4], [-1], (1, 9), "glm"])
def test_layers_that_do_not_route_are_refused(fused: Any) -> None:
    with pytest.raises(ReplayError, match="global ids of MoE layers, below 4, got"):
        attach_megatron(make(), fused=fused)


def test_what_a_scope_promises_holds_for_fused_routers() -> None:
    model = make()
    replay = attach_megatron(model, fused=True)
    native = step(model)
    with pytest.raises(ScopeError, match=r"expected 23 tokens.*layer 1"), replay.rows([foreign(replay)[1:]]):
        step(model)
    with replay.rows([foreign(replay)]):
        step(model)
        with pytest.raises(ScopeError, match="one more"):
            step(model)
    assert same(step(model), native)


def test_logits_that_become_float64_later_are_refused() -> None:
    model = make(moe_router_dtype=None)
    replay = attach_megatron(model, fused=True)
    model.double()
    with pytest.raises(UnsupportedModel, match=r"got torch\.float64"), replay.rows([foreign(replay)]):
        step(model)
