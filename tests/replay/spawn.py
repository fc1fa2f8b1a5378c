"""Rank modules started as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def spawn(module: str, size: int, directory: Path, names: Iterable[str]) -> list[Any]:
    """Run `python -m module RANK DIRECTORY NAME...` once a rank; what each saved as DIRECTORY/rankN.pt.

    They get all names at once, since importing is most of their time.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(directory), *names],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(text[-3000:] for text in said)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(size)]
