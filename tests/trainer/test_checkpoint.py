"""Checkpoints: whole or absent whatever happens, and a run that goes on from one takes the same steps."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pacenote.trainer import checkpoint, metrics
from pacenote.trainer.errors import CannotSave
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig
from tests.trainer import save_and_die

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend(tiny_dir: Path) -> Iterator[HfBackend]:
    """With moments of one optimizer step."""
    backend = HfBackend(tiny_dir, OptimConfig(), device="cpu", temperature=1.0)
    save_and_die.change(backend, 1)
    yield backend
    backend.close()


def test_random_numbers_go_on_where_they_were(backend: HfBackend, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, backend, step=1, keep=2)
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    checkpoint.restore(path, backend)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn


@contextmanager
def disk(size: int) -> Iterator[None]:
    """No file larger than so many bytes, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 3_000, 100_000, 800_000])
def test_a_full_disk_leaves_older_ones_whole(backend: HfBackend, tmp_path: Path, size: int) -> None:
    first = checkpoint.save(tmp_path, backend, step=1, keep=1)
    with disk(size), pytest.raises(CannotSave, match=r"step_000002 cannot be written .* older ones are whole"):
        checkpoint.save(tmp_path, backend, step=2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    checkpoint.restore(first, backend)
    assert checkpoint.save(tmp_path, backend, step=2, keep=1).is_dir()
    assert checkpoint.list_steps(tmp_path) == [2]


@pytest.mark.parametrize("damage", ["cut", "nothing", "other"])
def test_a_damaged_one_is_named(backend: HfBackend, tmp_path: Path, damage: str) -> None:
    path = checkpoint.save(tmp_path, backend, step=1, keep=1)
    state = path / "optimizer.pt"
    if damage == "other":
        torch.save({"optimizer": backend.optimizer.state_dict()}, state)
    else:
        state.write_bytes(state.read_bytes()[: 1000 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=r"step_000001 cannot be read .* delete it to resume from the one before"):
        checkpoint.restore(path, backend)


def test_killed_at_any_line_of_a_save(tiny_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """SIGKILL while the second checkpoint is written: the first or the second is there, whole."""
    kills = "0" if request.config.getoption("--long") else "10"
    command = [sys.executable, "-m", "tests.trainer.save_and_die", str(tiny_dir), str(tmp_path / "run"), kills]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(word.split("=") for word in done.stdout.split())
    assert int(found["kills"]) >= 15
    assert int(found["old"]) > 0 < int(found["new"])


TINY = ["--exact", "--steps", "3", "--checkpoint.every", "1", "--rollout.prompts", "2", "--rollout.group", "4"]
MEASURED = ("seconds", "tokens_per_second", "model_tflops", "host_gib", "gpu_")


def started(out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pacenote", "train", *words]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def numbers(out: Path) -> list[dict[str, Any]]:
    """The rows without what a clock or a sensor says."""
    rows = metrics.read(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


@pytest.mark.road
def test_killed_and_resumed_the_numbers_are_the_same(tmp_path: Path) -> None:
    """A rerun from the same seed is equal to the last bit, and so is a run that was killed -9 after its second step."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert started(whole, "tiny", *TINY, "--out", str(whole)).wait(240) == 0, whole.with_suffix(".log").read_text()
    run = started(cut, "tiny", *TINY, "--out", str(cut))
    while len(metrics.read(cut / "metrics.jsonl")) < 2:
        assert run.poll() is None, cut.with_suffix(".log").read_text()
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert 1 <= checkpoint.latest(cut / "checkpoints")[0] <= 2
    assert started(cut, "--resume", str(cut)).wait(240) == 0, cut.with_suffix(".log").read_text()
    assert numbers(cut) == numbers(whole)
    assert [row["step"] for row in numbers(whole)] == [0, 1, 2]
    one, other = (path / "checkpoints" / "step_000003" / "model" / "model.safetensors" for path in (whole, cut))
    assert one.read_bytes() == other.read_bytes()
