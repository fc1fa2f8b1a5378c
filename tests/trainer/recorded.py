"""Trajectories of the tiny model as a bfloat16 engine records them, without servers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pacenote.kernels.spec import DECODE, PREFILL
from pacenote.replay.hf import attach
from pacenote.replay.spec import geometry_from_config
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import model
from pacenote.trainer.batch import Sample

PROMPT, LENGTH, COUNT = 6, 14, 24
"""Tokens of a prompt and of a whole trajectory, and trajectories."""


def record(directory: Path) -> list[Trajectory]:
    """Tokens of a uniform policy, with the logprobs and routes that the model has for them in bfloat16."""
    engine = model.load(directory, dtype=torch.bfloat16)
    geometry = geometry_from_config(engine.config.to_dict())
    replay = attach(engine)
    tokens = torch.randint(0, 491, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), replay.record() as recording:
        logp = engine(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        rows = recording.rows().cpu().numpy().astype(np.uint8)
    logprobs = torch.zeros(COUNT, LENGTH)
    logprobs[:, 1:] = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    mask = np.zeros(LENGTH, dtype=np.uint8)
    mask[PROMPT:] = 1
    return [
        Trajectory(
            tokens=tokens[i].numpy().astype(np.int32),
            loss_mask=mask,
            logprobs=(logprobs[i].numpy() * mask).astype(np.float32),
            experts=rows[i, :-1],
            provenance=np.array([PREFILL] * PROMPT + [DECODE] * (LENGTH - 1 - PROMPT), dtype=np.uint8),
            version=np.zeros(LENGTH, dtype=np.int32),
            layers=geometry.layers,
            num_experts=geometry.num_experts,
        )
        for i in range(COUNT)
    ]


def samples(trajectories: list[Trajectory]) -> list[Sample]:
    """Good and bad ones."""
    return [Sample(t, 1.0 if i % 2 else -0.5, i // 3) for i, t in enumerate(trajectories)]
