"""Recipes: functions that return a RunConfig. The command line overrides any field."""

from __future__ import annotations

from collections.abc import Callable

from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer.config import RunConfig
from pacenote.trainer.hf import OptimConfig


def tiny() -> RunConfig:
    """A GLM-4.7-Flash shape with half a million parameters learns the letters task from random weights."""
    return RunConfig(
        recipe="tiny",
        optim=OptimConfig(lr=5e-3, warmup=5),
        loss=PolicyConfig(entropy_coef=0.02),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny": tiny}


def find(name: str) -> RunConfig:
    """The recipe's defaults.

    Raises:
        ValueError: no such recipe; the known ones are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
