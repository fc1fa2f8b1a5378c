"""Logits -> the next token of every row, with its logprob.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pacenote.rollout.embedded_request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The next token of each row, its logprob, the best alternatives (empty where not asked for), and whether the row's
    logits were all finite; a row with `finite` False carries a meaningless token."""

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[tuple[float, int], ...]]
    finite: list[bool]


def draw(logits: torch.Tensor, requests: Sequence[Request]) -> Draw:
    """Sample one token a row.

    Args:
        logits: [B, V], any float dtype; computed on in float32.
        requests: B requests, in the order of the rows.

    Logprobs are of softmax((logits + bias) / temperature) before top-k, top-p and min-p, as in SGLang. A draw inverts
    the cumulative distribution (float64) at one uniform number of the request's own generator, so that it depends on
    the request alone and not on its neighbours in the batch.
    """
    logits = _edited(logits.float(), requests)
    finite = ~torch.isnan(logits).any(-1) & torch.isfinite(logits.amax(-1))
    scales = [request.params.scale for request in requests]
    if any(scale != 1.0 for scale in scales):
        logits = logits / torch.tensor(scales, device=logits.device)[:, None]
    logp = torch.log_softmax(logits, dim=-1)
    probs = logp.exp().double()
    cut = [row for row, request in enumerate(requests) if request.params.filtered and not request.params.greedy]
    if cut:
        probs[cut] = _filtered(probs[cut], [requests[row] for row in cut])
    uniform = torch.tensor([request.generator.random() for request in requests], dtype=torch.float64)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Below the total even after rounding, so that the index exists and has a probability above zero.
    point = torch.minimum(uniform.to(cdf.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, point, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    greedy = [request.params.greedy for request in requests]
    if any(greedy):
        tokens = torch.where(torch.tensor(greedy, device=tokens.device), logits.argmax(-1), tokens)
    chosen = logp.gather(1, tokens[:, None])[:, 0]
    return Draw(
        tokens=tokens.tolist(), logprobs=chosen.tolist(), top=_alternatives(logp, requests), finite=finite.tolist()
    )


def _edited(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Logits [B, V] with each request's bias, and without stop tokens while the answer is shorter than asked for."""
    if any(request.params.logit_bias or request.params.min_new_tokens for request in requests):
        logits = logits.clone()  # the model's own output in float32 is an inference tensor, which cannot be written to
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if len(request.output_ids) < params.min_new_tokens and request.stop_ids:
            logits[row, list(request.stop_ids)] = -torch.inf
    return logits


def _filtered(probs: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Probabilities [B, V] with zeros outside top-k, top-p and min-p (all three on the full distribution)."""
    best, order = probs.sort(dim=-1, descending=True, stable=True)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=probs.device)[:, None]

    ranks = torch.arange(probs.shape[1], device=probs.device)
    size = probs.shape[1]
    top_k = torch.tensor([r.params.top_k if r.params.top_k != -1 else size for r in requests], device=probs.device)
    # 1.0 is off: a cumulative sum may round past it and must not cut the tail.
    top_p = column([r.params.top_p if r.params.top_p < 1.0 else torch.inf for r in requests])
    min_p = column([r.params.min_p for r in requests])
    closed = ranks[None, :] >= top_k[:, None]
    closed |= best.cumsum(-1) - best > top_p  # the token that crosses top_p stays
    closed |= best < best[:, :1] * min_p
    return torch.zeros_like(probs).scatter_(1, order, best.masked_fill(closed, 0.0))


def _alternatives(logp: torch.Tensor, requests: Sequence[Request]) -> list[tuple[tuple[float, int], ...]]:
    most = max(request.top_count for request in requests)
    if most == 0:
        return [()] * len(requests)
    values, ids = logp.topk(min(most, logp.shape[1]), dim=-1)
    pairs = zip(values.tolist(), ids.tolist(), requests, strict=True)
    return [tuple(zip(vals, toks, strict=True))[: request.top_count] for vals, toks, request in pairs]


def generator(seed: int | None, *, engine_seed: int, number: int) -> np.random.Generator:
    """The uniform source of a request: its own seed, or the engine's seed and the request's running number."""
    return np.random.default_rng([engine_seed, number] if seed is None else seed)
