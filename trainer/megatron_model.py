"""A rank's chunks of a megatron-core GPTModel, from a transformers config: TransformerEngine's parts where it is
installed, plain torch's elsewhere."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from pacenote.trainer.megatron_config import MLA_NORM_EPS, MegatronConfig, rope_theta, transformer_config
from pacenote.trainer.megatron_parts import localize

HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None


@contextmanager
def process_groups(layout: MegatronConfig) -> Iterator[None]:
    """Megatron's process groups of these sizes, for the length of the block; those that stand already are kept.

    Raises:
        ValueError: the sizes do not fit the number of processes.
    """
    if parallel_state.model_parallel_is_initialized():
        yield  # the reference policy's are the policy's
        return
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group(
            "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    try:
        _check(layout, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor or layout.tensor,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()


def _check(layout: MegatronConfig, processes: int) -> None:
    dense = layout.tensor * layout.pipeline * layout.context
    sparse = (layout.expert_tensor or layout.tensor) * layout.expert * layout.pipeline
    for words, size in (("tensor x pipeline x context", dense), ("expert-tensor x expert x pipeline", sparse)):
        if processes % size:
            raise ValueError(
                f"--megatron.*: expected a number of processes that {words} = {size} divides, got {processes}: start "
                f"{math.lcm(dense, sparse)} or a multiple with torchrun, or change the sizes"
            )


def build(hf: Any, layout: MegatronConfig, positions: int, *, recompute: bool) -> tuple[list[Any], list[Any]]:
    """This rank's chunks with fresh weights.

    Args:
        hf: the model's config, of transformers.
        layout: parallel sizes and number format.
        positions: of the longest sample.
        recompute: compute every layer again in backward.

    Returns:
        The bare models, and the same in their data-parallel wrappers.

    Raises:
        ValueError: the model has no counterpart in megatron-core, or not in this layout.
    """
    if hf.tie_word_embeddings:
        raise ValueError("--backend megatron expects a head with weights of its own, got one tied to the embedding")
    config = transformer_config(hf, layout, recompute=recompute)
    if config.multi_latent_attention and layout.tensor > 1 and not HAS_ENGINE:
        # Their gathered keys of the rotary part get the gradient of a rank's own heads alone.
        raise ValueError(
            f"--megatron.tensor {layout.tensor}: expected TransformerEngine for latent attention, got none: megatron-"
            "core's own layers cut it over tensor ranks with a wrong gradient of kv_a_proj. Install it, or use "
            "--megatron.expert, context or pipeline"
        )
    stages = [None] if layout.virtual_pipeline is None else list(range(layout.virtual_pipeline))
    if config.num_layers % (layout.pipeline * len(stages)):
        raise ValueError(
            f"--megatron.pipeline x --megatron.virtual-pipeline: expected a divisor of {config.num_layers} layers, got "
            f"{layout.pipeline} x {len(stages)}"
        )
    models = [_chunk(config, hf, positions, stage) for stage in stages]
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True, overlap_grad_reduce=False
    )
    inner = [Float16Module(config, model) if config.bf16 else model for model in models]
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=module, disable_bucketing=number > 0)
        for number, module in enumerate(inner)
    ]
    return models, wrapped


def _chunk(config: Any, hf: Any, positions: int, stage: int | None) -> Any:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=HAS_ENGINE, vp_stage=stage)
    if not HAS_ENGINE:
        localize(spec)
    at = {"ignore_virtual": stage is None, "vp_stage": stage}
    tensor = config.tensor_model_parallel_size
    model = GPTModel(
        config,
        spec,
        vocab_size=math.ceil(hf.vocab_size / tensor) * tensor,
        max_sequence_length=positions,
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=rope_theta(hf),
        vp_stage=stage,
    )
    if config.multi_latent_attention:
        for layer in model.decoder.layers:
            # Without TransformerEngine norms stand alone, with it they are in front of a projection.
            for part in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                found: Any = getattr(layer.self_attention, part, None)
                if hasattr(found, "eps"):
                    found.eps = MLA_NORM_EPS
    return model


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's process groups: data (without context), tensor, context, pipeline; whether it has the head."""

    data: Any
    tensor: Any
    context: Any
    pipeline: Any
    last: bool

    @classmethod
    def here(cls) -> Ranks:
        """As Megatron has set them up."""
        return cls(
            data=parallel_state.get_data_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            context=parallel_state.get_context_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            last=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        )

    def gather_positions(self, hidden: Tensor) -> Tensor:
        """All positions [T, 1, D] of sequence-parallel states [T / tp, 1, D]; the gradient comes whole, and is cut."""
        whole: Tensor = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.tensor
        )
        return whole

    def gather_context(self, values: Tensor) -> Tensor:
        """All context-parallel ranks' values [T / cp, ...] as [T, ...]; the gradient of this rank's own is its own."""
        whole: Tensor = _Gather.apply(values, self.context)  # type: ignore[no-untyped-call]
        return whole

    def gather(self, values: Tensor, group: Any) -> Tensor:
        """Values [T, ...] of one rank after the other's; no gradient."""
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Every rank computes the same loss of all values, so a value's gradient is the same everywhere: the owner's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None
