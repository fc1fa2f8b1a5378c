"""Forward passes of a transformers model whose rows do not depend on the batch around them, bit for bit.

A token's hidden states, experts and logprobs are then the same whether it was decoded one at a time over a cache, or
read in the middle of a packed batch: an engine and a trainer with the same weights in the same number format agree
exactly. No class is patched: attention comes in through transformers' registry, everything else through a dispatch mode
(`exact_ops`) that is on for the length of a forward pass.

Legend: B sequences, T positions, H heads, D head size, S keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pacenote.kernels.invariant import invariant_linear
from pacenote.kernels.invariant_attention import KEYS, invariant_attention
from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.reference import wide
from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.exact_ops import ExactForward, Kind

NAME = "pacenote_exact"
_HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that models hand on to any attention, and that change nothing beside a mask."""
DECODED = 3
"""Tokens that the check at the start decodes one by one."""


class Exact:
    """A model in exact form, until `detach`. Its weights and their gradients are as ever.

    Attributes:
        operations: what ran in forward passes so far, by name: how each is kept from mixing rows.
    """

    def __init__(self, model: Any) -> None:
        """Choose the model's attention and experts code; run it three ways and compare.

        Args:
            model: transformers causal language model on the CPU, or its base model, which has no logprobs.

        Raises:
            UnsupportedModel: an operation that has no exact form, or the ways differ, or the logits are not those of a
                linear head: the text names it.
        """
        self.operations: dict[str, Kind] = {}
        self._model = model
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise UnsupportedModel(
                "expected a model on the CPU, got one elsewhere: the exact mode is proven there only"
            )
        if not model._can_set_attn_implementation():
            raise UnsupportedModel(f"expected a model with exchangeable attention, got {type(model).__name__}")
        self._before = model.config._attn_implementation, model.config._experts_implementation
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _mask)
        self._choose(NAME, "eager")
        try:
            self._check()
        except BaseException:
            self.detach()
            raise

    @contextmanager
    def forward(self) -> Iterator[None]:
        """For the length of a forward pass: operations in their exact form, in this thread.

        A backward pass needs no such form, and may run outside.
        """
        with ExactForward([*self._model.parameters(), *self._model.buffers()], self.operations):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 of hidden states [N, D]."""
        head = self._model.get_output_embeddings()
        bias = None if head.bias is None else wide(head.bias)
        with torch.no_grad():
            return invariant_linear(wide(hidden), wide(head.weight), bias)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float | Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logprob and entropy of targets [N] after hidden states [N, D] or [1, N, D], as `linear_logprob`.

        Engine and trainer both ask here: the same numbers then come from the same operations.
        """
        head = self._model.get_output_embeddings()
        self.operations.setdefault("linear_logprob", "one op")
        return linear_logprob(
            hidden, head.weight, targets, temperature=temperature, bias=head.bias, mask=mask, mode="invariant"
        )

    def detach(self) -> None:
        """Give the model its own attention and experts code back."""
        self._choose(*self._before)

    def _choose(self, attention: str, experts: str | None) -> None:
        self._model.set_attn_implementation(attention)
        self._model.set_experts_implementation(experts)

    @torch.no_grad()
    def _check(self) -> None:
        """Two sequences packed, padded, and the end of one decoded: equal to the last bit. And the head is linear."""
        generator = torch.Generator().manual_seed(0)
        embeddings = self._model.get_input_embeddings().weight
        first, second = (torch.randint(len(embeddings), (1, n), generator=generator) for n in (KEYS + DECODED, 7))
        training = self._model.training
        self._model.eval()
        try:
            with self.forward():
                packed, padded, decoded = self._ways(first, second)
                whole = self._model(input_ids=second, use_cache=False)
        except UnsupportedModel:
            raise
        except Exception as error:  # models are other people's
            raise UnsupportedModel(
                f"expected a model that runs packed, padded and over a cache, got {type(error).__name__}: {error}"
            ) from error
        finally:
            self._model.train(training)
        for name, other in (("in a padded batch", padded), ("decoded token by token", decoded)):
            if not torch.equal(packed, other):
                raise UnsupportedModel(
                    f"expected hidden states that do not depend on the batch, got a largest difference of "
                    f"{float((packed - other).abs().max()):.3g} between sequences packed and {name}"
                )
        if self._model.get_output_embeddings() is None:
            return
        mine, logits = self.logits(packed[first.shape[1] :]), whole.logits[0].float()
        off = float((mine - logits).abs().max() / logits.abs().max())
        if not off <= 4 * torch.finfo(embeddings.dtype).eps:
            raise UnsupportedModel(f"expected logits that are the output weight's alone, the model's are {off:.0%} off")

    def _ways(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of both sequences [1, S], one after the other, computed in three ways."""
        base, lengths = self._model.base_model, (first.shape[1], second.shape[1])
        ids, places = torch.cat([first, second], 1), torch.cat([torch.arange(n) for n in lengths])[None]
        packed = base(input_ids=ids, position_ids=places, use_cache=False)[0][0]
        mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
        side = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, ids)
        padded = base(input_ids=side, attention_mask=mask.long(), use_cache=False)[0][mask]
        return packed, padded, torch.cat([self._decoded(base, first), packed[lengths[0] :]])

    def _decoded(self, base: Any, ids: Tensor) -> Tensor:
        """Hidden states [S, D] of ids [1, S], the last few computed one at a time over a cache."""
        name = "cache" if "cache" in inspect.signature(self._model.forward).parameters else "past_key_values"
        cache = DynamicCache(config=base.config)
        start = ids.shape[1] - DECODED
        parts = [ids[:, :start], *(ids[:, place : place + 1] for place in range(start, ids.shape[1]))]
        return torch.cat([base(input_ids=part, use_cache=True, **{name: cache})[0][0] for part in parts])


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] -> [B, T, H, size of a value]."""
    others = [name for name, value in options.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    others += ["softcap"] if options.get("softcap") else []
    if others or dropout:
        raise UnsupportedModel(
            f"expected plain softmax attention, got {', '.join(others) or 'dropout'} in {type(module).__name__}: "
            "it has no exact form"
        )
    if attention_mask is None:
        raise UnsupportedModel(f"expected a mask at {type(module).__name__}, got none")
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    visible = visible[..., : key.shape[2]].expand(query.shape[0], -1, -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    try:
        return invariant_attention(query, key, value, visible, scale), None
    except ValueError as error:
        raise UnsupportedModel(f"{type(module).__name__}: {error}") from error


def _mask(*arguments: Any, **options: Any) -> Tensor:
    """Every mask as booleans [B, 1, T, S], none left out for being causal."""
    mask: Tensor = sdpa_mask(
        *arguments, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    return mask
