"""`make train` as a user runs it, to its end: the reward rises, and replay halves the mismatch of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pacenote.trainer import findings, metrics, recipes

pytestmark = [pytest.mark.road, pytest.mark.timeout(900)]


def test_the_tiny_recipe_learns(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pacenote", "train", "tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = metrics.read(out / "metrics.jsonl")
    assert len(rows) == recipes.tiny().steps
    first, last, _ = findings.ends(rows, "reward")
    assert last > first + 0.3, (first, last)
    trained, native = (findings.mean(rows, name) for name in ("abs_delta_logp", "abs_delta_logp_native"))
    assert trained < 0.5 * native, (trained, native)
    assert findings.mean(rows, "k3_kl") < 0.2 * findings.mean(rows, "k3_kl_native")
    assert findings.total(rows, "rows_missing") == findings.total(rows, "rows_invalid") == 0
