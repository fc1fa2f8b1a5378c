"""Tiny megatron-core models whose weights depend on their names alone; attention and norms are the trainer's."""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from pacenote.trainer.megatron_parts import localize

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
    localize(spec)
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
