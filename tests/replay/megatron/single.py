"""A tiny model on one process, and a step of it without a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pacenote.replay.megatron import MegatronReplay

BATCH, LENGTH, EXPERTS = 2, 12, 8
TOKENS = BATCH * LENGTH
Grads = dict[str, Tensor]


def make(**fields: Any) -> Any:
    from tests.replay.megatron import model

    mtp = fields.get("mtp_num_layers") is not None
    return model.build(model.config(**fields), mtp=mtp)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 56, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def step(model: Any, tokens: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Grads]:
    """Token losses [B, S] and gradients of their mean."""
    tokens = ids() if tokens is None else tokens
    model.zero_grad()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    losses = model(tokens, positions, None, labels=tokens.roll(-1, 1), **inputs)
    losses.mean().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses.detach(), grads


def same(a: tuple[Tensor, Grads], b: tuple[Tensor, Grads]) -> bool:
    assert a[1].keys() == b[1].keys()
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def foreign(replay: MegatronReplay, seed: int = 1) -> Tensor:
    from tests.replay.megatron import drive

    return drive.foreign(TOKENS, len(replay.layers), top_k=replay.top_k, seed=seed).to(torch.uint8)
