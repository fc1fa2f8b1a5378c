"""Recipes: functions that return a RunConfig. The command line overrides any field."""

from __future__ import annotations

from collections.abc import Callable

from pacenote.kernels.policy import PolicyConfig
from pacenote.trainer.config import RunConfig
from pacenote.trainer.optim import OptimConfig


def tiny() -> RunConfig:
    """A GLM-4.7-Flash shape with 0.7 million parameters learns the letters task from random weights."""
    return RunConfig(
        recipe="tiny",
        steps=60,
        threads=1,  # a second one gains little at this size, and loses much where engine or server want the core
        optim=OptimConfig(lr=4e-3, warmup=5, decay=0.3, betas=(0.9, 0.99)),
        loss=PolicyConfig(entropy_coef=0.01),
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
