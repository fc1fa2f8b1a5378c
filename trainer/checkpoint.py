"""Checkpoints that are either whole or not there: written beside, flushed, then renamed into place.

A checkpoint has the model as a directory that engines load too, the optimizer's moments and the guard's norms as the
back end writes them, each rank's states of torch's, Python's and numpy's random numbers, and the run's place in the
stream of groups, with those that are played and not yet trained on. What a step draws (tasks, shuffling, the sampler's
seeds) follows from the run's seed and numbers, so there is nothing else to keep.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacenote.trainer.backend import Backend
from pacenote.trainer.errors import CannotSave
from pacenote.trainer.position import START, Position, save_position
from pacenote.trainer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is written."""

    every: int = 10
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept."""


def save(root: Path, backend: Backend, *, step: int, keep: int, position: Position | None = None) -> Path:
    """Write `root/step_<step>`: the model directory, the optimizer, each rank's random numbers, `state.json`; prune old
    ones. All ranks call it together; a rank that cannot write stops them all.

    Args:
        root: the run's checkpoints.
        backend: what is saved.
        step: the next step to run, which is also the version of the weights.
        keep: how many stay.
        position: where the run is in the stream of groups, as the leader knows it.

    Raises:
        CannotSave: it could not be written; older checkpoints are as they were.
    """
    world, final = backend.world, root / f"step_{step:06d}"
    if world.lead(final.exists):
        return final
    part = root / f".{final.name}.part"
    try:
        world.alone(lambda: _begin(part))
        backend.save_weights(part / "model")
        _together(world, lambda: backend.save_state(part))
        _together(world, lambda: torch.save({"random": _random_state()}, part / f"rank{world.rank}.pt"))
        world.alone(lambda: _end(part, final, step, position or START))
    except Exception as error:  # a full disk is an OSError, a RuntimeError of torch or an error of safetensors
        shutil.rmtree(part, ignore_errors=True)
        raise CannotSave(
            f"checkpoint {final} cannot be written ({type(error).__name__}: {_line(error)}); older ones are whole: "
            "free space, then go on from the newest"
        ) from error
    if world.leads:
        for old in list_steps(root)[:-keep]:
            shutil.rmtree(root / f"step_{old:06d}", ignore_errors=True)
    return final


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _together(world: World, write: Callable[[], None]) -> None:
    """Every rank writes, and knows that all have.

    Raises:
        OSError: one could not.
    """
    failed = ""
    try:
        write()
    except Exception as error:
        failed = f"rank {world.rank}: {error}"
    if said := [text for text in world.gather(failed) if text]:
        raise OSError(said[0])


def _end(part: Path, final: Path, step: int, position: Position) -> None:
    save_position(part, position)
    (part / "state.json").write_text(json.dumps({"step": step}))
    for path in (*part.rglob("*"), part):
        _flush(path)
    os.replace(part, final)
    _flush(part.parent)


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


def restore(path: Path, backend: Backend) -> None:
    """Bring optimizer and random numbers back; the weights are those that the backend was loaded with, from
    `path / "model"`, but for what stands there merged with adapters, which comes back as it was. A rank that the run
    did not have before keeps the random numbers it has.

    Raises:
        ValueError: written by another version of pacenote, or damaged, or of another kind of run.
    """
    mine = path / f"rank{backend.world.rank}.pt"
    try:
        backend.load_state(path)
        if backend.world.leads or mine.exists():
            _set_random_state(torch.load(mine, weights_only=True)["random"])
    except (KeyError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {_line(error)}): delete it to resume from the one before"
        ) from error


def _set_random_state(found: dict[str, Any]) -> None:
    torch.set_rng_state(found["torch"])
    if found["cuda"]:
        torch.cuda.set_rng_state_all(found["cuda"])
    random.setstate(found["python"])
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


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
