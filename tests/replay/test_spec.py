"""Geometry and specs from configs: published shapes, transformers' own defaults, and configs that are wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.spec import RoutingGeometry, families, geometry_from_config, router_spec

GLM_47_FLASH: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "num_hidden_layers": 47,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 1,
}
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize(
    ("config", "layers", "experts", "top_k"),
    [
        (GLM_47_FLASH, range(1, 47), 64, 4),
        (QWEN3_30B, range(48), 128, 8),
        (DEEPSEEK_V3, range(3, 61), 256, 8),
    ],
)
def test_published_shapes(config: dict[str, Any], layers: range, experts: int, top_k: int) -> None:
    """Multi-token-prediction layers are not hidden layers: no row is theirs."""
    geometry = geometry_from_config(config)
    assert geometry == RoutingGeometry(
        num_layers=config["num_hidden_layers"], layers=tuple(layers), num_experts=experts, top_k=top_k
    )


def test_published_routers() -> None:
    glm, qwen, deepseek = (router_spec(config) for config in (GLM_47_FLASH, QWEN3_30B, DEEPSEEK_V3))
    assert (glm.score, glm.renormalize, glm.eps, glm.scale, glm.groups) == ("sigmoid", True, 1e-20, 1.8, 1)
    assert (qwen.score, qwen.renormalize, qwen.weight_dtype) == ("softmax", True, "logits")
    assert (deepseek.groups, deepseek.topk_groups, deepseek.group_score) == (8, 4, "top2")


@pytest.mark.parametrize("family", families())
def test_a_short_config_means_what_transformers_reads_into_it(family: str) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    names = ("num_hidden_layers", "n_routed_experts", "num_local_experts", "num_experts")
    given: dict[str, Any] = {"num_hidden_layers": 7}
    # These configs have no default of their own.
    given |= {
        "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
        "deepseek_v2": {"num_experts_per_tok": 2},
    }.get(family, {})
    full = AutoConfig.for_model(family, **given).to_dict()
    short = {name: full[name] for name in ("model_type", *names) if name in full}
    short["num_experts_per_tok"] = AutoConfig.for_model(family, **given).num_experts_per_tok
    assert geometry_from_config(full) == geometry_from_config(short)
    assert router_spec(full) == router_spec(short)


def test_layer_types_outrank_the_dense_count() -> None:
    types = ["sparse", "dense", "sparse"]
    geometry = geometry_from_config({**GLM_47_FLASH, "num_hidden_layers": 3, "mlp_layer_types": types})
    assert geometry.layers == (0, 2)


def test_sparse_steps_and_exceptions() -> None:
    config = {**QWEN3_30B, "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert geometry_from_config(config).layers == (1, 5, 7)


def test_the_text_part_of_a_multimodal_config() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": {**QWEN3_30B, "model_type": "qwen3_5_moe_text"}}
    assert geometry_from_config(config).num_experts == 128
    assert router_spec(config).renormalize


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2}, "routers are known .*glm4_moe_lite.*got 'llama'"),
        ({}, "got None"),
        ("glm4_moe_lite", "as a mapping, got str"),
        ({**GLM_47_FLASH, "num_hidden_layers": None}, "num_hidden_layers in the config of glm4_moe_lite .* got None"),
        ({**GLM_47_FLASH, "num_hidden_layers": "47"}, "got '47'"),
        ({**GLM_47_FLASH, "num_hidden_layers": True}, "got True"),
        ({**GLM_47_FLASH, "num_hidden_layers": -1}, "got -1"),
        ({**GLM_47_FLASH, "n_routed_experts": None}, "one number of experts .* got none"),
        ({**GLM_47_FLASH, "num_experts": 32}, "one number of experts"),
        ({**GLM_47_FLASH, "num_experts_per_tok": 65}, "65 of 64"),
        ({**GLM_47_FLASH, "num_experts_per_tok": 0}, "0 of 64"),
        ({**GLM_47_FLASH, "mlp_layer_types": ["sparse"]}, "mlp_layer_types as 47"),
        ({**GLM_47_FLASH, "num_hidden_layers": 1, "mlp_layer_types": ["moe"]}, "mlp_layer_types as 1"),
        ({**GLM_47_FLASH, "first_k_dense_replace": 47}, "got none among 47 layers"),
        ({**QWEN3_30B, "decoder_sparse_step": 0}, "got none among 48 layers"),
    ],
)
def test_wrong_configs(config: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        geometry_from_config(config)


def test_unknown_routing_of_a_known_family() -> None:
    config = {**DEEPSEEK_V3, "model_type": "deepseek_v2", "topk_method": "noaux_tc"}
    with pytest.raises(UnsupportedModel, match="noaux_tc"):
        router_spec(config)


def test_a_server_needs_no_torch_for_records() -> None:
    script = "import sys, pacenote.replay.wire, pacenote.replay.audit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
