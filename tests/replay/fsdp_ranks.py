"""One rank of two gloo processes: a model sharded by FSDP2 records, replays itself, and replays foreign rows.

python -m tests.replay.fsdp_ranks RANK DIRECTORY CASE...    # from the repository's root, src on PYTHONPATH
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pacenote.replay.audit import COUNTERS
from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.hf import Replay, attach
from tests.replay.conftest import build
from tests.replay.test_exact import experts_reached, foreign, ids

SIZE = 2
Outcome = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family, and how it is sharded and recomputed."""

    family: str
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    gate: bool = False


CASES = {
    "glm": Case(family="glm4_moe_lite"),
    "glm_recomputed": Case(family="glm4_moe_lite", recompute=True),
    "glm_bfloat16": Case(family="glm4_moe_lite", dtype=torch.bfloat16),
    "glm_router_apart": Case(family="glm4_moe_lite", gate=True),
    "qwen": Case(family="qwen3_moe"),
    "qwen_bfloat16": Case(family="qwen3_moe", dtype=torch.bfloat16, recompute=True),
}


def shard(model: Any, case: Case) -> Any:
    """Shard each decoder layer and the rest, as the usual recipes do; `case.gate`: the routers on their own as well."""
    mesh = init_device_mesh("cpu", (SIZE,))
    policy = MixedPrecisionPolicy(param_dtype=case.dtype)
    for layer in model.model.layers:
        if case.gate and hasattr(layer.mlp, "gate"):
            fully_shard(layer.mlp.gate, mesh=mesh, mp_policy=policy)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def step(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and whole gradients by parameter, of one forward and backward pass over tokens [B, S]."""
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone() for name, grad in grads.items()
    }


def replayed(model: Any, replay: Replay, tokens: Tensor, rows: Tensor) -> Outcome:
    """A step on tokens [B, S] under rows [B, S, L, K]: loss, gradients, counts [counters, L], and what reaches experts.

    `reached` [B, S, L, K] is in the order of the layers; 2 L of them with recomputation, which comes in reverse.
    """
    seen: list[Tensor] = []
    handles = experts_reached(model, seen)
    replay.audit(reset=True)
    with replay.rows(rows):
        loss, grads = step(model, tokens)
    for handle in handles:
        handle.remove()
    audit = replay.audit(reset=True)
    counts = torch.stack([torch.from_numpy(audit[name]) for name in COUNTERS])
    reached = torch.stack([given.view(*tokens.shape, -1) for given in seen], dim=2)
    return {"loss": loss, "grads": grads, "counts": counts, "reached": reached}


def run(case: Case, rank: int | None) -> Outcome:
    """The outcome of one rank's half of the batch; without a rank, of the whole batch on one unsharded process."""
    tokens, rows = ids(), foreign(2)
    model = build(case.family).train()
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if rank is None:
        replay = attach(model)
        return {"foreign": replayed(model, replay, tokens, rows)}
    tokens, rows = tokens[rank : rank + 1], rows[rank : rank + 1]
    bare = step(shard(build(case.family).train(), case), tokens)
    replay = attach(model)
    shard(model, case)
    with replay.record() as recording:
        own = step(model, tokens)
    own_rows = recording.rows()
    results = {
        "bare": bare,
        "own": own,
        "again": replayed(model, replay, tokens, own_rows),
        "foreign": replayed(model, replay, tokens, rows),
        "rows": rows,
    }
    replay.detach()
    return {**results, "detached": step(model, tokens)}


def refusal() -> str:
    """What attach says of a model that is sharded already."""
    model = shard(build("glm4_moe_lite"), CASES["glm"])
    try:
        attach(model)
    except UnsupportedModel as error:
        return str(error)
    return "attached"


def main() -> None:
    """Run every case named on the command line, and save what came out."""
    rank, directory, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=SIZE)
    try:
        results: Outcome = {name: run(CASES[name], rank) for name in names}
        torch.save({**results, "refusal": refusal()}, directory / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
