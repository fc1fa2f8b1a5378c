"""Each algorithm against numbers computed by hand, and as flags of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pacenote.kernels.policy import policy_loss
from pacenote.trainer import algorithms, recipes
from pacenote.trainer.advantage import advantages
from pacenote.trainer.cli import main

LN2 = math.log(2)
A = 0.5 / (0.5**0.5 + 1e-4)
"""Rewards 1 and 0: half of each is above and below, in sample deviations sqrt(1/2)."""


@dataclass
class Batch:
    """Two answers to one prompt, of two tokens and of one."""

    advantages: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    segment_ids: Tensor
    num_samples: int = 2


RATIOS = torch.tensor([1.5, 0.5, 1.5], dtype=torch.float64)
NEW = torch.tensor([-LN2, -2 * LN2, -LN2], dtype=torch.float64)


# Ratios 1.5 and 0.5 in the good answer, 1.5 in the bad one; logprobs -ln 2, -2 ln 2 and -ln 2.
BY_HAND = {
    # Clipped at 1.2: -(1.2 + 0.5) A / 2 and 1.5 A, and the mean of both.
    "grpo": (-0.85 + 1.5) / 2 * A,
    # Clipped at 1.28, the mean of three tokens.
    "dapo": (-1.28 - 0.5 + 1.5) / 3 * A,
    # Advantages 1/2 and -1/2; over 2 answers of at most 4 tokens.
    "dr_grpo": (-(1.2 + 0.5) / 2 + 1.5 / 2) / 8,
    # Advantages 1 and -1 times -logprob: (1 + 2) / 2 ln 2 and -ln 2, and the mean of both.
    "rloo": (1.5 - 1.0) / 2 * LN2,
    # As grpo's tokens, their mean.
    "reinforce_pp": (-1.2 - 0.5 + 1.5) / 3 * A,
    # Geometric means sqrt(0.75), below the clip, and 1.5, beyond it, where a bad answer is not clipped.
    "gspo": (-(0.75**0.5) + 1.5) / 2 * A,
    # -1.5 A (-ln 2), -0.5 A (-2 ln 2) and 1.5 A (-ln 2): the mean of three tokens.
    "cispo": (1.5 + 1.0 - 1.5) / 3 * LN2 * A,
}


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_by_hand(name: str) -> None:
    config = algorithms.apply(recipes.tiny(), name)
    earned = advantages([1.0, 0.0], 2, config.advantage).values
    old = NEW - RATIOS.log()
    batch = Batch(
        advantages=torch.tensor([earned[0], earned[0], earned[1]], dtype=torch.float64),
        loss_mask=torch.ones(3, dtype=torch.bool),
        logprobs=old,
        old_logprobs=old,
        segment_ids=torch.tensor([0, 0, 1], dtype=torch.int32),
    )
    loss = replace(config.loss, entropy_coef=0.0)
    denominator = 2.0 * 4 if loss.normalize == "constant" else None
    assert policy_loss(NEW, batch, loss, denominator=denominator).loss.item() == pytest.approx(BY_HAND[name], rel=1e-6)


def test_they_are_values_and_no_more() -> None:
    """What an algorithm does not name is the recipe's."""
    tiny = recipes.tiny()
    for name in algorithms.ALGORITHMS:
        made = algorithms.apply(tiny, name)
        assert made.algorithm == name
        same = replace(
            made,
            algorithm=None,
            advantage=tiny.advantage,
            overlong_buffer=0,
            loss=tiny.loss,
            optim=tiny.optim,
            rollout=tiny.rollout,
        )
        assert made.rollout.dynamic_sampling == (name == "dapo")
        assert same == tiny
        assert made.loss.entropy_coef == tiny.loss.entropy_coef
    with pytest.raises(ValueError, match="unknown algorithm 'x'; the algorithms are: grpo, dapo"):
        algorithms.apply(tiny, "x")


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Single flags override; an unknown name is one sentence."""
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--algorithm", "gspo", "--loss.clip-low", "0.1", "--help"])
    shown = capsys.readouterr().out
    assert "0.0004" in shown
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--algorithm=gspo", "--help"])
    assert "0.0004" in capsys.readouterr().out
    assert main(["train", "tiny", "--algorithm", "x"]) == 2
    assert main(["train", "tiny", "--algorithm=x"]) == 2
    assert "unknown algorithm 'x'" in capsys.readouterr().err
