"""GLM-4.7-Flash weights by transformers' names <-> by megatron-core's, for a model that one rank holds whole.

Dense layers, MLA with compressed queries, routers with selection bias, shared and routed experts; tensors are copied or
cut, none computed. Megatron's distributed checkpoints cut a whole model for other layouts.

One setting is no weight: transformers' norms inside MLA have eps 1e-6 whatever the config says, megatron-core's take
`layernorm_epsilon` as all others do. For equal logits set `eps` of q_layernorm and kv_layernorm to MLA_NORM_EPS.

Legend: V vocabulary, D hidden size, E experts, I their inner size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pacenote.replay.errors import ReplayError

MLA_NORM_EPS = 1e-6
"""eps of transformers' q_a_layernorm and kv_a_layernorm."""

_MODEL = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
}
# Gate [I, D] over up [I, D] in one matrix [2 I, D].
_GATED = {"mlp.": "mlp.", "mlp.shared_experts.": "mlp.shared_experts."}
# All experts of a layer in one tensor [E, ...] against one tensor an expert.
_EXPERTS = {"mlp.experts.gate_up_proj": "linear_fc1", "mlp.experts.down_proj": "linear_fc2"}


def to_megatron(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """megatron-core's state dict (local spec, experts one by one) of transformers' Glm4MoeLiteForCausalLM.

    Args:
        state: its state dict: embeddings [V, D], experts' gate_up_proj [E, 2 I, D] and down_proj [E, D, I], and so on.

    Raises:
        ReplayError: a weight that no GLM-4.7-Flash model has, or half of a pair.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, rest = _split(name, r"model\.layers\.(\d+)\.(.+)")
        at = f"decoder.layers.{layer}."
        gated = re.fullmatch(r"(mlp\.(?:shared_experts\.)?)(gate|up)_proj\.weight", rest)
        if name in _MODEL:
            found[_MODEL[name]] = tensor
        elif rest in _LAYER:
            found[at + _LAYER[rest]] = tensor
        elif gated and gated[2] == "gate":
            other = name.replace("gate_proj", "up_proj")
            if other not in state:
                raise ReplayError(f"expected {other} beside {name}, got it alone")
            found[f"{at}{_GATED[gated[1]]}linear_fc1.weight"] = torch.cat([tensor, state[other]])
        elif rest in _EXPERTS:
            for expert, weight in enumerate(tensor):
                found[f"{at}mlp.experts.local_experts.{expert}.{_EXPERTS[rest]}.weight"] = weight
        elif not (gated and name.replace("up_proj", "gate_proj") in state):
            raise ReplayError(f"expected weights of Glm4MoeLiteForCausalLM, got {name}")
    return found


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: transformers' state dict of megatron-core's (local spec, one rank holding everything).

    Args:
        state: its state dict: fc1 [2 I, D] and fc2 [D, I] an expert, and so on; extra states are left out.

    Raises:
        ReplayError: a weight that `to_megatron` never gives.
    """
    model = {there: here for here, there in _MODEL.items()}
    layers = {there: here for here, there in _LAYER.items()}
    stacks = {there: here for here, there in _EXPERTS.items()}
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if name.endswith("_extra_state"):
            continue
        layer, rest = _split(name, r"decoder\.layers\.(\d+)\.(.+)")
        at = f"model.layers.{layer}."
        gated = re.fullmatch(r"(mlp\.(?:shared_experts\.)?)linear_fc1\.weight", rest)
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", rest)
        if name in model:
            found[model[name]] = tensor
        elif rest in layers:
            found[at + layers[rest]] = tensor
        elif gated:
            gate, up = tensor.chunk(2)
            found[f"{at}{gated[1]}gate_proj.weight"], found[f"{at}{gated[1]}up_proj.weight"] = gate, up
        elif expert:
            experts.setdefault(at + stacks[expert[2]], {})[int(expert[1])] = tensor
        else:
            raise ReplayError(f"expected weights as to_megatron names them, got {name}")
    for name, weights in experts.items():
        if sorted(weights) != list(range(len(weights))):
            raise ReplayError(f"expected all experts of {name} on this rank, got {sorted(weights)}")
        found[name] = torch.stack([weights[number] for number in range(len(weights))])
    return found


def _split(name: str, pattern: str) -> tuple[str, str]:
    """The layer's number and the rest of the name; two empty strings outside of layers."""
    match = re.fullmatch(pattern, name)
    return (match[1], match[2]) if match else ("", "")
