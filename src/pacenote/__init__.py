"""pacenote: the rollout engine's expert choices, replayed in the trainer's routers.

    import pacenote as pn
    replay = pn.attach(model)                 # a transformers mixture-of-experts model
    batch = pn.pack(trajectories, max_len=32768, device="cuda")
    with replay.rows(batch.routes):           # spans forward and backward
        hidden = model.model(**batch.inputs).last_hidden_state
        logprob, entropy = pn.linear_logprob(hidden, model.lm_head.weight, batch.targets)
        pn.policy_loss(logprob, batch, config).backward()

Names load on first use, so `import pacenote` costs nothing and pulls in no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pacenote.kernels.logprob import linear_logprob, logprob_from_logits
    from pacenote.kernels.pack import PackedBatch, Routes, pack
    from pacenote.kernels.permute import Permutation, permutation
    from pacenote.kernels.policy import PolicyConfig, policy_loss
    from pacenote.kernels.policy_hidden import policy_loss_from_hidden
    from pacenote.kernels.route import RouteStats, replay_topk
    from pacenote.kernels.spec import RouterSpec
    from pacenote.replay.hf import attach
    from pacenote.replay.megatron import attach_megatron
    from pacenote.replay.record import RoutingRecord
    from pacenote.rollout.pool import WorkerPool
    from pacenote.rollout.server import SessionConfig, create_app
    from pacenote.rollout.trajectory import Trajectory
else:
    _HOME = {
        "PackedBatch": "kernels.pack",
        "Permutation": "kernels.permute",
        "PolicyConfig": "kernels.policy",
        "RouteStats": "kernels.route",
        "RouterSpec": "kernels.spec",
        "Routes": "kernels.pack",
        "RoutingRecord": "replay.record",
        "SessionConfig": "rollout.server",
        "Trajectory": "rollout.trajectory",
        "WorkerPool": "rollout.pool",
        "attach": "replay.hf",
        "attach_megatron": "replay.megatron",
        "create_app": "rollout.server",
        "linear_logprob": "kernels.logprob",
        "logprob_from_logits": "kernels.logprob",
        "pack": "kernels.pack",
        "permutation": "kernels.permute",
        "policy_loss": "kernels.policy",
        "policy_loss_from_hidden": "kernels.policy_hidden",
        "replay_topk": "kernels.route",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOME:
            raise AttributeError(f"module 'pacenote' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
        return getattr(import_module(f"pacenote.{_HOME[name]}"), name)

    def __dir__() -> list[str]:
        return sorted([*_HOME, "__version__"])


__all__ = [
    "PackedBatch",
    "Permutation",
    "PolicyConfig",
    "RouteStats",
    "RouterSpec",
    "Routes",
    "RoutingRecord",
    "SessionConfig",
    "Trajectory",
    "WorkerPool",
    "__version__",
    "attach",
    "attach_megatron",
    "create_app",
    "linear_logprob",
    "logprob_from_logits",
    "pack",
    "permutation",
    "policy_loss",
    "policy_loss_from_hidden",
    "replay_topk",
]
