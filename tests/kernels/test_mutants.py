"""The checks of `route_checks` are worth something: each of these broken kernels fails the one about its fault."""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_is_caught() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.mutants"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0] == {"name": "", "check": "all", "said": ""}, "the kernel itself fails its checks"
    assert len(rows) > 30
    survivors = [f"{row['name']} ({row['check']})" for row in rows[1:] if not row["said"]]
    assert not survivors, f"not caught: {survivors}"
