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
    names = (
        "num_hidden_layers", "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts",
        "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "layers_block_type",
    )  # fmt: skip
    # These configs have no default of their own.
    incomplete: dict[str, dict[str, Any]] = {
        "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
        "deepseek_v2": {"num_experts_per_tok": 2},
        "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 6},
        "lfm2_moe": {"layer_types": ["conv"] * 7},
    }
    given: dict[str, Any] = {"num_hidden_layers": 7} | incomplete.get(family, {})
    if family == "nemotron_h":  # counts its blocks
        del given["num_hidden_layers"]
    config = AutoConfig.for_model(family, **given)
    full = config.to_dict()
    short = {name: full[name] for name in ("model_type", *names) if full.get(name) is not None}
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


KIMI_K2: dict[str, Any] = {
    "model_type": "kimi_k2",
    "num_hidden_layers": 61,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def test_kimi_k2_is_deepseek_v3_under_its_own_name() -> None:
    same = {**KIMI_K2, "model_type": "deepseek_v3"}
    for config in (KIMI_K2, {"model_type": "kimi_k25", "text_config": KIMI_K2}):
        assert geometry_from_config(config) == geometry_from_config(same)
        assert geometry_from_config(config).layers == tuple(range(1, 61))
        assert router_spec(config) == router_spec(same)


@pytest.mark.parametrize(
    ("freq", "layers"), [(2, (2, 4, 6)), ([0, 1, 1, 0, 0, 0, 1], (1, 2, 6)), (1, (1, 2, 3, 4, 5, 6))]
)
def test_sparse_layers_may_come_at_a_frequency(freq: Any, layers: tuple[int, ...]) -> None:
    assert geometry_from_config({**KIMI_K2, "num_hidden_layers": 7, "moe_layer_freq": freq}).layers == layers


@pytest.mark.parametrize("freq", [0, "2", [1, 1]])
def test_frequencies_that_cannot_be(freq: Any) -> None:
    with pytest.raises(UnsupportedModel, match="moe_layer_freq as an integer from 1, or 61 flags"):
        geometry_from_config({**KIMI_K2, "moe_layer_freq": freq})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**KIMI_K2, "scoring_func": "softmax"}, "scoring_func sigmoid, got 'softmax'"),
        ({"model_type": "cohere2_moe", "expert_selection_fn": "max"}, "softmax or sigmoid, got 'max'"),
        ({"model_type": "inkling2_text", "scoring_func": "sqrtsoftplus"}, "got 'sqrtsoftplus'"),
        ({"model_type": "phimoe", "num_experts_per_tok": 4}, "num_experts_per_tok 2 of phimoe, got 4"),
    ],
)
def test_scores_that_no_spec_describes(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        router_spec(config)


def test_families_that_name_fields_their_own_way() -> None:
    ernie = {"model_type": "ernie4_5_moe", "num_hidden_layers": 6, "moe_num_experts": 64, "moe_k": 6,
             "moe_layer_interval": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 4}  # fmt: skip
    assert geometry_from_config(ernie) == RoutingGeometry(num_layers=6, layers=(1, 3), num_experts=64, top_k=6)
    nemotron = {"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*E", "n_routed_experts": 8,
                "num_experts_per_tok": 2}  # fmt: skip
    assert geometry_from_config(nemotron) == RoutingGeometry(num_layers=5, layers=(1, 4), num_experts=8, top_k=2)
    jamba = {"model_type": "jamba", "num_hidden_layers": 6, "num_experts": 16, "num_experts_per_tok": 2}
    assert geometry_from_config(jamba).layers == (1, 3, 5)
