"""Whether a model keeps packed sequences apart: several in one row, told apart only by positions that restart.

Most models of transformers build their attention mask from such positions. Some do not (linear attention carries its
state on, a mask may be made without the positions), and then every sample silently reads the one before it.
"""

from __future__ import annotations

from typing import Any

import torch

from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.hf import Replay

LENGTH = 8
BOUND = 0.1
"""Relative difference above which sequences see each other; rounding is far below, another context far above."""


@torch.no_grad()
def leak(replay: Replay, model: Any) -> float:
    """How far a sequence's hidden states move when another stands before it in the same row: |a - b| / |a|.

    Two sequences of random ids run side by side, their routes recorded; then packed, with these routes. The random
    state stays as it was; the rows count in `replay.audit()`.

    Args:
        replay: of the model, attached.
        model: causal language model, or its base model.
    """
    base = model.base_model
    weight = base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (2, LENGTH), generator=generator).to(weight.device)
    places = torch.arange(LENGTH, device=weight.device)
    training = base.training
    base.eval()
    try:
        with replay.record() as recording:
            apart = base(input_ids=ids, use_cache=False).last_hidden_state[1].float()
        with replay.rows(recording.rows().flatten(0, 1)):
            packed = base(input_ids=ids.view(1, -1), position_ids=places.repeat(2)[None], use_cache=False)
    finally:
        base.train(training)
    behind = packed.last_hidden_state[0, LENGTH:].float()
    return float((behind - apart).norm() / apart.norm())


def check_packing(replay: Replay, model: Any) -> None:
    """Refuse a model that lets packed sequences see each other.

    Raises:
        UnsupportedModel: it does, with the measured difference.
    """
    moved = leak(replay, model)
    if not moved <= BOUND:
        raise UnsupportedModel(
            f"expected a model that keeps packed sequences apart by their positions, but one before it moves a "
            f"sequence's hidden states by {moved:.0%}: give this model its sequences as rows of a batch [B, S]"
        )
