"""The main job on real SGLang: rollout, routes, replay, steps and new weights, as somebody runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pacenote.trainer import metrics
from tests.trainer.test_road import pacenote, replay_works

pytestmark = pytest.mark.timeout(600)


def test_training_on_real_sglang(tmp_path: Path) -> None:
    """Two steps, so that the second rolls out with the weights of the first; on the same tokens replay works."""
    out = tmp_path / "run"
    done = pacenote(
        "train", "tiny", "--engine", "sglang-cpu", "--steps", "2", "--rollout.prompts", "8", "--rollout.group", "4",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics.read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["episodes_failed"] == 0 and row["tokens_trained"] > 0 for row in rows)
    assert replay_works(rows), rows
    assert np.mean([row["grad_norm"] for row in rows]) > 0
    assert "sglang" in (out / "logs" / "engine.log").read_text(encoding="utf-8").lower()
    assert json.loads((out / "config.json").read_text())["engine"] == "sglang-cpu"
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if str(out).encode() in command_line(pid)]


def command_line(process: Path) -> bytes:
    """Words of a process that may be gone by now."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
