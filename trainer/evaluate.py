"""Evaluation on prompts that are not trained on: which ones, and what their episodes say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pacenote.trainer.episode import Episode
from pacenote.trainer.tasks import Task, TaskSource, read_jsonl

_APART = 0x5EED_E7A1  # xor of the seed: tasks are drawn from "seed/step", so these are other draws than training's


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out prompts."""

    every: int = 0
    """Training steps between evaluations; 0: none."""
    data: Path | None = None
    """JSON lines with OpenAI messages and label; none: the task's own, drawn from a seed that training does not use."""
    prompts: int = 64
    """Prompts of an evaluation, the same ones each time; a file's first ones, or all if it has fewer."""
    samples: int = 1
    """Answers a prompt; more than one gives pass@k."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    max_tokens: int | None = None
    """Longest answer of one turn; none: as in training."""

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        for name, value, least in (
            ("every", self.every, 0),
            ("prompts", self.prompts, 1),
            ("samples", self.samples, 1),
        ):
            if value < least:
                raise ValueError(f"--eval.{name} expects at least {least}, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--eval.temperature expects a number from 0, got {self.temperature}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--eval.max-tokens expects at least 1, got {self.max_tokens}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--eval.samples {self.samples} at --eval.temperature 0 would be one answer {self.samples} times: "
                "give a temperature above 0"
            )


def held_out(config: EvalConfig, source: TaskSource, *, seed: int, training: Path | None = None) -> list[Task]:
    """The tasks of every evaluation of a run; the same seed gives the same ones, and nothing of training moves.

    Args:
        source: the training's tasks, asked where there is no `config.data`.
        seed: the run's.
        training: the file that the run trains on, if it does.

    Raises:
        ValueError: the file is wrong, or the run trains on a file and no other was given, whose rows are held out from
            nothing.
    """
    if config.data is not None:
        return list(read_jsonl(config.data).rows[: config.prompts])
    if training is not None:
        raise ValueError(f"--eval.every expects --eval.data, as --data {training} is trained on whole")
    return source(seed=seed ^ _APART, step=0, count=config.prompts)


def due(config: EvalConfig, step: int, steps: int) -> bool:
    """Whether to evaluate with the weights after `step` of `steps` training steps: every so often, and at both ends."""
    return config.every > 0 and (step % config.every == 0 or step == steps)


def pass_at_k(total: int, right: int, k: int) -> float:
    """Chance that of `k` answers drawn from `total`, of which `right` are right, one is: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, section 2.1.

    Raises:
        ValueError: not 0 <= right <= total, or not 1 <= k <= total.
    """
    if not (0 <= right <= total and 1 <= k <= total):
        raise ValueError(f"pass@k expects 0 <= right <= total and 1 <= k <= total, got {right}, {total}, {k}")
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


def of_evaluation(episodes: Sequence[Episode], samples: int) -> dict[str, Any]:
    """Metric columns of an evaluation's episodes, `samples` of each task side by side.

    `eval_reward`: mean over tasks of the mean of their countable rewards; `eval_reward_stderr`: the standard error over
    tasks, since answers to one prompt are not independent. `eval_pass_at_K` for K = 1, 2, 4, ... up to `samples`, if
    there are several: an answer is right from a reward of 1 on; answers without a reward are wrong. None where nothing
    was countable.

    Raises:
        ValueError: the episodes are not a multiple of `samples`.
    """
    if samples < 1 or len(episodes) % samples:
        raise ValueError(f"expected a multiple of {samples} episodes, as many as samples a prompt, got {len(episodes)}")
    groups = [episodes[start : start + samples] for start in range(0, len(episodes), samples)]
    rewards = [[e.reward for e in group if e.reward is not None] for group in groups]
    means = [float(np.mean(known)) for known in rewards if known]
    lengths = [int(t.loss_mask.sum()) for episode in episodes for t in episode.trajectories]
    row: dict[str, Any] = {
        "eval_reward": float(np.mean(means)) if means else None,
        "eval_reward_stderr": float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "eval_episodes": len(episodes),
        "eval_failed": sum(episode.error is not None for episode in episodes),
        "eval_unrewarded": sum(episode.reward is None and episode.error is None for episode in episodes),
        "eval_length_mean": float(np.mean(lengths)) if lengths else None,
    }
    k = 1
    while samples > 1 and k <= samples:
        right = [sum(reward >= 1.0 for reward in known) for known in rewards]
        row[f"eval_pass_at_{k}"] = float(np.mean([pass_at_k(samples, c, k) for c in right])) if right else None
        k *= 2
    return row
