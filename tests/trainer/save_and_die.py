"""Kills a process with SIGKILL while it writes a checkpoint, at lines of the code that writes it.

    python -m tests.trainer.save_and_die MODEL FOLDER KILLS

KILLS are spread evenly over all lines that `checkpoint.save` and what it calls run in pacenote, transformers,
safetensors and torch's serialisation, and LAST more fall on the last ones; 0 is one at each line. After each the newest
checkpoint must be one of the two, and load to the very weights, moments and random numbers that were saved.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pacenote.trainer import checkpoint
from pacenote.trainer import model as models
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig

WATCHED = ("/trainer/", "/safetensors/", "/torch/serialization.py", "/transformers/modeling_utils.py", "/shutil.py")
LAST = 10
Known = dict[int, list[torch.Tensor]]


def change(backend: HfBackend, seed: int) -> None:
    """An optimizer step with drawn gradients."""
    torch.manual_seed(seed)
    for parameter in backend.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    backend.apply_gradients()


def state(backend: HfBackend) -> list[torch.Tensor]:
    """Weights, moments and the next random number."""
    moments = [value for entry in backend.optimizer.state.values() for value in entry.values()]
    copies = [tensor.detach().clone() for tensor in (*backend.model.parameters(), *moments)]
    before = torch.get_rng_state()
    copies.append(torch.rand(3))
    torch.set_rng_state(before)
    return copies


def saved(backend: HfBackend, root: Path, at: int) -> int:
    """Save; killed at line `at`. Returns the lines."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in WATCHED):
            return None
        if event == "line" and next(lines) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    checkpoint.save(root, backend, step=2, keep=1)
    sys.settrace(None)
    return next(lines) - 1


def killed(backend: HfBackend, root: Path, at: int) -> bool:
    """Save in a process of its own; whether it was killed."""
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    saved(backend, root, at)
    os._exit(0)


def main(model: Path, folder: Path, kills: int) -> None:
    """All kills, and a line of counts."""
    torch.set_num_threads(1)
    backend = HfBackend(model, OptimConfig(), device="cpu", temperature=1.0)
    other = HfBackend(model, OptimConfig(), device="cpu", temperature=1.0)
    known: Known = {}
    for step in (1, 2):
        change(backend, step)
        known[step] = state(backend)
        if step == 1:
            checkpoint.save(folder / "first", backend, step=1, keep=1)
    drawn = torch.get_rng_state()
    shutil.copytree(folder / "first", folder / "counted")
    total = saved(backend, folder / "counted", 0)
    # What follows the rename is a few lines at the end.
    some = {*(1 + number * total // kills for number in range(kills)), *range(total - LAST, total + 1)} if kills else ()
    places = sorted(some) or range(1, total + 1)
    found = {1: 0, 2: 0}
    for at in places:
        root = folder / "killed"
        shutil.copytree(folder / "first", root)
        torch.set_rng_state(drawn)
        if not killed(backend, root, at):
            continue
        step, path = checkpoint.latest(root)
        other.model.load_state_dict(models.load(path / "model").state_dict())
        checkpoint.restore(path, other)
        if not all(torch.equal(a, b) for a, b in zip(state(other), known[step], strict=True)):
            raise SystemExit(f"line {at} of {total}: checkpoint {step} is not what was saved")
        found[step] += 1
        shutil.rmtree(root)
    print(f"kills={sum(found.values())} lines={total} old={found[1]} new={found[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
