"""Tiny models of every family that replay knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pacenote.replay.tiny import tiny_model, to_dtype

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
_DENSE_FIRST: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_BY_TYPE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_INDEXER: dict[str, Any] = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 16,
}

FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, **_DENSE_FIRST, **_GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_MLA, **_DENSE_FIRST, **_GROUPS},
    "deepseek_v32": {**_MLA, **_DENSE_FIRST, **_GROUPS, **_BY_TYPE, **_INDEXER},
    "dots1": {**_DENSE_FIRST, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "exaone_moe": {**_BY_TYPE, **_GROUPS, "num_experts": 8, "layer_types": ["full_attention"] * 3},
    "flex_olmo": {"num_experts": 8},
    "glm4_moe": {**_DENSE_FIRST, "routed_scaling_factor": 1.5},
    "glm4_moe_lite": {**_MLA, **_DENSE_FIRST},
    "glm_moe_dsa": {**_MLA, **_DENSE_FIRST, **_BY_TYPE, **_INDEXER},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 64},
    "hy_v3": {"num_experts": 8, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "mimo_v2_flash": {
        **_BY_TYPE,
        "n_routed_experts": 8,
        "layer_types": ["full_attention"] * 3,
        "v_head_dim": 16,
        "routed_scaling_factor": 1.5,
    },
    "minimax": {"num_local_experts": 8, "layer_types": ["full_attention"] * 3},
    "minimax_m2": {"num_local_experts": 8},
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**_LINEAR, "num_experts": 8},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_next": {**_LINEAR, "num_experts": 8},
    "solar_open": {**_GROUPS, "n_routed_experts": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.5},
}


CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"num_experts_per_tok": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm4v_moe_text": {"head_dim": 128},
    "kimi_k2": {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen3_omni_moe_text": {"head_dim": 128},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 32,
        "indexer_compress_ratio": 1,
    },
    "step3p5": {"sliding_window": 64},
}
"""What the default configs of other families lack, or are too large in."""


def default_config(family: str, **fields: Any) -> dict[str, Any]:
    """The config of a family as transformers has it by default, at full size, completed where it must be."""
    from transformers import CONFIG_MAPPING

    source = "deepseek_v3" if family == "kimi_k2" else family
    if source not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    given = {**CONFIGS.get(family, {}), **fields}
    if "mlp_layer_types" in given:
        given["num_hidden_layers"] = len(given["mlp_layer_types"])
    config: dict[str, Any] = CONFIG_MAPPING[source](**given).to_dict()
    return {**config, "model_type": family}


def fewer_experts(config: dict[str, Any]) -> dict[str, Any]:
    """At most 32 experts and 4 a token, for tests that need no more."""
    names = {"n_routed_experts": 32, "num_experts": 32, "num_local_experts": 32, "moe_num_experts": 32}
    names |= {"num_experts_per_tok": 4, "num_experts_per_token": 4, "moe_k": 4}
    return {**config, **{name: min(most, config[name]) for name, most in names.items() if config.get(name)}}


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A tiny model of the family in eval mode; selection biases are random too, so that they matter."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if family not in FIELDS:
        model = to_dtype(tiny_model(fewer_experts(default_config(family, **fields)), seed=seed), dtype)
        for module in model.modules():  # LFM2's bias, which its class does not keep
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias = module.expert_bias.float()
        return model
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    config = AutoConfig.for_model(family, **{**_COMMON, **FIELDS[family], **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.to(dtype).eval()


Build = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny() -> Build:
    """`tiny(family, dtype=..., **config fields)` builds a model."""
    return build
