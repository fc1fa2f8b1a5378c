"""From a Hugging Face config to what replay must know: where the routers sit and how they turn logits into weights.

Read from the router classes of transformers 5.24, `modeling_<family>.py`; defaults from `configuration_<family>.py`.
`replay.hf.attach` checks every spec against the module itself, so an entry here that is wrong is refused, not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingGeometry:
    """Where a model routes.

    Attributes:
        num_layers: all hidden layers, dense ones included, multi-token-prediction layers not.
        layers: global ids of the mixture-of-experts layers, ascending.
        num_experts: E, routed experts a layer (shared ones not counted).
        top_k: K, routed experts a token.

    Raises:
        UnsupportedModel: numbers that fit no model.
    """

    num_layers: int
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 65536 or not 1 <= self.top_k <= self.num_experts:
            raise UnsupportedModel(
                f"expected 1 <= experts a token <= experts <= 65536, got {self.top_k} of {self.num_experts}"
            )
        if not self.layers:
            raise UnsupportedModel(f"expected mixture-of-experts layers, got none among {self.num_layers} layers")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise UnsupportedModel(f"expected ascending layer ids below {self.num_layers}, got {self.layers}")


Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """A router class: `layers(config)` marks each hidden layer as sparse or not, `router(config)` is its spec."""

    layers: Callable[[Config], list[bool]]
    router: Callable[[Config], RouterSpec]
    defaults: Config


def geometry_from_config(config: Config) -> RoutingGeometry:
    """The routing geometry of a `config.json`.

    Args:
        config: the parsed file, or `model.config.to_dict()`. Of a multimodal config the text part is used.

    Raises:
        UnsupportedModel: no known mixture-of-experts family, or a field that is needed is missing or no integer.
    """
    family, fields = _family(config)
    sparse = family.layers(fields)
    return RoutingGeometry(
        num_layers=len(sparse),
        layers=tuple(layer for layer, is_sparse in enumerate(sparse) if is_sparse),
        num_experts=_num_experts(fields),
        top_k=_integer(fields, "num_experts_per_tok"),
    )


def router_spec(config: Config) -> RouterSpec:
    """How the routers of a `config.json` weigh experts; the same for every layer of a model.

    Raises:
        UnsupportedModel: as `geometry_from_config`, or routing that no spec describes.
    """
    family, fields = _family(config)
    return family.router(fields)


def families() -> tuple[str, ...]:
    """The `model_type`s that can be replayed."""
    return tuple(sorted(_FAMILIES))


def text_config(config: Config) -> Config:
    """The language model's part of a config: itself, or its `text_config`."""
    inner = config.get("text_config")
    return inner if config.get("model_type") not in _FAMILIES and isinstance(inner, Mapping) else config


def _family(config: Config) -> tuple[_Family, Config]:
    """The family and the fields, with defaults where a field is missing or null."""
    if not isinstance(config, Mapping):
        raise UnsupportedModel(f"expected a config as a mapping, got {type(config).__name__}: use config.to_dict()")
    config = text_config(config)
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UnsupportedModel(
            f"expected a model_type whose routers are known ({', '.join(families())}), got {config.get('model_type')!r}"
        )
    return family, {**family.defaults, **{name: value for name, value in config.items() if value is not None}}


