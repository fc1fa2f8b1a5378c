"""What transformers itself computes, in float32: logprobs of given tokens and the experts that they go through.

Read off the experts' inputs by hooks of torch, without anything of pacenote's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM


class Truth:
    """One model's forward pass.

    Args:
        model: its directory.
    """

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self._model.model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(self._hook(number), with_kwargs=True)
        self.layers = tuple(
            number for number, layer in enumerate(self._model.model.layers) if hasattr(layer.mlp, "experts")
        )

    def __call__(self, tokens: list[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Logprobs [N-1] of tokens[1:] and experts [N-1, L, K], sorted, of tokens[:-1]."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0].double()
        logp = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        experts = torch.stack([self._seen[layer][:-1].sort(-1).values for layer in self.layers], 1)
        return logp.numpy(), experts.numpy()

    def _hook(self, layer: int) -> Any:
        def keep(module: Any, words: tuple[Any, ...], named: dict[str, Any]) -> None:
            chosen = words[1] if len(words) > 1 else named["top_k_index"]
            self._seen[layer] = chosen.reshape(-1, chosen.shape[-1])

        return keep


def same_routes(rows: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Assert that routes [R, L, K] are equal, but for ties.

    Sampled tokens differ from run to run, and in float32, too, a choice may hang on the last bit: once in some thousand
    tokens, which changes what comes after it a little. Rows that are shifted, or another prefix's, hardly ever agree.
    """
    assert rows.shape == wanted.shape
    agree = (np.sort(rows) == np.sort(wanted)).all(-1).mean()
    assert agree > 0.99, f"{agree:.2%} of (token, layer) pairs agree"


def same_logprobs(said: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Assert that logprobs are equal but for rounding, and for few tokens after a tie."""
    gaps = np.abs(np.asarray(said) - wanted)
    assert np.median(gaps) < 1e-4, gaps
    assert (gaps < 2e-3).mean() > 0.9, gaps
