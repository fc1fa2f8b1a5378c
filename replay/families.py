"""The router classes of transformers, read as specs: which layers of a config route, and how.

Read from the router classes of transformers 5.24, `modeling_<family>.py`; defaults from `configuration_<family>.py`.
`replay.hf.attach` checks every spec against the module itself, so an entry here that is wrong is refused, not used.
What no spec describes stands in REFUSED, with the reason. No torch: servers import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import UnsupportedModel

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A router class.

    Attributes:
        layers: marks each hidden layer of a config as sparse or not.
        router: the spec of a config.
        defaults: of fields that a config may leave out.
        names: what the family calls fields that the others call otherwise, and the others' name.
    """

    layers: Callable[[Config], list[bool]]
    router: Callable[[Config], RouterSpec]
    defaults: Config = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def fields(self, config: Config) -> Config:
        """The config under common names, with defaults where a field is missing or null."""
        given = {name: value for name, value in config.items() if value is not None}
        renamed = {common: given[own] for own, common in self.names.items() if own in given}
        return {**self.defaults, **renamed, **given}


def integer(fields: Config, name: str) -> int:
    """The field, a count.

    Raises:
        UnsupportedModel: it is missing, or no integer of at least 0.
    """
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedModel(f"expected {name} in the config of {fields['model_type']} as an integer, got {value!r}")
    return value


# --- which layers ----------------------------------------------------------------------------------------------------


def _every(fields: Config) -> list[bool]:
    return [True] * integer(fields, "num_hidden_layers")


def _after_dense(fields: Config) -> list[bool]:
    """Dense layers first, then every `moe_layer_freq`-th, or those it marks: GLM-4.5, DeepSeek-V3."""
    count, dense, freq = (
        integer(fields, "num_hidden_layers"), integer(fields, "first_k_dense_replace"), fields.get("moe_layer_freq", 1),
    )  # fmt: skip
    if isinstance(freq, list | tuple) and len(freq) == count:
        return [layer >= dense and bool(freq[layer]) for layer in range(count)]
    if not isinstance(freq, int) or freq < 1:
        raise UnsupportedModel(f"expected moe_layer_freq as an integer from 1, or {count} flags, got {freq!r}")
    return [layer >= dense and layer % freq == 0 for layer in range(count)]


def _by_type(fields: Config) -> list[bool]:
    """`mlp_layer_types`, or else dense layers first: GLM-4.7-Flash, GLM-5."""
    types = fields.get("mlp_layer_types")
    if types is None:
        return _after_dense(fields)
    count = integer(fields, "num_hidden_layers")
    if not isinstance(types, list | tuple) or len(types) != count or not set(types) <= {"dense", "sparse"}:
        raise UnsupportedModel(f"expected mlp_layer_types as {count} of 'dense' and 'sparse', got {types!r}")
    return [kind == "sparse" for kind in types]


def _by_step(fields: Config) -> list[bool]:
    """Every `decoder_sparse_step`-th layer but those of `mlp_only_layers`: Qwen2-MoE and Qwen3-MoE."""
    step, dense = integer(fields, "decoder_sparse_step"), fields["mlp_only_layers"]
    return [
        layer not in dense and step > 0 and (layer + 1) % step == 0
        for layer in range(integer(fields, "num_hidden_layers"))
    ]


def _by_period(fields: Config) -> list[bool]:
    """Every `expert_layer_period`-th layer from `expert_layer_offset` on: Jamba."""
    period, offset = integer(fields, "expert_layer_period"), integer(fields, "expert_layer_offset")
    return [period > 0 and layer % period == offset for layer in range(integer(fields, "num_hidden_layers"))]


def _by_interval(fields: Config) -> list[bool]:
    """Every `moe_layer_interval`-th layer of a range: ERNIE 4.5."""
    count, step = integer(fields, "num_hidden_layers"), integer(fields, "moe_layer_interval")
    start, end = integer(fields, "moe_layer_start_index"), fields.get("moe_layer_end_index", -1)
    end = count - 1 if end == -1 else end
    return [step > 0 and (layer + 1) % step == 0 and start <= layer <= end for layer in range(count)]


def _by_block(fields: Config) -> list[bool]:
    """`layers_block_type`, or `hybrid_override_pattern` with its E: Nemotron-H."""
    blocks = fields.get("layers_block_type") or fields.get("hybrid_override_pattern")
    if not isinstance(blocks, list | tuple | str):
        raise UnsupportedModel(f"expected layers_block_type or hybrid_override_pattern in the config, got {blocks!r}")
    return [block in ("moe", "E") for block in blocks]


