"""Counted operations against torch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3MoeConfig

from pacenote.trainer.flops import Flops, peak
from pacenote.trainer.model import TinyShape, tiny_config


def qwen() -> PretrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )


def counted(hf: PretrainedConfig, tokens: int) -> int:
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None] % 400, use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "hf", [tiny_config(TinyShape(num_hidden_layers=3)), qwen()], ids=["glm4_moe_lite", "qwen3_moe"]
)
def test_a_forward_pass(hf: PretrainedConfig) -> None:
    """Eager attention computes the whole square of pairs, of which a causal model needs the lower half."""
    flops = Flops.of(hf)
    short, long = 32, 96
    square = {n: n * flops.token + flops.pair * n * n for n in (short, long)}
    assert counted(hf, short) == pytest.approx(square[short], rel=0.01)
    assert counted(hf, long) == pytest.approx(square[long], rel=0.01)
    assert flops.forward([long]) == square[long] - flops.pair * long * (long - 1) // 2
    assert flops.learning([short, long]) == 3 * (flops.forward([short]) + flops.forward([long]))


def test_peaks() -> None:
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("a device that nobody knows") is None
