"""A transformers config in megatron-core's words: GLM-4.7-Flash, DeepSeek-V3, Qwen3-MoE.

Every number is the model's own; what the families differ in is said here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MLA_NORM_EPS = 1e-6
"""eps of transformers' q_a_layernorm and kv_a_layernorm, whatever the config says; megatron-core has one for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig:
    """Parallel sizes of the megatron back end. The rest of torchrun's processes is data-parallel."""

    tensor: int = 1
    """Ranks that cut matrices and heads (TP), and between these positions (SP): experts ask for it."""
    expert: int = 1
    """Ranks that have other experts (EP), of the data-parallel and tensor ones."""
    expert_tensor: int | None = None
    """Ranks that cut each expert (ETP); none: as many as tensor."""
    context: int = 1
    """Ranks that cut each sample (CP)."""
    pipeline: int = 1
    """Stages of layers (PP)."""
    virtual_pipeline: int | None = None
    """Chunks of layers a stage (VPP)."""
    distributed_optimizer: bool = True
    """Cut moments and master weights over the data-parallel ranks."""
    dtype: str = "float32"
    """Number format of the passes: float32, or bfloat16 with float32 master weights and gradients."""

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        for name in ("tensor", "expert", "expert_tensor", "context", "pipeline", "virtual_pipeline"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--megatron.{name.replace('_', '-')} expects at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--megatron.dtype expects float32 or bfloat16, got {self.dtype!r}")
        if self.virtual_pipeline is not None and self.pipeline < 2:
            raise ValueError("--megatron.virtual-pipeline expects --megatron.pipeline of at least 2")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the passes."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def sequence_parallel(self) -> bool:
        """Whether positions are cut over the tensor ranks."""
        return self.tensor > 1


def transformer_config(hf: Any, layout: MegatronConfig, *, recompute: bool = False) -> Any:
    """A TransformerConfig, or MLATransformerConfig, of this rank.

    Args:
        hf: of transformers: Glm4MoeLiteConfig, DeepseekV3Config or Qwen3MoeConfig.
        layout: parallel sizes and number format.
        recompute: compute every layer again in backward.

    Raises:
        ValueError: another model, or a feature of one that has no counterpart here.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    if hf.model_type not in _FAMILIES:
        raise ValueError(
            f"--backend megatron knows {', '.join(_FAMILIES)}, got a model of type {hf.model_type!r}: use --backend hf"
        )
    fields = {**_common(hf), **_FAMILIES[hf.model_type](hf), **_parallel(layout)}
    if recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    mla = fields.get("multi_latent_attention", False)
    return (MLATransformerConfig if mla else TransformerConfig)(**fields)


def rope_theta(hf: Any) -> float:
    """Base of the rotary embedding.

    Raises:
        ValueError: it is scaled.
    """
    parameters = hf.rope_parameters or {}
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise ValueError(
            f"--backend megatron expects plain rotary embeddings, got rope_type {kind!r}, which may change every "
            "position: use --backend hf"
        )
    return float(parameters["rope_theta"])


def _common(hf: Any) -> dict[str, Any]:
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        # The loss brings its own denominator, that of all ranks: gradients are summed.
        "calculate_per_token_loss": True,
    }


def _mla(hf: Any) -> dict[str, Any]:
    """GLM-4.7-Flash and DeepSeek-V3: latent attention, sigmoid scores with a bias that only selects, shared experts."""
    groups = getattr(hf, "n_group", 1) or 1
    grouped = {"moe_router_num_groups": groups, "moe_router_group_topk": hf.topk_group} if groups > 1 else {}
    if groups > 1 and hf.num_experts_per_tok // hf.topk_group != 2:
        raise ValueError(
            "--backend megatron expects twice as many experts a token as groups, got "
            f"{hf.num_experts_per_tok} and {hf.topk_group}: the model scores a group by its best two experts, "
            "megatron-core by the best of a token's experts divided by groups; use --backend hf"
        )
    if not hf.norm_topk_prob:
        raise ValueError("--backend megatron expects norm_topk_prob, got a model without: use --backend hf")
    if hf.q_lora_rank is None:
        raise ValueError(
            "--backend megatron expects compressed queries (q_lora_rank), got a model without: megatron-core 0.19 "
            "norms such queries, which the model does not; use --backend hf"
        )
    return {
        "multi_latent_attention": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rope_type": "rope",
        "rotary_base": rope_theta(hf),
        "qk_layernorm": True,
        "num_moe_experts": hf.n_routed_experts,
        "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts,
        "moe_layer_freq": _sparse(hf),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # the bias is the model's own; training does not move it
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        **grouped,
    }


def _sparse(hf: Any) -> list[int]:
    kinds = getattr(hf, "mlp_layer_types", None)
    if kinds is not None:
        return [int(kind == "sparse") for kind in kinds]
    return [int(layer >= hf.first_k_dense_replace) for layer in range(hf.num_hidden_layers)]


def _qwen(hf: Any) -> dict[str, Any]:
    """Qwen3-MoE: grouped heads with norms of queries and keys, softmax scores."""
    sparse = [
        int(layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0)
        for layer in range(hf.num_hidden_layers)
    ]
    return {
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": hf.head_dim,
        "qk_layernorm": True,
        "num_moe_experts": hf.num_experts,
        "moe_layer_freq": sparse,
        "moe_router_score_function": "softmax",
        # A softmax over the chosen is a softmax over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
    }


def _parallel(layout: MegatronConfig) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if layout.virtual_pipeline is not None:
        more |= {
            "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor or layout.tensor,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "variable_seq_lengths": layout.pipeline > 1,  # microbatches differ in length
        "pipeline_dtype": layout.torch_dtype,
        "params_dtype": layout.torch_dtype,
        "bf16": layout.dtype == "bfloat16",
        **more,
    }


_FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "glm4_moe_lite": _mla,
    "deepseek_v3": _mla,
    "qwen3_moe": _qwen,
}