# --- how they route --------------------------------------------------------------------------------------------------


def _sigmoid(fields: Config) -> RouterSpec:
    """DeepSeek-V3's router: biased sigmoid scores choose, inside the best groups; unbiased ones weigh.

    The module computes float32 logits and everything else in their dtype, which autocast makes bfloat16.
    """
    if fields.get("scoring_func", "sigmoid") != "sigmoid":
        raise UnsupportedModel(f"expected scoring_func sigmoid, got {fields['scoring_func']!r}")
    renormalize = bool(fields["norm_topk_prob"])
    return RouterSpec(
        score="sigmoid",
        renormalize=renormalize,
        eps=float(fields.get("eps", 1e-20)) if renormalize else 0.0,
        scale=float(fields["routed_scaling_factor"]),
        groups=integer(fields, "n_group"),
        topk_groups=integer(fields, "topk_group"),
        score_dtype="logits",
        weight_dtype="logits",
    )


def _softmax(fields: Config) -> RouterSpec:
    """Qwen's router: softmax over all experts in float32, weights back in the logits' dtype."""
    return RouterSpec(score="softmax", renormalize=bool(fields["norm_topk_prob"]), weight_dtype="logits")


def _mixtral(fields: Config) -> RouterSpec:
    """Also ERNIE 4.5, whose smallest denominator, 1e-12, no softmax of chosen experts comes near."""
    return RouterSpec(score="softmax", renormalize=True)


def _gpt_oss(fields: Config) -> RouterSpec:
    return RouterSpec(score="softmax_topk", score_dtype="logits", weight_dtype="logits")


def _granite(fields: Config) -> RouterSpec:
    return RouterSpec(score="softmax_topk")


def _minimax_m2(fields: Config) -> RouterSpec:
    return RouterSpec(score="sigmoid", renormalize=True)


def _cohere2(fields: Config) -> RouterSpec:
    """Softmax over the chosen logits in float32, or their sigmoids in the logits' dtype."""
    kind = fields["expert_selection_fn"]
    if kind == "softmax":
        return RouterSpec(score="softmax_topk", weight_dtype="logits")
    if kind != "sigmoid":
        raise UnsupportedModel(f"expected expert_selection_fn softmax or sigmoid, got {kind!r}")
    normed = bool(fields["norm_topk_prob"])
    return RouterSpec(score="sigmoid", renormalize=normed, score_dtype="logits", weight_dtype="logits")


def _deepseek_v2(fields: Config) -> RouterSpec:
    """Greedy, or greedy inside the groups with the best single expert; never renormalised."""
    scale = float(fields["routed_scaling_factor"])
    if fields["topk_method"] == "greedy":
        return RouterSpec(score="softmax", scale=scale)
    if fields["topk_method"] != "group_limited_greedy":
        raise UnsupportedModel(f"expected topk_method greedy or group_limited_greedy, got {fields['topk_method']!r}")
    groups, topk = integer(fields, "n_group"), integer(fields, "topk_group")
    return RouterSpec(score="softmax", scale=scale, groups=groups, topk_groups=topk, group_score="max")


def _phimoe(fields: Config) -> RouterSpec:
    """sparsemixer, in the dtype of the logits; the module chooses two experts, whatever the config says."""
    if integer(fields, "num_experts_per_tok") != 2:
        raise UnsupportedModel(f"expected num_experts_per_tok 2 of phimoe, got {fields['num_experts_per_tok']}")
    jitter = float(fields["router_jitter_noise"])
    return RouterSpec(score="sparsemixer", jitter=jitter, score_dtype="logits", weight_dtype="logits")


def _mistral4(fields: Config) -> RouterSpec:
    """DeepSeek-V3's router with softmax scores and no bias."""
    renormalize = bool(fields["norm_topk_prob"])
    return RouterSpec(
        score="softmax",
        renormalize=renormalize,
        eps=1e-20 if renormalize else 0.0,
        scale=float(fields["routed_scaling_factor"]),
        groups=integer(fields, "n_group"),
        topk_groups=integer(fields, "topk_group"),
        score_dtype="logits",
        weight_dtype="logits",
    )


# --- the table -------------------------------------------------------------------------------------------------------

