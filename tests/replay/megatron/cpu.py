"""megatron-core 0.19 on a machine without a GPU: what it takes for granted of torch.cuda, for the length of a `with`.

Everything is put back at the end, so that tests of one process may stand beside others.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Stream:
    """A stream and an event at once: on a CPU everything is in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: _Stream()


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"`, `.cuda()`, `.to("cuda")` and pinned memory, as megatron-core writes them out."""

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if fn in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if fn is Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return fn(*args, **kwargs)


@contextmanager
def shim() -> Iterator[None]:
    """megatron-core may be imported, built and run inside. Its just-in-time fusions stay eager."""
    eager = torch._dynamo.config.patch(disable=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), _CudaMeansCpu(), eager:
        warnings.simplefilter("ignore")
        for module in (torch.cuda, torch.cuda.random):
            patch.setattr(module, "get_rng_state", lambda *_, **__: torch.get_rng_state())
            patch.setattr(module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
        patch.setattr(torch.cuda, "synchronize", lambda *_, **__: None)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "Event", _Stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_, **__: _Stream())
        patch.setattr(torch.cuda, "stream", lambda stream: stream or _Stream())
        from megatron.core.tensor_parallel import random as megatron_random
        from megatron.core.transformer.moe import token_dispatcher

        patch.setattr(megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        patch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", _as_host)
        yield


def _as_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The dispatcher copies split sizes from the GPU, and leaves CPU tensors as they are, which it cannot use."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


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
