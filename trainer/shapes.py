"""The public models that recipes are for, as transformers configs: what their own config.json says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DeepseekV3Config, Glm4MoeLiteConfig, Qwen3MoeConfig

from pacenote.trainer.model import TinyShape, tiny_config


def glm47_flash() -> Any:
    """zai-org/GLM-4.7-Flash: 46 of 47 layers route 4 of 64 experts."""
    return Glm4MoeLiteConfig()


def qwen3_30b_a3b() -> Any:
    """Qwen/Qwen3-30B-A3B: all 48 layers route 8 of 128 experts."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )


def moonlight() -> Any:
    """moonshotai/Moonlight-16B-A3B: 26 of 27 layers route 6 of 64 experts; queries are not compressed."""
    return DeepseekV3Config(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        q_lora_rank=None,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        tie_word_embeddings=False,
    )


def deepseek_v3() -> Any:
    """deepseek-ai/DeepSeek-V3: 58 of 61 layers route 8 of 256 experts, in 4 of 8 groups."""
    return DeepseekV3Config()


def tiny() -> Any:
    """The tiny recipe's."""
    return tiny_config(TinyShape())


SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": tiny,
    "glm47_flash": glm47_flash,
    "qwen3_30b_a3b": qwen3_30b_a3b,
    "moonlight": moonlight,
    "deepseek_v3": deepseek_v3,
}
