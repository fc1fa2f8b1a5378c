"""The KL in the reward against sums by hand, and on the way to the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pacenote.kernels.pack import PackedBatch, pack
from pacenote.kernels.policy import PolicyConfig
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import recipes
from pacenote.trainer.batch import microbatches
from pacenote.trainer.config import in_loss
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.kl import charged
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.step import prepare, update
from tests.trainer.recorded import samples

LN2 = math.log(2)


def batch_of(masks: list[list[int]], advantages: list[float], pad_to: int = 1) -> PackedBatch:
    """Samples whose targets train where the mask says."""
    made = []
    for mask in masks:
        n = len(mask) + 1
        made.append(
            Trajectory(
                tokens=np.arange(n, dtype=np.int32),
                loss_mask=np.array([0, *mask], dtype=np.uint8),
                logprobs=np.zeros(n, dtype=np.float32),
                experts=None,
                provenance=np.zeros(n - 1, dtype=np.uint8),
                version=np.zeros(n, dtype=np.int32),
            )
        )
    return pack(made, advantages=advantages, device="cpu", pad_to_multiple=pad_to)


def test_by_hand() -> None:
    """Sample one: a prompt's token that costs nothing, then tokens half and twice as likely as under the reference."""
    batch = batch_of([[0, 1, 1], [1, 1]], [1.0, -1.0], pad_to=8)
    old = torch.tensor([-7.0, -2 * LN2, -LN2, -LN2, -LN2, float("nan"), 0, 0])
    reference = torch.tensor([-1.0, -LN2, -2 * LN2, -LN2, -3 * LN2, 0, 0, 0])
    k1 = charged(batch, old, reference, PolicyConfig(kl_coef=0.5, kl_type="k1")).advantages
    # Log ratios -1, 1 | 0, 2 in ln 2.
    expected = [0, 1.0, 1 - 0.5 * LN2, -1 - LN2, -1 - LN2, 0, 0, 0]
    assert k1.tolist() == pytest.approx(expected)
    k2 = charged(batch, old, reference, PolicyConfig(kl_coef=1.0, kl_type="k2")).advantages
    half = LN2**2 / 2
    assert k2.tolist() == pytest.approx([0, 1 - 2 * half, 1 - half, -1 - 4 * half, -1 - 4 * half, 0, 0, 0])
    k3 = charged(batch, old, reference, PolicyConfig(kl_coef=1.0, kl_type="k3")).advantages
    low, high, four = 2 - 1 - LN2, 0.5 - 1 + LN2, 0.25 - 1 + 2 * LN2
    assert k3.tolist() == pytest.approx([0, 1 - low - high, 1 - high, -1 - four, -1 - four, 0, 0, 0])


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6).filter(any), min_size=1, max_size=5))
def test_each_token_pays_what_follows_in_its_sample(masks: list[list[int]]) -> None:
    batch = batch_of(masks, [0.0] * len(masks))
    cost = torch.arange(1, batch.num_tokens + 1).float()
    found = charged(batch, cost, torch.zeros_like(cost), PolicyConfig(kl_coef=1.0, kl_type="k1")).advantages
    start = 0
    for mask in masks:
        for i in range(len(mask)):
            paid = sum(float(cost[start + j]) for j in range(i, len(mask)) if mask[j])
            assert found[start + i] == -paid * mask[i]
        start += len(mask)


def test_in_the_reward_it_is_not_in_the_loss(tiny_dir: Path, trajectories: list[Trajectory], tmp_path: Path) -> None:
    """To a reference that is the policy itself it costs nothing; to another one good answers are worth less."""
    backend = HfBackend(tiny_dir, OptimConfig(microbatch_tokens=90), device="cpu", temperature=1.0)
    backend.save_weights(tmp_path)
    reference = HfBackend(tmp_path, backend.config, device="cpu", temperature=1.0)
    config = replace(recipes.tiny(), kl_in="reward", loss=PolicyConfig(kl_coef=2.0, kl_type="k1"))
    steps = [microbatches(samples(trajectories), backend.config, "cpu")]

    def prepared() -> list[torch.Tensor]:
        items = prepare(backend, steps, "rollout", reference=reference, charge=config.loss)[0][0]
        said = update(backend, [items], in_loss(config))
        assert math.isfinite(said["kl_reference"])
        return [item.batch.advantages - step.batch.advantages for item, step in zip(items, steps[0], strict=True)]

    assert max(float(change.abs().max()) for change in prepared()) < 1e-4
    assert max(float(change.abs().max()) for change in prepared()) > 1e-3
    backend.close()
    reference.close()


def test_refused() -> None:
    tiny = recipes.tiny()
    with pytest.raises(ValueError, match=r"--kl-in reward expects --loss\.kl-coef above 0"):
        replace(tiny, kl_in="reward")
    with pytest.raises(ValueError, match=r"--loss\.kl-unbiased expects --kl-in loss"):
        replace(tiny, kl_in="reward", loss=replace(tiny.loss, kl_coef=0.1, kl_unbiased=True))
    assert in_loss(tiny) == tiny.loss
