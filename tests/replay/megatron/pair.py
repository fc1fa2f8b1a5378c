"""The same model twice, attached as ever and fused, and all that a step of either leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels.reference import COUNTERS
from pacenote.kernels.spec import FREE, PAD, REPLAY
from pacenote.replay.megatron import MegatronReplay, attach_megatron
from tests.replay.megatron.single import EXPERTS, TOKENS, Grads, foreign, make, same, step

SOFTMAX = {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}
GROUPS = {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2}
POST = {"moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": None}
ROUTERS: dict[str, dict[str, Any]] = {
    "glm": {},
    "deepseek": GROUPS,
    "sigmoid": {"moe_router_enable_expert_bias": False},
    "sigmoid_top1": {"moe_router_topk": 1},
    "sigmoid_groups_without_bias": {**GROUPS, "moe_router_enable_expert_bias": False},
    "softmax_pre": SOFTMAX,
    "softmax_pre_groups": {**SOFTMAX, **GROUPS},
    "softmax_post": {**SOFTMAX, **POST},
    "softmax_post_scaled_groups": {**SOFTMAX, **GROUPS, "moe_router_pre_softmax": False},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "router_in_bfloat16": {"moe_router_dtype": None, "params_dtype": torch.bfloat16, "bf16": True},
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The same model twice: attached as ever, and fused."""

    models: tuple[Any, Any]
    replays: tuple[MegatronReplay, MegatronReplay]

    @classmethod
    def of(cls, **fields: Any) -> Pair:
        built = (make(**fields), make(**fields))
        models = [model.bfloat16() if fields.get("bf16") else model for model in built]
        return cls((models[0], models[1]), (attach_megatron(models[0]), attach_megatron(models[1], fused=True)))

    def routers(self) -> Iterator[tuple[Any, Any]]:
        from tests.replay.megatron.model import routers

        ours, theirs = (routers([model]).values() for model in self.models)
        return zip(ours, theirs, strict=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that a step leaves behind."""

    losses: Tensor
    grads: Grads
    routed: list[tuple[Tensor, Tensor]]
    recorded: Tensor
    audit: dict[str, list[float]]
    loads: list[Tensor]


def outcome(model: Any, replay: MegatronReplay, rows: Any, **inputs: Any) -> Outcome:
    """Of a step with these rows."""
    from tests.replay.megatron.model import routers

    routed: list[tuple[Tensor, Tensor]] = []
    found = list(routers([model]).values())
    for router in found:
        if router.enable_expert_bias:
            router.local_tokens_per_expert.zero_()
    handles = [router.register_forward_hook(lambda _, __, out: routed.append(out)) for router in found]
    with replay.rows([rows]), replay.record() as recording:
        losses, grads = step(model, **inputs)
    for handle in handles:
        handle.remove()
    audit = replay.audit(reset=True)
    counts = {**{name: audit[name].tolist() for name in COUNTERS}, "margin": audit.margin.tolist()}
    loads = [router.local_tokens_per_expert.clone() for router in found if router.enable_expert_bias]
    return Outcome(losses, grads, routed, recording.rows(), counts, loads)


def assert_alike(pair: Pair, rows: Any, **inputs: Any) -> Outcome:
    """Both models do the same with the rows, bit for bit; what the fused one did."""
    plain, fused = (outcome(*both, rows, **inputs) for both in zip(pair.models, pair.replays, strict=True))
    assert same((plain.losses, plain.grads), (fused.losses, fused.grads))
    assert len(plain.routed) == len(fused.routed) > 0
    for (probs, chosen), (mine, used) in zip(plain.routed, fused.routed, strict=True):
        assert (mine.dtype, used.dtype, mine.shape, used.shape) == (probs.dtype, chosen.dtype, probs.shape, probs.shape)
        assert torch.equal(mine, probs)
        assert torch.equal(used, chosen)
    assert torch.equal(fused.recorded, plain.recorded)
    assert str(fused.audit) == str(plain.audit)  # text, in which NaN is itself
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fused.loads, plain.loads, strict=True))
    return fused


def mixed(replay: MegatronReplay, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows [T, L, K] and states [T] of every fate: replayed, free, missing in part and in whole, refused, padding."""
    rows = foreign(replay, seed).int()
    rows[2::8] = -1
    rows[3::8, :, -1] = -1
    rows[4::8, :, -1] = EXPERTS
    rows[5::8, :, -1] = rows[5::8, :, 0] if replay.top_k > 1 else -1
    state = torch.full((TOKENS,), REPLAY, dtype=torch.uint8)
    state[6::8], state[7::8] = FREE, PAD
    return rows, state
