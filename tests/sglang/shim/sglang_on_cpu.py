"""Three corrections without which SGLang 0.5.23 cannot serve routed experts, MLA or a prefill/decode pair on a CPU.

Registered through SGLang's own plugin entry point, so that each of its processes gets them, and made of its own hooks.
None of them touches what is computed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def unpinned(allocate: Callable[..., Any], *args: Any, **words: Any) -> Any:
    """The host cache of routed experts is registered with CUDA, which fails here: plain memory is all it needs."""
    return allocate(*args, **{**words, "pin_memory": False})


def absorbed(get_handler: Callable[..., Any], *args: Any) -> Any:
    """MLA by the torch_native back end reads its latent cache rightly only in the absorbed form.

    SGLang has no rule for this back end and takes Triton's, which prefills in the other form: it answers, and wrongly.
    """
    return handlers._dispatch_mla_subtype if args[-1] == "torch_native" else get_handler(*args)


def synchronous(result: None, sender: Any, *args: Any, **words: Any) -> None:
    """Mooncake's sender says that it takes page indices in pinned memory with a CUDA event, and then gets them so."""
    sender.supports_host_tensor_indices = False


def register() -> None:
    """Hook all three in."""
    HookRegistry.register("sglang.srt.mem_cache.pool_host.common.alloc_with_host_register", unpinned, HookType.AROUND)
    HookRegistry.register(f"{handlers.__name__}.AttentionBackendRegistry.get_handler", absorbed, HookType.AROUND)
    if find_spec("mooncake") is not None:
        conn = "sglang.srt.disaggregation.mooncake.conn"
        HookRegistry.register(f"{conn}.MooncakeKVSender.__init__", synchronous, HookType.AFTER)
