"""megatron-core's schedule, gradient reduction and optimizer, as the back end uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from pacenote.kernels.pack import PackedBatch
from pacenote.trainer.megatron_config import MegatronConfig
from pacenote.trainer.optim import OptimConfig


def build(chunks: list[Any], config: OptimConfig, layout: MegatronConfig) -> Any:
    """Adam with decoupled weight decay over these chunks; biases and norms do not decay, which is Megatron's way."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=1e-8,
        clip_grad=config.grad_clip,
        bf16=layout.dtype == "bfloat16",
        params_dtype=layout.torch_dtype,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    return get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)


def schedule(
    chunks: Sequence[Any],
    count: int,
    inputs: Callable[[int], dict[str, Any]],
    output: Callable[[int, Tensor], Tensor],
    *,
    timed: Callable[[], AbstractContextManager[None]],
    forward_only: bool,
) -> None:
    """Run `count` microbatches through the chunks.

    Args:
        chunks: of this rank.
        count: microbatches.
        inputs: arguments of the model, by number.
        output: the loss, a scalar, of a number and what the last stage gave [..., T].
        timed: makes contexts that forward passes run in.
        forward_only: no backward pass.
    """

    def forward(numbers: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        number = next(numbers)

        def loss(given: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            value = output(number, given)
            return value, torch.ones((), dtype=torch.int, device=value.device), {}

        with timed():
            return model(**inputs(number)), loss

    several = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(range(count)) for _ in chunks] if several else iter(range(count)),
        model=list(chunks) if several else chunks[0],
        num_microbatches=count,
        seq_length=1,  # microbatches say their own
        micro_batch_size=1,
        forward_only=forward_only,
    )


def finalize(chunks: Sequence[Any]) -> None:
    """Sum gradients over the ranks that share weights."""
    finalize_model_grads(list(chunks))


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """Bounds of the samples on all context-parallel ranks together, padding of each included, that of the end as one
    more."""
    total = batch.num_tokens * batch.layout.cp_size
    bounds = batch.cu_seqlens_padded
    if int(bounds[-1]) < total:
        bounds = torch.cat([bounds, torch.tensor([total], dtype=bounds.dtype, device=bounds.device)])
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def state(optimizer: Any) -> list[dict[str, Any]]:
    """Of each of this rank's optimizers: moments, and the weights that it steps (masters where passes are bfloat16)."""
    return [
        {"state": inner.state_dict(), "weights": [p.detach().cpu() for g in inner.param_groups for p in g["params"]]}
        for inner in _inner(optimizer)
    ]


@torch.no_grad()
def load_state(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    """Take back what `state` gave."""
    for inner, found in zip(_inner(optimizer), saved, strict=True):
        inner.load_state_dict(found["state"])
        for weight, value in zip((p for g in inner.param_groups for p in g["params"]), found["weights"], strict=True):
            weight.copy_(value)


def _inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """torch's optimizers inside; a rank that has nothing to step has none."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one.optimizer for one in chained if one.optimizer is not None]
