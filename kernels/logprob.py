"""Logprob and entropy of targets, without logits of the whole batch. Definition: `reference.logprob_from_logits`.

Legend: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pacenote.kernels import check, reference

CHUNK_BYTES = 64 << 20  # fp32 logits of one chunk


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    vocab_bound: int | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy of each target under softmax((hidden @ weight.T + bias) / temperature).

    Args:
        hidden: [..., D] floating.
        weight: [V, D], the LM head.
        targets: [...] int64, of hidden's leading shape, or [T] for a hidden of [1, T, D].
        temperature: a number above 0, or a tensor of targets' shape.
        bias: [V] or None.
        ignore_index: target that is not computed: logprob and entropy 0, gradient exactly 0.
        vocab_bound: entries of the weight that are real; padded ones behind it are not in the partition function.
        mask: targets' shape, non-zero where a token is wanted; the others skip the LM head as ignored ones do.
        chunk: tokens a chunk; None takes as many as fit 64 MiB of fp32 logits.

    Returns:
        logprob and entropy, of targets' shape, float32 (float64 for float64 inputs). Logits are computed in float32; at
        most one chunk of them, [C, V], is alive at a time, in backward too, where they are computed again.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a target outside the vocabulary, temperature <= 0.
    """
    flat, wanted, heat, bound = _prepare(hidden, targets, temperature, ignore_index, mask, vocab_bound, weight.shape[0])
    check.tensor(weight, "weight", (None, hidden.shape[-1]), check.FLOATS, hidden)
    if bias is not None:
        check.tensor(bias, "bias", (weight.shape[0],), check.FLOATS, hidden)
    rows, goals = flat[wanted], targets.reshape(-1)[wanted]
    _check_targets(goals, bound)
    size = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    logprobs, entropies = [], []
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        warmth = heat[wanted][part] if isinstance(heat, Tensor) else heat
        arguments: tuple[Any, ...] = (rows[part], weight, bias, goals[part], warmth, bound)
        logprob, entropy = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(logprob)
        entropies.append(entropy)
    return _scatter(logprobs, wanted, targets.shape, hidden), _scatter(entropies, wanted, targets.shape, hidden)


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_bound: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy of each target under softmax(logits / temperature), for logits [..., V] that exist already.

    Arguments, results and errors as `linear_logprob`.
    """
    flat, wanted, heat, bound = _prepare(
        logits, targets, temperature, ignore_index, mask, vocab_bound, logits.shape[-1]
    )
    goals = targets.reshape(-1)[wanted]
    _check_targets(goals, bound)
    warmth = heat[wanted] if isinstance(heat, Tensor) else heat
    logprob, entropy = reference.logprob_from_logits(flat[wanted], goals, warmth, bound)
    return _scatter([logprob], wanted, targets.shape, logits), _scatter([entropy], wanted, targets.shape, logits)


def _chunk(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | float, bound: int
) -> tuple[Tensor, Tensor]:
    logits = reference.wide(rows) @ reference.wide(weight[:bound]).T
    if bias is not None:
        logits = logits + bias[:bound]
    return reference.logprob_from_logits(logits, targets, temperature)


def _prepare(
    inputs: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    mask: Tensor | None,
    vocab_bound: int | None,
    vocab: int,
) -> tuple[Tensor, Tensor, float | Tensor, int]:
    """Flat inputs [T, .], wanted [T] bool, temperature as a number or [T], and the vocabulary's bound."""
    lead = tuple(inputs.shape[:-1])
    if lead != tuple(targets.shape) and lead != (1, *targets.shape):
        raise ValueError(f"expected targets {list(lead)} for inputs {list(inputs.shape)}, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected targets of int64 or int32, got {targets.dtype}")
    if inputs.dtype not in check.FLOATS:
        raise ValueError(f"expected floating inputs, got {inputs.dtype}")
    bound = vocab if vocab_bound is None else vocab_bound
    if not 1 <= bound <= vocab:
        raise ValueError(f"expected vocab_bound within 1..{vocab}, got {bound}")
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(f"expected temperature of targets' shape {list(targets.shape)}, got {list(temperature.shape)}")
        if bool((temperature <= 0).any()):
            raise ValueError("expected temperatures above 0, got one that is not")
        temperature = temperature.reshape(-1)
    elif not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    wanted = targets.reshape(-1) != ignore_index
    if mask is not None:
        if mask.shape != targets.shape:
            raise ValueError(f"expected a mask of targets' shape {list(targets.shape)}, got {list(mask.shape)}")
        wanted = wanted & mask.reshape(-1).bool()
    return inputs.reshape(-1, inputs.shape[-1]), wanted, temperature, bound


def _check_targets(targets: Tensor, bound: int) -> None:
    if targets.numel() and not (0 <= int(targets.min()) and int(targets.max()) < bound):
        raise ValueError(f"expected targets in 0..{bound - 1}, got {int(targets.min())}..{int(targets.max())}")


def _scatter(parts: list[Tensor], wanted: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """Values of the wanted tokens back at their places; 0 elsewhere."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not parts:
        return (like.reshape(-1)[:0].sum() + torch.zeros(shape, dtype=dtype, device=like.device)).to(dtype)
    flat = torch.zeros(wanted.shape, dtype=dtype, device=like.device)
    return flat.masked_scatter(wanted, torch.cat(parts)).view(shape)
