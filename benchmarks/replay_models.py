"""Models that a whole training step is measured on: small ones for a CPU, the first layers of public ones for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from pacenote.trainer import model as models
from pacenote.trainer import shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, the longest sample and the positions of a microbatch."""

    config: Callable[[], Any]
    longest: int
    microbatch: int


def small() -> Any:
    """A Qwen3-MoE of 8 million parameters; all 8 layers route 4 of 32 experts."""
    return Qwen3MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
    )  # fmt: skip


def cut(config: Callable[[], Any], layers: int) -> Any:
    """The first layers of a public model, of its own width and vocabulary."""
    whole = config()
    derived = ("num_hidden_layers", "mlp_layer_types", "layer_types")  # lists of a layer each are made anew
    return type(whole)(
        **{name: value for name, value in whole.to_diff_dict().items() if name not in derived},
        num_hidden_layers=layers,
    )


SUBJECTS = {
    "tiny": Subject(config=shapes.tiny, longest=256, microbatch=768),
    "small": Subject(config=small, longest=512, microbatch=1024),
    # float32 weights, gradients and moments of these take 42 and 50 GB.
    "glm-4.7-flash, 4 layers": Subject(config=partial(cut, shapes.glm47_flash, 4), longest=2048, microbatch=4096),
    "qwen3-30b-a3b, 4 layers": Subject(config=partial(cut, shapes.qwen3_30b_a3b, 4), longest=2048, microbatch=4096),
}
ON_CPU, ON_GPU = tuple(SUBJECTS)[:2], tuple(SUBJECTS)[2:]


def build(config: Any, out: Path, device: torch.device) -> Path:
    """Write a model of random weights, drawn where that is fast."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # on disk; training is in float32
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.02)
    models.save(model, out)
    return out
