"""Recipes: functions that return a RunConfig. The command line overrides any field.

The comments on memory are `pacenote plan`'s, of the fullest rank; docs/recipes.md has its tables and the commands that
start each. Recipes beside `tiny` were not run: there was no machine for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer.config import RunConfig
from pacenote.trainer.megatron_config import MegatronConfig
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.rollout_config import RolloutConfig
from pacenote.trainer.sync import SyncConfig


def tiny() -> RunConfig:
    """A GLM-4.7-Flash shape with 0.7 million parameters learns the letters task from random weights."""
    return RunConfig(
        recipe="tiny",
        steps=60,
        threads=1,  # a second one gains little at this size, and loses much where engine or server want the core
        optim=OptimConfig(lr=4e-3, warmup=5, decay=0.3, betas=(0.9, 0.99)),
        loss=PolicyConfig(entropy_coef=0.01),
    )


# What a policy of this size is usually trained with: a small constant rate, long answers, a step behind at most.
_OPTIM = OptimConfig(
    lr=1e-6, warmup=10, betas=(0.9, 0.98), weight_decay=0.1, minibatches=1, microbatch_tokens=16384, recompute=True
)
_ROLLOUT = RolloutConfig(
    prompts=64, group=8, max_tokens=8192, concurrency=256, request_timeout=3600, patience=3600, enable_thinking=True
)


def _large(name: str, megatron: MegatronConfig) -> RunConfig:
    return RunConfig(
        recipe=name,
        steps=1000,
        device="cuda",
        backend="megatron",
        megatron=megatron,
        overlong_buffer=1024,
        gap_every=10,  # what replay is worth is looked at now and then: it costs a forward pass of all samples
        rollout=_ROLLOUT,
        sync=SyncConfig(method="disk", pause="retract"),
        optim=_OPTIM,
        # DAPO's clip and mean over tokens; importance weights, truncated at 2, for what replay leaves of the mismatch.
        loss=PolicyConfig(clip_low=0.2, clip_high=0.28, tis_cap=2.0, normalize="token"),
    )


def glm47_flash() -> RunConfig:
    """GLM-4.7-Flash (30 billion, 3 active) on a machine of 8 GPUs of 141 GB: experts over all of them.

    81 GiB a rank, which leaves an engine beside it some 45 (SGLang: --mem-fraction-static 0.3). GPUs of 80 GB: 16 of
    them (the same flags: 60 GiB; --megatron.expert 16: 51 GiB), and engines of their own.
    """
    return _large("glm47_flash", MegatronConfig(expert=8, dtype="bfloat16"))


def qwen3_30b_a3b() -> RunConfig:
    """Qwen3-30B-A3B (31 billion, 3 active) on a machine of 8 GPUs of 141 GB: experts over all of them.

    79 GiB a rank. GPUs of 80 GB: 16 of them (the same flags: 58 GiB), and engines of their own.
    """
    return _large("qwen3_30b_a3b", MegatronConfig(expert=8, dtype="bfloat16"))


def moonlight() -> RunConfig:
    """Moonlight-16B-A3B (16 billion, 3 active) on a machine of 8 GPUs of 80 GB, by transformers and FSDP2.

    float32 throughout: 46 GiB a rank, and 59 while it loads, when each rank has the whole model. Its queries are not
    compressed, which megatron-core 0.19 builds another model for. Its context of 8192 holds prompt and answer: an
    engine refuses a request whose prompt and --rollout.max-tokens are more.
    """
    config = _large("moonlight", MegatronConfig())
    optim = replace(config.optim, microbatch_tokens=8192)
    return replace(config, backend="hf", optim=optim, rollout=replace(config.rollout, max_tokens=6144))


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3's shape (671 billion, 37 active) on 64 machines of 8 GPUs of 80 GB, a step ahead of itself.

    Heads over the 8 GPUs of a machine, experts over 128 ranks: 64 GiB a rank. 61 layers divide into no stages. An
    answer and a prompt of 4096 tokens are one microbatch, which is what the memory is of. The published config.json is
    refused: megatron's rotary embeddings are not scaled.
    """
    config = _large("deepseek_v3", MegatronConfig(tensor=8, expert=128, expert_tensor=1, dtype="bfloat16"))
    ahead = replace(config.rollout, prompts=256, group=16, max_tokens=12288, concurrency=2048, ahead=1, max_staleness=1)
    return replace(config, rollout=ahead)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "glm47_flash": glm47_flash,
    "qwen3_30b_a3b": qwen3_30b_a3b,
    "moonlight": moonlight,
    "deepseek_v3": deepseek_v3,
}
WORLDS = {"tiny": 1, "glm47_flash": 8, "qwen3_30b_a3b": 8, "moonlight": 8, "deepseek_v3": 512}
"""Ranks of the trainer that a recipe is for."""


def find(name: str) -> RunConfig:
    """The recipe's defaults.

    Raises:
        ValueError: no such recipe; the known ones are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()


def shape(config: RunConfig) -> Any:
    """The transformers config of the model that a run trains: of --model, or else the recipe's."""
    from transformers import AutoConfig

    from pacenote.trainer.model import tiny_config
    from pacenote.trainer.shapes import SHAPES

    if config.model is not None:
        return AutoConfig.from_pretrained(config.model)
    return tiny_config(config.tiny) if config.recipe == "tiny" else SHAPES[config.recipe]()
