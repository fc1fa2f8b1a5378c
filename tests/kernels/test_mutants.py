"""The checks of the kernels are worth something: each of these broken kernels fails the one about its fault."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pacenote.kernels import launch

if not launch.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
if launch.INTERPRETED:
    pytest.skip("runs once, in the run without TRITON_INTERPRET", allow_module_level=True)

from tests.kernels.mutants import KERNELS

ROOT = Path(__file__).resolve().parents[2]
CAUGHT = ("AssertionError", "IndexError")
"""What a check says of a kernel that ran, or read elsewhere; a mutant that cannot run shows nothing."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_mutant_is_caught(kernel: str, long: bool) -> None:
    """All of them with --long; else every second of those that take long."""
    module = importlib.import_module(f"tests.kernels.mutants_{kernel}")
    every = 1 if long or len(module.MUTANTS) < 40 else 2
    listed, interpreted = module.MUTANTS[::every], getattr(module, "INTERPRETED", True)
    env = {
        **os.environ,
        "TRITON_INTERPRET": str(int(interpreted)),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.mutants", kernel, "--every", str(every)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    whole, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (whole["name"], whole["said"]) == ("", ""), "the kernel itself fails its checks"
    assert [row["name"] for row in rows] == [mutant.name for mutant in listed]
    assert len({row["name"] for row in rows}) == len(rows) > 0
    survivors = [f"{row['name']} ({row['check']})" for row in rows if not row["said"]]
    assert not survivors, f"not caught: {survivors}"
    stillborn = [f"{row['name']}: {row['said']}" for row in rows if not any(kind in row["said"] for kind in CAUGHT)]
    assert not stillborn, f"failed otherwise than by what they compute: {stillborn}"
