"""A small random model of a config's architecture: the same routers, everything else as small as it can be.

Experts, experts a token, groups and flags stay as they are, since they decide how a router computes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.families import Config
from pacenote.replay.spec import geometry_from_config, text_config

_SIZES = {
    "dense_intermediate_size": 32,
    "expert_ffn_hidden_size": 16,
    "intermediate_size": 32,
    "moe_hidden_size": 64,
    "moe_intermediate_size": 16,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "prefix_dense_intermediate_size": 32,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
_DROPPED = ("quantization_config", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
_ATTENTION = ("full_attention", "indexed_attention", "sliding_attention")
_SAME_CLASS = {"kimi_k2": "deepseek_v3"}
HEADS, BIAS_NAMES = 4, ("e_score_correction_bias", "expert_bias")


def tiny_config(config: Config) -> dict[str, Any]:
    """The fields of a small model's config; the text part's, of a multimodal config.

    Layers are cut to the first that hold two routers, and attend fully where the model can: linear attention is slow
    on a CPU, and no router asks what came before it.

    Raises:
        UnsupportedModel: a family whose routers are unknown or refused.
    """
    fields = {name: value for name, value in text_config(config).items() if name not in _DROPPED}
    layers = _layers(fields)
    # Where layers differ in more than their kind, the config says it for each, and they stay.
    kinds = () if fields.get("per_layer_config") else fields.get("layer_types") or ()
    quick = next((kind for kind in _ATTENTION if kind in kinds), None)
    total = geometry_from_config(fields).num_layers
    for name, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == total:
            fields[name] = list(value[:layers])
        elif name == "per_layer_config" and isinstance(value, Mapping):
            fields[name] = {layer: kept for layer, kept in value.items() if int(layer) < layers}
    if quick is not None:
        fields["layer_types"] = [quick] * layers
    heads = fields.get("num_attention_heads") or HEADS
    head_dim = fields.get("head_dim") or fields.get("hidden_size", 64) // heads
    small = {name: min(size, fields[name]) for name, size in _SIZES.items() if isinstance(fields.get(name), int)}
    equal = fields.get("num_key_value_heads") == heads
    tokens = {name: int(name != "pad_token_id") for name in _TOKENS if fields.get(name) is not None}
    fields |= {
        **small,
        **tokens,
        "model_type": _SAME_CLASS.get(fields["model_type"], fields["model_type"]),
        "hidden_size": HEADS * head_dim,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    if fields.get("num_key_value_heads") is not None:
        fields["num_key_value_heads"] = HEADS if equal else 2
    if "mamba_n_heads" in fields:  # GraniteMoeHybrid wants the state to be as wide as the expanded hidden states
        fields |= {"mamba_n_heads": HEADS, "mamba_d_head": "auto"}
    return fields


def tiny_model(config: Config, *, seed: int = 0) -> nn.Module:
    """A small random float32 model in eval mode; selection biases are random too, so that they matter.

    Raises:
        UnsupportedModel: as `tiny_config`, or transformers cannot build such a model: the text says why.
    """
    fields = tiny_config(config)
    try:
        built = _config(fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = _model_class(built)._from_config(built)
            _draw_biases(model)
    except UnsupportedModel:
        raise
    except Exception as error:  # configs are other people's, and so is what reads them
        raise UnsupportedModel(
            f"expected transformers to build a small {fields['model_type']} of this config, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return model.float().eval()


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in that dtype, but for what its class keeps in float32, as `from_pretrained` would load it."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    strict = [value for name, value in _tensors(model) if any(part in name for part in kept)]
    model.to(dtype)
    for value in strict:
        value.data = value.data.float()
    return model


def _layers(fields: Mapping[str, Any]) -> int:
    """How many of the first layers hold two routers, or all there are."""
    layers = geometry_from_config(fields).layers
    return layers[min(1, len(layers) - 1)] + 1


def _config(fields: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"expected an architecture of the installed transformers, got {kind}: it has no such one"
        )
    return CONFIG_MAPPING[kind](**{name: value for name, value in fields.items() if name != "model_type"})


def _model_class(config: Any) -> Any:
    """The language model of the config's class, with a head if there is one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    __import__(module)
    for name, kind in inspect.getmembers(sys.modules[module], inspect.isclass):
        if (
            issubclass(kind, PreTrainedModel)
            and name.endswith("Model")
            and getattr(kind, "config_class", None) is type(config)
        ):
            return kind
    raise UnsupportedModel(f"expected a language model of {type(config).__name__} in transformers, found none")


@torch.no_grad()
def _draw_biases(model: nn.Module) -> None:
    for name, value in _tensors(model):
        if name.endswith(BIAS_NAMES):
            value.normal_(std=0.1)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
