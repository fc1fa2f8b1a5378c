"""Process groups of megatron-core on a machine without a GPU; `shim` is the trainer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from pacenote.trainer.megatron_cpu import shim

__all__ = ["parallel", "processes", "shim"]


@contextmanager
def processes(store: str, rank: int = 0, size: int = 1) -> Iterator[None]:
    """A gloo group of `size` processes that meet at the file `store`."""
    with pytest.MonkeyPatch.context() as patch:
        # Else gloo looks for the interface of the host's name, which a container may not resolve.
        patch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def parallel(
    tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, ep: int = 1, etp: int = 1
) -> Iterator[None]:
    """Megatron's process groups of these sizes, for the length of the block."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    try:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
