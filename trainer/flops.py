"""Floating-point operations of a model's passes, and what share of a device's peak that is.

Products alone are counted, two operations a multiplication: every parameter that a token passes but norms and the
embedding, and attention's scores and sums over the tokens before it. A backward pass takes twice the forward (Kaplan et
al., arXiv 2001.08361, section 2.1); recomputation is not counted, since it is no use of the model (PaLM, arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pacenote.trainer import plan

# Dense bfloat16 peaks, from the vendors' data sheets; the first name that stands in the device's.
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12),
    ("MI300X", 1307e12),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a model.

    Attributes:
        token: of a token's products with weights, forward.
        pair: of a token's attention to one other, forward, all layers.
    """

    token: int
    pair: int

    @classmethod
    def of(cls, hf: Any) -> Flops:
        """By a transformers config."""
        found = plan.weights(hf)
        counts = plan.by_kind(found)
        products = plan.active(hf, found) - hf.hidden_size - counts["norms"]
        latent = getattr(hf, "kv_lora_rank", None)
        wide = hf.qk_nope_head_dim + hf.qk_rope_head_dim + hf.v_head_dim if latent else 2 * hf.head_dim
        return cls(2 * products, 2 * hf.num_hidden_layers * hf.num_attention_heads * wide)

    def forward(self, lengths: Sequence[int]) -> int:
        """Of one forward pass over samples of these lengths, each token seeing those before it and itself."""
        return sum(length * self.token + self.pair * length * (length + 1) // 2 for length in lengths)

    def learning(self, lengths: Sequence[int], *, frozen: bool = False) -> int:
        """Of forward and backward; weights that are frozen have no gradient. Adapters are too small to be counted."""
        return 3 * self.forward(lengths) - (sum(lengths) * self.token if frozen else 0)


def peak(device: str) -> float | None:
    """Operations a second of a device by its name, dense bfloat16; None for one that is not known."""
    return next((value for name, value in PEAKS if name in device), None)
