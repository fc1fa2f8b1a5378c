"""Shapes of real models, which every benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.route_oracle import FAMILIES, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A mixture of experts: L MoE layers, E experts, K of them a token, the dtype of its router's logits, its head."""

    title: str
    layers: int
    experts: int
    k: int
    logits: torch.dtype
    family: Family
    width: int
    vocab: int

    @property
    def ids(self) -> torch.dtype:
        """dtype of recorded rows."""
        return torch.uint8 if self.experts <= 256 else torch.uint16


def _model(title: str, family: str, layers: int, logits: torch.dtype, width: int, vocab: int) -> Model:
    router = FAMILIES[family]
    return Model(
        title=title,
        layers=layers,
        experts=router.experts,
        k=router.k,
        logits=logits,
        family=router,
        width=width,
        vocab=vocab,
    )


MODELS = {
    "glm-4.7-flash": _model("GLM-4.7-Flash", "glm-4.7-flash", 46, torch.float32, 2048, 154_880),
    "qwen3-30b-a3b": _model("Qwen3-30B-A3B", "qwen3", 48, torch.bfloat16, 2048, 151_936),
    "deepseek-v3": _model("DeepSeek-V3", "deepseek-v3", 58, torch.float32, 7168, 129_280),
    "kimi-k2": _model("Kimi-K2", "kimi-k2", 60, torch.float32, 7168, 163_840),
}
