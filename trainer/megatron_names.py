"""Which tensors of a transformers checkpoint a weight of a megatron-core model is made of, and how; and the way back.

Names of layers and experts are global on both sides; checkpoints have an entry for each expert, as published ones do.

Legend: D hidden size, I inner size, G groups of heads, H heads a group, C channels a head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["copy", "gated", "qkv"]

_MODEL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    # TransformerEngine has norms in front of projections.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}
_PAIRS = {"mlp.linear_fc1.weight": "mlp.", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts."}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight")


@dataclass(frozen=True, slots=True)
class Source:
    """Entries of a checkpoint, and how a whole weight is made of them.

    copy: it is the one. gated: gate [I, D] over up [I, D]. qkv: query, key and value [.. C, D], a group of heads after
    the other.
    """

    kind: Kind
    names: tuple[str, ...]

    def whole(self, parts: list[Tensor], groups: int) -> Tensor:
        """The weight [I, ...] of megatron-core, all ranks' parts of it; `groups` G of heads."""
        if self.kind == "copy":
            return parts[0]
        if self.kind == "gated":
            return torch.cat(parts)
        stacked = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(stacked, 1).flatten(0, 1)

    def parts(self, whole: Tensor, groups: int, channels: int) -> list[Tensor]:
        """The entries of a weight [I, ...]; `groups` G of heads of `channels` C."""
        if self.kind == "copy":
            return [whole]
        if self.kind == "gated":
            return list(whole.chunk(2))
        stacked = whole.reshape(groups, -1, *whole.shape[1:])
        heads = stacked.shape[1] - 2 * channels
        return [part.flatten(0, 1) for part in torch.split(stacked, [heads, channels, channels], 1)]

    def cut(self, whole: Tensor, axis: int, rank: int, size: int) -> Tensor:
        """A tensor-parallel rank's part of a weight [I, ...] along `axis`; gate and up are cut each for itself."""
        if size == 1:
            return whole
        pieces = whole.chunk(2, axis) if self.kind == "gated" else (whole,)
        return torch.cat([piece.chunk(size, axis)[rank] for piece in pieces], axis)

    def joined(self, ranks: list[Tensor], axis: int) -> Tensor:
        """The way back: the whole weight [I, ...] of all ranks' parts."""
        if self.kind != "gated":
            return torch.cat(ranks, axis)
        halves = [rank.chunk(2, axis) for rank in ranks]
        return torch.cat([torch.cat([half[side] for half in halves], axis) for side in (0, 1)], axis)


def source(name: str, *, mla: bool) -> Source:
    """Of a weight, by its name with global numbers.

    Args:
        name: of megatron-core.
        mla: whether attention is latent: q_layernorm is the compressed queries' norm there, and every head's elsewhere.

    Raises:
        ValueError: no model of ours has such a weight.
    """
    if name in _MODEL:
        return Source("copy", (_MODEL[name],))
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is not None:
        at, rest = f"model.layers.{match[1]}.", match[2]
        if rest in _LAYER:
            return Source("copy", (at + _LAYER[rest],))
        if rest == "self_attention.q_layernorm.weight":
            return Source("copy", (f"{at}self_attn.{'q_a_layernorm' if mla else 'q_norm'}.weight",))
        if rest in _PAIRS:
            return Source("gated", tuple(f"{at}{_PAIRS[rest]}{half}_proj.weight" for half in ("gate", "up")))
        if rest == "self_attention.linear_qkv.weight":
            return Source("qkv", tuple(f"{at}self_attn.{letter}_proj.weight" for letter in "qkv"))
        if expert := _EXPERT.fullmatch(rest):
            base = f"{at}mlp.experts.{expert[1]}."
            if expert[2] == "1":
                return Source("gated", (f"{base}gate_proj.weight", f"{base}up_proj.weight"))
            return Source("copy", (f"{base}down_proj.weight",))
    raise ValueError(f"expected a weight of GLM-4.7-Flash, DeepSeek-V3 or Qwen3-MoE in megatron-core, got {name}")
