"""Tiny megatron-core models: a spec whose attention and norms run on a CPU, and weights that depend on names alone.

Legend: S positions of a rank, B sequences, H heads, D size of a head.
"""

from __future__ import annotations

import re
import zlib
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

VOCAB, EXPERTS, TOP_K, LAYERS = 56, 8, 2, 4
MOE_LAYERS = tuple(range(1, LAYERS))
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "rope",
    "rotary_base": 10000,
    "qk_layernorm": True,
}


def config(*, mla: bool = False, **fields: Any) -> Any:
    """A GLM-like config: the first layer dense, sigmoid scores with a selection bias, one shared expert."""
    layers = fields.get("num_layers", LAYERS)
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 1.8,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.0,
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
        **(MLA if mla else {}),
        **fields,
    }
    return (MLATransformerConfig if mla else TransformerConfig)(**values)


def build(
    settings: Any,
    *,
    vocab: int = VOCAB,
    positions: int = 128,
    vp_stage: int | None = None,
    mtp: bool = False,
    scale: float = 0.3,
) -> Any:
    """This rank's chunk of a GPTModel, with the weights of its names."""
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, vp_stage=vp_stage)
    _localize(spec)
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        settings,
        spec,
        vocab_size=vocab,
        max_sequence_length=positions,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
        vp_stage=vp_stage,
        mtp_block_spec=get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False) if mtp else None,
    )
    fill(model, scale)
    return model


def chunks(settings: Any, vpp: int | None, **fields: Any) -> list[Any]:
    """All chunks of this rank."""
    return [build(settings, vp_stage=stage, **fields) for stage in ([None] if vpp is None else range(vpp))]


def named(name: str, shape: list[int], scale: float) -> Tensor:
    """The whole weight of a name, the same on every rank of every layout."""
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=seed) * scale


@torch.no_grad()
def fill(model: Any, scale: float) -> None:
    """Weights from names in which layers and experts have their global numbers, cut for this rank."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    expert_rank = parallel_state.get_expert_tensor_parallel_rank()
    expert_size = parallel_state.get_expert_tensor_parallel_world_size()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        mine, ranks = (expert_rank, expert_size) if "local_experts" in name else (rank, size)
        axis = getattr(parameter, "partition_dim", -1) if ranks > 1 else -1
        cut = axis >= 0 and (getattr(parameter, "tensor_model_parallel", False) or "local_experts" in name)
        shape = [length * ranks if cut and number == axis else length for number, length in enumerate(parameter.shape)]
        whole = named(global_name(model, name), shape, scale)
        if cut and "linear_fc1" in name:  # gate and up are cut each for itself
            whole = torch.cat([half.chunk(ranks, axis)[mine] for half in whole.chunk(2, axis)], axis)
        elif cut:
            whole = whole.chunk(ranks, axis)[mine]
        parameter.copy_(whole)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(named(global_name(model, name), list(buffer.shape), 0.1))


def global_name(model: Any, name: str) -> str:
    """The name with the global numbers of its layer, from 0, and of its expert."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    first = parallel_state.get_expert_model_parallel_rank() * (
        EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    )
    return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{int(found[1]) + first}", name)


def routers(models: list[Any]) -> dict[int, Any]:
    """The decoder's routers of a rank by global layer id."""
    return {
        layer.layer_number - 1: layer.mlp.router
        for model in models
        for layer in model.decoder.layers
        if hasattr(layer.mlp, "router")
    }


class RMSNorm(torch.nn.RMSNorm):
    """The local spec's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal attention within a sequence, in plain torch: grouped heads, MLA, packed and context-parallel batches."""

    def __init__(self, config: Any, *_: Any, softmax_scale: Any = None, pg_collection: Any = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale, self.group = softmax_scale, pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Any:
        """[S, B, H * D] of [S, B, H, D]; of packed ones [S, H, D] likewise without B."""
        flat = query.ndim == 3
        if flat:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        segment, position = self._places(query.shape[0], packed_seq_params)
        key, value, segments, positions = (self._gather(tensor) for tensor in (key, value, segment, position))
        mask = (segment[:, None] == segments) & (positions <= position[:, None])
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).permute(2, 0, 1, 3)
        out = out.reshape(*out.shape[:2], -1)
        return out.squeeze(1) if flat else out

    def _places(self, length: int, packed: Any) -> tuple[Tensor, Tensor]:
        """Which sequence, and which place in it, each local position is of."""
        size, rank = self.group.size(), self.group.rank()
        whole = length * size
        bounds = [0, whole]
        if packed is not None:
            padded = packed.cu_seqlens_q_padded
            bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
        segment, position = [], []
        for number, (start, end) in enumerate(pairwise(bounds)):
            step = (end - start) // (2 * size)
            spans = [(0, end - start)]
            if size > 1:
                spans = [(c * step, (c + 1) * step) for c in (rank, 2 * size - 1 - rank)]
            held = [place for first, last in spans for place in range(first, last)]
            position += held
            segment += [number] * len(held)
        return torch.tensor(segment), torch.tensor(position)

    def _gather(self, tensor: Tensor) -> Tensor:
        """All ranks' positions, one rank's after the other's."""
        if self.group.size() == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor.contiguous(), self.group)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; a rank's gradient is the sum of all ranks' for its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def _localize(spec: Any) -> None:
    """Our attention and norm in a block spec, which is megatron-core's way of choosing parts."""
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = Attention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, None) not in (None, IdentityOp):
                setattr(attention, name, RMSNorm)
