"""The field's algorithms as values of a RunConfig: `--algorithm NAME` sets them, and single flags override.

Nothing in the loop asks which algorithm it runs: an algorithm is how advantages are estimated (`advantage`), what the
loss is made of (`kernels.policy_config`), and how much is learnt from one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pacenote.trainer.config import RunConfig


def grpo(config: RunConfig) -> RunConfig:
    """GRPO (arXiv 2402.03300): clipped ratios, each answer's mean, advantages in deviations of its group."""
    loss = replace(config.loss, algorithm="ppo", ratio="token", clip_low=0.2, clip_high=0.2, normalize="sequence")
    return replace(config, advantage="grpo", loss=loss)


def dapo(config: RunConfig) -> RunConfig:
    """DAPO (arXiv 2503.14476): clip-higher, the mean over tokens, long answers punished in the last fifth, and other
    prompts for groups of equal rewards."""
    loss = replace(config.loss, algorithm="ppo", ratio="token", clip_low=0.2, clip_high=0.28, normalize="token")
    rollout = replace(config.rollout, dynamic_sampling=True)
    buffer = config.rollout.max_tokens // 5
    return replace(config, advantage="grpo", overlong_buffer=buffer, loss=loss, rollout=rollout)


def dr_grpo(config: RunConfig) -> RunConfig:
    """Dr. GRPO (arXiv 2503.20783): no division by the group's deviation, none by an answer's length."""
    loss = replace(config.loss, algorithm="ppo", ratio="token", clip_low=0.2, clip_high=0.2, normalize="constant")
    return replace(config, advantage="dr_grpo", loss=loss)


def rloo(config: RunConfig) -> RunConfig:
    """RLOO (arXiv 2402.14740): REINFORCE with the other answers' mean as baseline, one optimizer step a batch."""
    loss = replace(config.loss, algorithm="reinforce", ratio="token", dual_clip=None, normalize="sequence")
    return replace(config, advantage="rloo", loss=loss, optim=replace(config.optim, minibatches=1))


def reinforce_pp(config: RunConfig) -> RunConfig:
    """REINFORCE++ (arXiv 2501.03262): PPO's clip, advantages in deviations of the whole step."""
    loss = replace(config.loss, algorithm="ppo", ratio="token", clip_low=0.2, clip_high=0.2, normalize="token")
    return replace(config, advantage="reinforce_pp", loss=loss)


def gspo(config: RunConfig) -> RunConfig:
    """GSPO (arXiv 2507.18071): one ratio an answer, the geometric mean of its tokens', and a clip to match."""
    loss = replace(config.loss, algorithm="ppo", ratio="sequence", clip_low=3e-4, clip_high=4e-4, normalize="sequence")
    return replace(config, advantage="grpo", loss=loss)


def cispo(config: RunConfig) -> RunConfig:
    """CISPO (arXiv 2506.13585): REINFORCE weighed by the ratio, at most 5 (arXiv 2510.13786); no token is left out."""
    loss = replace(config.loss, algorithm="cispo", ratio="token", dual_clip=None, clip_low=1.0, clip_high=4.0)
    return replace(config, advantage="grpo", loss=replace(loss, normalize="token"))


ALGORITHMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "gspo": gspo,
    "cispo": cispo,
}


def apply(config: RunConfig, name: str) -> RunConfig:
    """A configuration under an algorithm.

    Raises:
        ValueError: no such algorithm; the known ones are listed.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; the algorithms are: {', '.join(ALGORITHMS)}")
    return replace(ALGORITHMS[name](config), algorithm=name)
