"""One rank of two gloo processes: the same step and the same identities in every layout it is given.

python -m tests.replay.megatron.ranks RANK DIRECTORY LAYOUT...    # from the repository's root, src on PYTHONPATH
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.replay.megatron import cpu

SIZE = 2
MICROBATCHES = 4
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Parallel sizes, the config that goes with them, the format of batches, and whether routers are fused."""

    sizes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mla: bool = True
    format: str = "sbhd"
    fused: bool = False

    @property
    def reference(self) -> Layout:
        """The same model and batches on one process, keeping what it needs for backward."""
        kept = {name: value for name, value in self.config.items() if name in ("num_layers", "moe_layer_freq")}
        return Layout(config=kept, mla=self.mla, format=self.format)


_TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_PP = {"pipeline_model_parallel_size": 2, "num_layers": 8}
_VPP = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
LAYOUTS: dict[str, Layout] = {
    "ep2": Layout(sizes={"ep": 2}, config={"expert_model_parallel_size": 2}),
    "tp2_sp": Layout(sizes={"tp": 2, "etp": 2}, config={**_TP, "expert_tensor_parallel_size": 2}, mla=False),
    "ep2_sp": Layout(sizes={"tp": 2, "ep": 2}, config={**_TP, "expert_model_parallel_size": 2, **FULL}, mla=False),
    "tp2_sp_thd": Layout(
        sizes={"tp": 2, "etp": 2}, config={**_TP, "expert_tensor_parallel_size": 2}, mla=False, format="thd"
    ),
    "tp2_sp_thd_fused": Layout(
        sizes={"tp": 2, "etp": 2},
        config={**_TP, "expert_tensor_parallel_size": 2},
        mla=False,
        format="thd",
        fused=True,
    ),
    "cp2": Layout(sizes={"cp": 2}, config={"context_parallel_size": 2, **SELECTIVE}),
    "cp2_thd": Layout(sizes={"cp": 2}, config={"context_parallel_size": 2}, format="thd"),
    "pp2": Layout(sizes={"pp": 2}, config={**_PP, **FULL}),
    "pp2_kept": Layout(sizes={"pp": 2}, config=_PP),
    "pp2_fused": Layout(sizes={"pp": 2}, config={**_PP, **FULL}, fused=True),
    "pp2_dense_stage": Layout(sizes={"pp": 2}, config={**_PP, "num_layers": 4, "moe_layer_freq": [0, 0, 1, 1]}),
    "pp2_vpp2": Layout(sizes={"pp": 2, "vpp": 2}, config={**_PP, **_VPP, **FULL}),
    "pp2_vpp2_selective": Layout(sizes={"pp": 2, "vpp": 2}, config={**_PP, **_VPP, **SELECTIVE}),
    "pp2_vpp2_dense_chunk": Layout(sizes={"pp": 2, "vpp": 2}, config={**_PP, **_VPP, "num_layers": 4}),
}


def run(layout: Layout) -> dict[str, Any]:
    """A step and its identities on this rank, inside the process groups of the layout.

    Gives losses of this rank's microbatches (last stage), router gradients [E, D] by layer, reduced over the ranks
    that share them, and for hollow models: tokens compared, tokens wrong, and those that each layer saw.
    """
    from megatron.core import parallel_state

    from pacenote.replay.megatron import attach_megatron
    from tests.replay.megatron import drive, model

    settings = model.config(mla=layout.mla, **layout.config)
    layers = tuple(layer for layer, sparse in enumerate(settings.moe_layer_freq) if sparse)
    models = model.chunks(settings, layout.sizes.get("vpp"))
    replay = attach_megatron(models, fused=layout.fused)
    assert replay.fused == (replay.layers if layout.fused else ())
    make: Callable[..., drive.Batch] = {"sbhd": drive.sbhd, "thd": drive.thd}[layout.format]
    data = parallel_state.get_data_parallel_world_size()
    mine = drive.tokens(MICROBATCHES)[parallel_state.get_data_parallel_rank() :: data]
    batches = [make(ids, replay, layers) for ids in mine]
    with torch.no_grad():
        scores = drive.step(models, batches, replay, forward_only=True)
    replay.audit(reset=True)
    losses = drive.step(models, batches, replay)
    assert losses == scores, f"expected the losses of the forward-only passes, {scores}, got {losses}"
    grads = drive.router_grads(models)
    audit = replay.audit(reset=True)
    for gradient in grads.values():
        reduce(gradient)
    if replay.layout.cp_size > 1 and losses:
        losses = reduced(losses)
    drive.hollow(models)
    with drive.watched(models) as identity:
        drive.step(models, batches, replay)
    replay.detach()
    return {
        "losses": losses,
        "grads": grads,
        "layers": replay.layers,
        "replayed": audit["replayed"].tolist(),
        "others": audit.total("free") + audit.total("duplicate") + audit.total("out_of_range"),
        "compared": identity.compared,
        "wrong": identity.wrong,
        "tokens": identity.tokens,
    }


def reduce(gradient: Tensor) -> None:
    """As Megatron finishes gradients [E, D]: sum over sequence-parallel, mean over data- and context-parallel ranks."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_group()
    if tensor.size() > 1:
        dist.all_reduce(gradient, group=tensor)
    shared = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if shared.size() > 1:
        dist.all_reduce(gradient, group=shared)
        gradient /= shared.size()


def reduced(losses: list[float]) -> list[float]:
    """Each context-parallel rank has a part of every loss."""
    from megatron.core import parallel_state

    total = torch.tensor(losses)
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total.tolist()


def main() -> None:
    """Run every layout named on the command line, and save what came out."""
    rank, directory, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with cpu.shim(), cpu.processes(str(directory / "store"), rank, SIZE):
        results = {}
        for name in names:
            with cpu.parallel(**LAYOUTS[name].sizes):
                results[name] = run(LAYOUTS[name])
        torch.save(results, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
