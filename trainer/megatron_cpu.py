"""megatron-core 0.19 on a machine without a GPU: what it takes for granted of torch.cuda, for the length of a `with`.

Everything is put back at the end. For trying things out: it is as slow as a CPU is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
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
        if fn is Tensor.type and len(args) == 1 and not kwargs:  # optimizers look for torch.cuda.FloatTensor
            return str(fn(*args)).replace("torch.", "torch.cuda.", 1)
        if fn is Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return fn(*args, **kwargs)


@contextmanager
def shim() -> Iterator[None]:
    """megatron-core may be imported, built and run inside. Its just-in-time fusions stay eager."""
    eager = torch._dynamo.config.patch(disable=True)
    with ExitStack() as stack:
        for context in (warnings.catch_warnings(), _CudaMeansCpu(), eager):
            stack.enter_context(context)
        warnings.simplefilter("ignore")

        def put(where: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(where, name, value))

        for module in (torch.cuda, torch.cuda.random):
            put(module, "get_rng_state", lambda *_, **__: torch.get_rng_state())
            put(module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        put(torch.cuda, "current_device", lambda: torch.device("cpu"))
        put(torch.cuda, "manual_seed", torch.manual_seed)
        put(torch.cuda, "synchronize", lambda *_, **__: None)
        put(torch.cuda, "Stream", _Stream)
        put(torch.cuda, "Event", _Stream)
        put(torch.cuda, "current_stream", lambda *_, **__: _Stream())
        put(torch.cuda, "stream", lambda stream: stream or _Stream())
        quiet = logging.getLogger("megatron.core.tensor_parallel.random")  # it compares GPU states that are the CPU's
        put(quiet, "disabled", True)
        from megatron.core.tensor_parallel import random as megatron_random
        from megatron.core.transformer.moe import token_dispatcher

        put(megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        put(token_dispatcher, "maybe_move_tensor_to_cpu", _as_host)
        yield


def _as_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The dispatcher copies split sizes from the GPU, and leaves CPU tensors as they are, which it cannot use."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor
