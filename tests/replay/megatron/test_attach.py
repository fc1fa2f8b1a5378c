"""Attach to megatron-core chunks, refuse what cannot be replayed exactly, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.replay.errors import ReplayError, ScopeError, UnsupportedModel
from pacenote.replay.megatron import attach_megatron
from tests.replay.megatron.single import BATCH, LENGTH, foreign, ids, make, same, step

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]


@pytest.fixture
def tiny(one_process: Path) -> Any:
    """A model whose routers are those of GLM-4.7-Flash."""
    return make()


def test_detach_leaves_everything_as_it_was() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from tests.replay.megatron.model import routers

    untouched = make()
    listed = len(RouterReplay.global_router_replay_instances)
    flagged = make(moe_enable_routing_replay=True)
    ours = list(RouterReplay.global_router_replay_instances[listed:])
    for model, before in ((make(), [None] * 3), (flagged, ours)):
        hooks = {name: count_hooks(module) for name, module in model.named_modules()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        native = step(model)
        replay = attach_megatron(model)
        assert same(step(model), native)  # attached, outside a scope: Megatron's own routing
        with replay.rows([foreign(replay)]):
            assert not same(step(model), native)
        replay.detach()
        replay.detach()
        assert [router.router_replay for router in routers([model]).values()] == before
        assert {name: count_hooks(module) for name, module in model.named_modules()} == hooks
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        assert same(step(model), native)
        with pytest.raises(ScopeError, match="detached"), replay.rows([foreign(replay)]):
            pass
    assert RouterReplay.global_router_replay_instances[listed:] == ours
    RouterReplay.global_router_replay_instances[listed:] = []
    assert all(router.router_replay is None for router in routers([untouched]).values())


def count_hooks(module: Any) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_other_models_of_the_process_route_as_ever(tiny: Any) -> None:
    critic = make(num_layers=3)
    native = step(critic)
    replay = attach_megatron(tiny)
    with replay.rows([foreign(replay)]):
        assert same(step(critic), native)
        step(tiny)


def test_layers_of_multi_token_prediction_are_left_alone() -> None:
    model = make(mtp_num_layers=1)
    predicting = [m for m in model.modules() if getattr(m, "is_mtp_layer", False) and hasattr(m, "router_replay")]
    assert [router.layer_number for router in predicting] == [1]  # the number of a decoder layer
    replay = attach_megatron(model)
    assert replay.layers == (1, 2, 3)
    assert [router.router_replay for router in predicting] == [None]
    # Rows that also cover the layer behind the decoder's, numbered 4: it is left out.
    assert replay.places((1, 2, 3, 4)) == (0, 1, 2)
    with replay.rows([foreign(replay)]), replay.record() as recording:
        step(model)
    assert torch.equal(recording.rows(), foreign(replay).int())


REFUSED: dict[str, dict[str, Any]] = {
    "moe_router_fusion": {"moe_router_fusion": True},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "quantile_balancing": {"moe_router_load_balancing_type": "quantile_balancing"},
    "token dropping": {"moe_router_load_balancing_type": "aux_loss", "moe_expert_capacity_factor": 1.0},
    "moe_router_force_load_balancing": {"moe_router_force_load_balancing": True},
    "moe_router_force_biased": {"moe_router_force_biased": 1.0},
    "moe_router_score_function": {"moe_router_score_function": "sqrtsoftplus"},
    "overlap_moe_expert_parallel_comm": {"overlap_moe_expert_parallel_comm": True},
    "cuda_graph_impl": {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []},
    "num_moe_experts": {"num_moe_experts": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_replayed_is_refused_with_its_reason(tiny: Any, reason: str) -> None:
    """Settings that Megatron itself refuses on a CPU are set afterwards: only attach reads them here."""
    for name, value in REFUSED[reason].items():
        setattr(tiny.config, name, value)
    with pytest.raises(UnsupportedModel, match=reason):
        attach_megatron(tiny)


def test_every_reason_is_named_at_once(tiny: Any) -> None:
    tiny.config.moe_router_fusion, tiny.config.moe_router_force_biased = True, 1.0
    with pytest.raises(UnsupportedModel, match=r"moe_router_fusion=True.*moe_router_force"):
        attach_megatron(tiny)


def deaf(router: Any) -> None:
    """A router that never asks, as the fused one: replay would be silently off."""
    asks = router.routing

    def routing(logits: Tensor, **inputs: Any) -> Any:
        kept, router.router_replay = router.router_replay, None
        try:
            return asks(logits, **inputs)
        finally:
            router.router_replay = kept

    router.routing = routing


def other_scores(router: Any) -> None:
    router.score_function, router.enable_expert_bias, router.expert_bias = "softmax", False, None


def masked(router: Any) -> None:
    """A router that goes its own way after asking."""
    asks = router.routing
    router.routing = lambda logits, **inputs: tuple(part.roll(1, 1) for part in asks(logits, **inputs))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(deaf, "ask its router_replay"), (other_scores, "to weigh as"), (masked, "to choose as")],
)
def test_routers_that_do_otherwise_than_their_config_are_refused(
    tiny: Any, change: Callable[[Any], None], reason: str
) -> None:
    router = tiny.decoder.layers[2].mlp.router
    change(router)
    with pytest.raises(UnsupportedModel, match=f"layer 2 .*{reason}|{reason}"):
        attach_megatron(tiny)
    assert router.router_replay is None


def test_chunks_are_attached_once_and_must_be_chunks(tiny: Any) -> None:
    replay = attach_megatron([tiny])
    with pytest.raises(ReplayError, match="detach"):
        attach_megatron(tiny)
    replay.detach()
    attach_megatron(tiny).detach()
    with pytest.raises(UnsupportedModel, match="GPTModel"):
        attach_megatron(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="at least one"):
        attach_megatron([])


def test_wrappers_are_looked_through(tiny: Any) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    tiny.config.bf16 = True
    half = Float16Module(tiny.config, tiny)
    wrapped = DistributedDataParallel(tiny.config, DistributedDataParallelConfig(), half)
    replay = attach_megatron(wrapped)
    rows = foreign(replay)
    with replay.rows([rows]), replay.record() as recording:
        wrapped(ids(), torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids()).float().mean().backward()
    assert torch.equal(recording.rows(), rows.int())