def _integer(fields: Config, name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedModel(f"expected {name} in the config of {fields['model_type']} as an integer, got {value!r}")
    return value


def _num_experts(fields: Config) -> int:
    """E under any of its names; transformers writes some families' `num_experts` as `num_local_experts`."""
    names = [name for name in ("n_routed_experts", "num_local_experts", "num_experts") if name in fields]
    counts = {_integer(fields, name) for name in names}
    if len(counts) != 1:
        raise UnsupportedModel(
            f"expected one number of experts in the config of {fields['model_type']}, "
            f"got {({name: fields[name] for name in names}) or 'none'}"
        )
    return counts.pop()


def _every(fields: Config) -> list[bool]:
    return [True] * _integer(fields, "num_hidden_layers")


def _after_dense(fields: Config) -> list[bool]:
    """Dense layers first: GLM-4.5, DeepSeek-V3."""
    return [
        layer >= _integer(fields, "first_k_dense_replace") for layer in range(_integer(fields, "num_hidden_layers"))
    ]


def _by_type(fields: Config) -> list[bool]:
    """`mlp_layer_types`, or else dense layers first: GLM-4.7-Flash, GLM-5."""
    types = fields.get("mlp_layer_types")
    if types is None:
        return _after_dense(fields)
    count = _integer(fields, "num_hidden_layers")
    if not isinstance(types, list | tuple) or len(types) != count or not set(types) <= {"dense", "sparse"}:
        raise UnsupportedModel(f"expected mlp_layer_types as {count} of 'dense' and 'sparse', got {types!r}")
    return [kind == "sparse" for kind in types]


def _by_step(fields: Config) -> list[bool]:
    """Every `decoder_sparse_step`-th layer but those of `mlp_only_layers`: Qwen2-MoE and Qwen3-MoE."""
    step, dense = _integer(fields, "decoder_sparse_step"), fields["mlp_only_layers"]
    return [
        layer not in dense and step > 0 and (layer + 1) % step == 0
        for layer in range(_integer(fields, "num_hidden_layers"))
    ]


def _sigmoid(fields: Config) -> RouterSpec:
    """DeepSeek-V3's router: biased sigmoid scores choose, inside the best groups; unbiased ones weigh.

    The module computes float32 logits and everything else in their dtype, which autocast makes bfloat16.
    """
    return RouterSpec(
        score="sigmoid",
        renormalize=bool(fields["norm_topk_prob"]),
        eps=1e-20 if fields["norm_topk_prob"] else 0.0,
        scale=float(fields["routed_scaling_factor"]),
        groups=_integer(fields, "n_group"),
        topk_groups=_integer(fields, "topk_group"),
        score_dtype="logits",
        weight_dtype="logits",
    )


def _softmax(fields: Config) -> RouterSpec:
    """Qwen's router: softmax over all experts in float32, weights back in the logits' dtype."""
    return RouterSpec(score="softmax", renormalize=bool(fields["norm_topk_prob"]), weight_dtype="logits")


def _mixtral(fields: Config) -> RouterSpec:
    return RouterSpec(score="softmax", renormalize=True)


def _gpt_oss(fields: Config) -> RouterSpec:
    return RouterSpec(score="softmax_topk", score_dtype="logits", weight_dtype="logits")


def _minimax_m2(fields: Config) -> RouterSpec:
    return RouterSpec(score="sigmoid", renormalize=True)


def _hy_v3(fields: Config) -> RouterSpec:
    scale = float(fields["router_scaling_factor"])
    return RouterSpec(
        score="sigmoid", renormalize=True, eps=1e-20, scale=scale, score_dtype="logits", weight_dtype="logits"
    )


def _deepseek_v2(fields: Config) -> RouterSpec:
    """Greedy, or greedy inside the groups with the best single expert; never renormalised."""
    scale = float(fields["routed_scaling_factor"])
    if fields["topk_method"] == "greedy":
        return RouterSpec(score="softmax", scale=scale)
    if fields["topk_method"] != "group_limited_greedy":
        raise UnsupportedModel(f"expected topk_method greedy or group_limited_greedy, got {fields['topk_method']!r}")
    groups, topk = _integer(fields, "n_group"), _integer(fields, "topk_group")
    return RouterSpec(score="softmax", scale=scale, groups=groups, topk_groups=topk, group_score="max")


_ONE_GROUP = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
_DEEPSEEK_V3 = {
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": ()}

_FAMILIES: dict[str, _Family] = {
    "deepseek_v2": _Family(
        layers=_after_dense,
        router=_deepseek_v2,
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
    "deepseek_v3": _Family(layers=_after_dense, router=_sigmoid, defaults=_DEEPSEEK_V3),
    "deepseek_v32": _Family(layers=_by_type, router=_sigmoid, defaults=_DEEPSEEK_V3),
    "dots1": _Family(
        layers=_after_dense,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 0, "norm_topk_prob": False},
    ),
    "exaone_moe": _Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    ),
    "flex_olmo": _Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": False}),
    "glm4_moe": _Family(layers=_after_dense, router=_sigmoid, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}),
    "glm4_moe_lite": _Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
    ),
    "glm_moe_dsa": _Family(
        layers=_by_type,
        router=_sigmoid,
        defaults={**_ONE_GROUP, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    ),
    "gpt_oss": _Family(layers=_every, router=_gpt_oss, defaults={}),
    "hy_v3": _Family(
        layers=_by_type, router=_hy_v3, defaults={"first_k_dense_replace": 1, "router_scaling_factor": 2.826}
    ),
    "mimo_v2_flash": _Family(layers=_by_type, router=_sigmoid, defaults={**_ONE_GROUP, "first_k_dense_replace": 1}),
    "minimax": _Family(layers=_every, router=_mixtral, defaults={}),
    "minimax_m2": _Family(layers=_every, router=_minimax_m2, defaults={}),
    "mixtral": _Family(layers=_every, router=_mixtral, defaults={}),
    "olmoe": _Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": False}),
    "qwen2_moe": _Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": False}),
    "qwen3_5_moe_text": _Family(layers=_every, router=_softmax, defaults={"norm_topk_prob": True}),
    "qwen3_moe": _Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": False}),
    "qwen3_next": _Family(layers=_by_step, router=_softmax, defaults={**_QWEN, "norm_topk_prob": True}),
    "solar_open": _Family(layers=_every, router=_sigmoid, defaults=_ONE_GROUP),
}
