"""Checkpoints that are either whole or not there: written beside, flushed, then renamed into place.

A checkpoint has the model as a directory that engines load too, and `trainer.pt`: the optimizer's moments, the guard's
norms, the states of torch's, Python's and numpy's random numbers. What a step draws (tasks, shuffling, the sampler's
seeds) follows from the run's seed and the step's number, so the step is the data's position, and nothing else is kept.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacenote.trainer.errors import CannotSave
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

    Raises:
        CannotSave: it could not be written; older checkpoints are as they were.
    """
    final = root / f"step_{step:06d}"
    if final.exists():
        return final
    part = root / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        backend.save_weights(part / "model")
        torch.save({**backend.state(), "random": _random_state()}, part / "trainer.pt")
        (part / "state.json").write_text(json.dumps({"step": step}))
        for path in (*part.rglob("*"), part):
            _flush(path)
        os.replace(part, final)
        _flush(root)
    except Exception as error:  # a full disk is an OSError, a RuntimeError of torch or an error of safetensors
        shutil.rmtree(part, ignore_errors=True)
        raise CannotSave(
            f"checkpoint {final} cannot be written ({type(error).__name__}: {_line(error)}); older ones are whole: "
            "free space, then go on from the newest"
        ) from error
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
    """Bring optimizer and random numbers back; the weights are those that the backend was loaded with, from
    `path / "model"`.

    Raises:
        ValueError: written by another version of pacenote, or damaged.
    """
    try:
        state = torch.load(path / "trainer.pt", weights_only=True)
        backend.load_state(state)
        found = state["random"]
        torch.set_rng_state(found["torch"])
        if found["cuda"]:
            torch.cuda.set_rng_state_all(found["cuda"])
        random.setstate(found["python"])
        name, keys, *rest = found["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {_line(error)}): delete it to resume from the one before"
        ) from error


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def _flush(path: Path) -> None:
    """Have a file or folder on the disk before a rename says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
