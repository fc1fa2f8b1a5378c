"""The slot cache against a plain forward pass: ragged rows, moves, growth, stale content."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pacenote.rollout.slot_cache import SlotCache, decode_mask, prefill_mask

GLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
QWEN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    model: Any = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**GLM)) if kind == "glm" else None
    model = model or Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN))
    return model.eval()


class Driver:
    """Feeds sequences through slots: what an engine does, without an engine."""

    def __init__(self, model: Any, slots: int = 4) -> None:
        self.model = model
        self.cache = SlotCache(num_layers=2, slots=slots, max_len=300)
        self.name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.rows: list[list[int]] = []

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        self.cache.begin_prefill(len(self.rows), width)
        self.rows += [list(prompt) for prompt in prompts]
        positions = torch.arange(width).expand(len(prompts), width)
        logits = self._run(ids, positions, prefill_mask(width, len(prompts), dtype=torch.float32, device=ids.device))
        return torch.stack([logits[row, len(prompt) - 1] for row, prompt in enumerate(prompts)])

    def decode(self, tokens: list[int]) -> torch.Tensor:
        positions = torch.tensor([len(row) for row in self.rows])
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        self.cache.begin_decode(positions)
        mask = decode_mask(positions, dtype=torch.float32)
        return self._run(torch.tensor(tokens)[:, None], positions[:, None], mask)[:, 0]

    def leave(self, row: int) -> None:
        last = self.rows.pop()
        if row < len(self.rows):
            self.cache.move(len(self.rows), row)
            self.rows[row] = last

    def alone(self) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([self.model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in self.rows])

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **{self.name: self.cache}
            ).logits
        return logits


@pytest.mark.parametrize("kind", ["glm", "qwen"])
def test_ragged_rows_that_join_and_leave_match_sequences_alone(kind: str) -> None:
    driver = Driver(_model(kind))
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 64, (count,), generator=generator).tolist()

    torch.testing.assert_close(driver.prefill([tokens(3), tokens(9), tokens(1)]), driver.alone(), atol=1e-5, rtol=0)
    torch.testing.assert_close(driver.decode(tokens(3)), driver.alone(), atol=1e-5, rtol=0)
    driver.leave(0)  # the last row moves into the hole
    torch.testing.assert_close(driver.decode(tokens(2)), driver.alone(), atol=1e-5, rtol=0)
    # Joins run over the stale content of the row that left; 140 tokens outgrow the first allocation.
    fresh = driver.prefill([tokens(140), tokens(2)])
    torch.testing.assert_close(fresh, driver.alone()[2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(driver.decode(tokens(4)), driver.alone(), atol=1e-5, rtol=0)
    assert driver.cache.allocated == 256


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_order_of_joins_steps_and_leaves(data: st.DataObject) -> None:
    driver = Driver(_model("glm"))
    token = st.integers(1, 63)
    for _ in range(data.draw(st.integers(1, 6))):
        free = 4 - len(driver.rows)
        if free and data.draw(st.booleans()):
            driver.prefill(data.draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=free)))
        if driver.rows:
            logits = driver.decode([data.draw(token) for _ in driver.rows])
            torch.testing.assert_close(logits, driver.alone(), atol=1e-5, rtol=0)
            if data.draw(st.booleans()):
                driver.leave(data.draw(st.integers(0, len(driver.rows) - 1)))


def test_clear_removes_what_broken_weights_left_behind() -> None:
    driver = Driver(_model("qwen"), slots=1)
    driver.prefill([[1] * 20])
    for layer in driver.cache.layers:
        _poison(layer)
    driver.cache.clear()
    driver.rows.clear()
    driver.prefill([[5, 6]])
    torch.testing.assert_close(driver.decode([7]), driver.alone(), atol=1e-5, rtol=0)


def _poison(layer: Any) -> None:
    with torch.inference_mode():
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)


def test_masks() -> None:
    low = torch.finfo(torch.float32).min
    mask = decode_mask(torch.tensor([0, 2]), dtype=torch.float32)
    assert mask.tolist() == [[[[0.0, low, low]]], [[[0.0, 0.0, 0.0]]]]
    causal = prefill_mask(3, 2, dtype=torch.float32, device=torch.device("cpu"))
    assert causal.shape == (2, 1, 3, 3)
    assert causal[1, 0].tolist() == [[0.0, low, low], [0.0, 0.0, low], [0.0, 0.0, 0.0]]
