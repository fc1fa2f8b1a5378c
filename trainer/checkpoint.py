"""Checkpoints that are either whole or not there: written beside, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from pacenote.trainer.hf import HfBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is written."""

    every: int = 10
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept."""


def save(root: Path, backend: HfBackend, *, step: int, keep: int) -> Path:
    """Write `root/step_<step>`: the model directory, `trainer.pt` (optimizer, RNG), `state.json`; prune old ones.

    Args:
        step: the next step to run, which is also the version of the weights.
    """
    final = root / f"step_{step:06d}"
    if final.exists():
        return final
    part = root / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    backend.save_weights(part / "model")
    torch.save({**backend.state(), "torch_rng": torch.get_rng_state()}, part / "trainer.pt")
    (part / "state.json").write_text(json.dumps({"step": step}))
    os.replace(part, final)
    for old in list_steps(root)[:-keep]:
        shutil.rmtree(root / f"step_{old:06d}", ignore_errors=True)
    return final


def list_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, in order."""
    return sorted(int(path.name[5:]) for path in root.glob("step_*") if (path / "state.json").is_file())


def latest(root: Path) -> tuple[int, Path]:
    """Step and path of the newest whole checkpoint.

    Raises:
        ValueError: there is none.
    """
    steps = list_steps(root)
    if not steps:
        raise ValueError(f"{root} holds no whole checkpoint to resume from; start the run again with a new --out")
    return steps[-1], root / f"step_{steps[-1]:06d}"


def restore(path: Path, backend: HfBackend) -> None:
    """Bring optimizer and RNG back; the weights are those that the backend was loaded with, from `path / "model"`."""
    state = torch.load(path / "trainer.pt", weights_only=True)
    backend.load_state(state)
    torch.set_rng_state(state["torch_rng"])