_ONE_GROUP = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
_DEEPSEEK_V3 = {
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": ()}
_LING = {
    "num_expert_group": "n_group", "num_experts_per_token": "num_experts_per_tok", "moe_renormalize": "norm_topk_prob",
}  # fmt: skip
_ROUTE_SCALE = {"route_scale": "routed_scaling_factor"}


def _deepseek_like(dense: int, scale: float, **others: Any) -> Family:
    """DeepSeek-V3's router in one group, after `dense` dense layers."""
    defaults = {**_ONE_GROUP, "first_k_dense_replace": dense, "routed_scaling_factor": scale, **others}
    return Family(layers=_by_type, router=_sigmoid, defaults=defaults)


def _granite_like() -> Family:
    return Family(layers=_every, router=_granite)


FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        layers=_after_dense,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 1},
        names={"num_dense_layers": "first_k_dense_replace", **_ROUTE_SCALE},
    ),
    "aria_text": Family(
        layers=_every,
        router=_gpt_oss,
        names={"moe_num_experts": "num_experts", "moe_topk": "num_experts_per_tok"},
    ),
    "axk1": _deepseek_like(1, 2.5, n_group=8, topk_group=4),
    "axk2": _deepseek_like(1, 2.5),
    "bailing_hybrid": Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_DEEPSEEK_V3, "first_k_dense_replace": 2},
        names=_LING,
    ),
    # The scaling factor is in the config, and no module reads it.
    "beam": Family(
        layers=_by_type,
        router=lambda fields: _sigmoid({**fields, "routed_scaling_factor": 1.0}),
        defaults=_DEEPSEEK_V3,
    ),
    "cohere2_moe": Family(
        layers=_by_type,
        router=_cohere2,
        defaults={"first_k_dense_replace": 0, "expert_selection_fn": "softmax", "norm_topk_prob": True},
    ),
    "deepseek_ocr2_text": Family(
        layers=_by_type,
        router=_deepseek_v2,
        defaults={"first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
    "deepseek_v2": Family(
        layers=_after_dense,
        router=_deepseek_v2,
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
    "deepseek_v3": Family(layers=_after_dense, router=_sigmoid, defaults=_DEEPSEEK_V3),
    "deepseek_v32": Family(layers=_by_type, router=_sigmoid, defaults=_DEEPSEEK_V3),
    "dots1": Family(
        layers=_after_dense,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 0, "norm_topk_prob": False},
    ),
    "dots3_note_text": _deepseek_like(1, 1.0),
    "ernie4_5_moe": Family(
        layers=_by_interval,
        router=_mixtral,
        defaults={"moe_layer_interval": 1, "moe_layer_start_index": 1},
        names={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
    ),
    "exaone_moe": _deepseek_like(1, 2.5),
    "flex_olmo": Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": False}),
    "flint": Family(
        layers=_by_step,
        router=lambda fields: _sigmoid({**fields, **_ONE_GROUP, "norm_topk_prob": fields["norm_topk_prob"], "eps": 0}),
        defaults={"decoder_sparse_step": 1, "mlp_only_layers": (0, 1), "norm_topk_prob": True},
    ),
    "glm4_moe": Family(layers=_after_dense, router=_sigmoid, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}),
    "glm4_moe_lite": _deepseek_like(1, 1.8),
    "glm4v_moe_text": Family(layers=_after_dense, router=_sigmoid, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}),
    "glm5_next_text": _deepseek_like(3, 2.5),
    "glm_moe_dsa": _deepseek_like(3, 2.5),
    "gpt_oss": Family(layers=_every, router=_gpt_oss),
    "granitemoe": _granite_like(),
    "granitemoe_swa": _granite_like(),
    "granitemoehybrid": _granite_like(),
    "granitemoeshared": _granite_like(),
    "hy_v3": Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 1, "routed_scaling_factor": 2.826},
        names={"router_scaling_factor": "routed_scaling_factor"},
    ),
    "hy_v4": _deepseek_like(1, 2.827),
    "hy_v4_vl_text": _deepseek_like(1, 2.827),
    "inkling2_loop_text": Family(
        layers=_every, router=_sigmoid, defaults={**_ONE_GROUP, "routed_scaling_factor": 8.0}, names=_ROUTE_SCALE
    ),
    "inkling2_text": Family(
        layers=_every, router=_sigmoid, defaults={**_ONE_GROUP, "routed_scaling_factor": 8.0}, names=_ROUTE_SCALE
    ),
    "jamba": Family(
        layers=_by_period,
        router=_softmax,
        defaults={"expert_layer_period": 2, "expert_layer_offset": 1, "norm_topk_prob": False},
    ),
    # Kimi-K2's own config; transformers has its layers as deepseek_v3.
    "kimi_k2": Family(layers=_after_dense, router=_sigmoid, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}),
    "kimi_linear": Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 1, "routed_scaling_factor": 2.446},
        names=_LING,
    ),
    "laguna": Family(layers=_by_type, router=_minimax_m2, defaults={"first_k_dense_replace": 1}),
    "lara_mini": Family(
        layers=_every,
        router=lambda fields: RouterSpec(score="softmax", renormalize=bool(fields["norm_topk_prob"])),
        defaults={"norm_topk_prob": True},
    ),
    "lfm2_moe": Family(
        layers=_after_dense,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 2, "eps": 1e-6},
        names={"num_dense_layers": "first_k_dense_replace"},
    ),
    "mellum": Family(layers=_by_type, router=_softmax, defaults={"first_k_dense_replace": 0, "norm_topk_prob": True}),
    "mimo_v2_flash": _deepseek_like(1, 1.0),
    "minimax": Family(layers=_every, router=_mixtral),
    "minimax_m2": Family(layers=_every, router=_minimax_m2),
    "minimax_m3_vl_text": Family(layers=_by_type, router=_minimax_m2, defaults={"first_k_dense_replace": 0}),
    "mistral4": Family(layers=_after_dense, router=_mistral4, defaults={**_ONE_GROUP, "first_k_dense_replace": 0}),
    "mistral_large4_text": Family(
        layers=_by_type, router=_mistral4, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}
    ),
    "mixtral": Family(layers=_every, router=_mixtral),
    "muse_spark_text": _deepseek_like(0, 1.0, eps=1e-15),
    "nemotron_h": Family(layers=_by_block, router=_sigmoid, defaults=_ONE_GROUP),
    "olmoe": Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": False}),
    "phimoe": Family(layers=_every, router=_phimoe, defaults={"num_experts_per_tok": 2, "router_jitter_noise": 0.01}),
    "qwen2_moe": Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": False}),
    "qwen3_5_moe_text": Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": True}),
    "qwen3_moe": Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": False}),
    "qwen3_next": Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": True}),
    "qwen3_omni_moe_text": Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": True}),
    "qwen3_vl_moe_text": Family(
        layers=_by_step,
        router=lambda fields: _softmax({**fields, "norm_topk_prob": True}),
        defaults=_QWEN,
    ),
    "qwen4_exp_text": Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": True}),
    "solar_open": Family(layers=_every, router=_sigmoid, defaults=_ONE_GROUP),
    "step3p5": Family(layers=_by_type, router=_minimax_m2, defaults={"first_k_dense_replace": 3}),
    "unlimited_ocr_text": Family(
        layers=_by_type,
        router=_deepseek_v2,
        defaults={"first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
}
"""By `model_type`."""

_LOGITS_ONLY = "its router gives no (logits, weights, experts): a hook on it cannot say where tokens go"

REFUSED: dict[str, str] = {
    "dbrx": _LOGITS_ONLY,
    "deepseek_v4": "its first layers choose experts by a table of token ids, and the others score by sqrt(softplus)",
    "diffusion_gemma": "its router gives probabilities instead of logits, and scales the weight of each expert",
    "ernie4_5_vl_moe_text": "it has two routers a layer, of text and of images, which a row cannot tell apart",
    "gemma4_text": "its router gives probabilities instead of logits, and scales the weight of each expert",
    "hunyuan_v1_moe": _LOGITS_ONLY,
    "inkling_mm_model": "its router weighs routed and shared experts together, and gives four tensors",
    "jetmoe": "it routes attention heads as well, and its routers give expert sizes instead of weights",
    "kolibri1": "it adds the selection bias to logits, where every other router adds it to scores",
    "llama4_text": "its experts compute every token, weighed by a score that is 0 where the router did not choose",
    "longcat_flash": "it counts experts that do nothing among the chosen, and has two decoder blocks a layer",
    "nllb-moe": "its router has a capacity and drops tokens",
    "openai_privacy_filter": "it classifies tokens, and nothing samples from it",
    "switch_transformers": "its router has a capacity and drops tokens",
    "zaya": "its router carries a state from layer to layer, and an expert that does nothing stands for the first one",
}
"""`model_type`s whose routers no spec describes, and why."""
