"""`pacenote train tiny --exact`: what the engine says and what the trainer computes are the same numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pacenote.kernels.pack import pack
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import findings, metrics
from pacenote.trainer.config import RunConfig, dump, parse
from pacenote.trainer.loop import pick_device
from pacenote.trainer.model import load
from pacenote.trainer.rollout_config import RolloutConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exact.md"

SMALL = ["--steps", "2", "--rollout.prompts", "4", "--rollout.group", "4", "--rollout.temperature", "0.9"]
GAPS = ("abs_delta_logp", "max_delta_logp", "k3_kl")


def run(out: Path, *words: str) -> tuple[list[dict[str, Any]], str]:
    """Rows and text of a run with real processes."""
    command = [sys.executable, "-m", "pacenote", "train", "tiny", *SMALL, "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return metrics.read(out / "metrics.jsonl"), done.stdout


@pytest.mark.road
def test_the_mismatch_is_exactly_zero(tmp_path: Path) -> None:
    rows, said = run(tmp_path / "exact", "--exact")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert [row[name] for name in GAPS] == [0.0, 0.0, 0.0]
        assert [row[f"{name}_native"] for name in GAPS] == [0.0, 0.0, 0.0]
        assert row["flipped_by_layer"] == [0.0] * 5
        assert row["rows_replayed"] > 0
        assert row["tokens_trained"] > 16
        assert row["grad_norm"] > 0
    assert rows[0]["ratio_max"] > 1.0  # the weights moved under it, so the second step's zeros are of others
    assert "agreed to the last bit" in said
    assert "\n! " not in said
    assert "exact</h1>" in (tmp_path / "exact" / "report.html").read_text(encoding="utf-8")


@pytest.mark.road
def test_without_it_there_is_one(tmp_path: Path) -> None:
    """The same number format on both sides is not enough."""
    rows, _ = run(tmp_path / "plain", "--rollout.engine-dtype", "float32")
    assert all(0.0 < row["abs_delta_logp"] < 1e-4 for row in rows)
    assert all(row["max_delta_logp"] > 0.0 for row in rows)


def test_the_pages_lines_run(
    tiny_dir: Path, trajectories: list[Trajectory], capsys: pytest.CaptureFixture[str]
) -> None:
    """The code block of docs/exact.md, and what it promises of its result."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    model = load(tiny_dir)
    some, all_ = (pack(part, advantages=[1.0] * len(part)) for part in (trajectories[3:5], trajectories[:9]))
    names: dict[str, Any] = {"model": model, "batch": some}
    exec(block, names)
    assert "'mm': 'matmul by rows'" in capsys.readouterr().out
    with names["exact"].forward():
        hidden = model.base_model(**all_.inputs).last_hidden_state
    logprob, _ = names["exact"].logprobs(hidden, all_.targets, 1.0, all_.loss_mask)
    mine = (all_.segment_ids == 3) | (all_.segment_ids == 4)
    assert torch.equal(names["logprob"], logprob[mine])
    assert names["logprob"][some.loss_mask].lt(0).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"threads": 1, "rollout": RolloutConfig(upstream="http://x")}, "--exact expects the embedded engine"),
        ({"threads": 1, "device": "cuda"}, "on the CPU"),
        ({"threads": 1, "rollout": RolloutConfig(engine_device="cuda")}, "on the CPU"),
        ({"threads": 2}, "got 2 and 1"),
        ({}, "got None and 1"),
    ],
)
def test_what_cannot_be_equal_is_refused(fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(recipe="tiny", exact=True, **fields)


def test_it_is_part_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(recipe="tiny", exact=True, threads=1)
    assert parse(dump(config)) == config
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device(config) == "cpu"


def row(**changes: Any) -> dict[str, Any]:
    gaps = {name: 0.0 for gap in GAPS for name in (gap, f"{gap}_native")}
    return {"step": 0, "reward": 0.5, "flipped": 0.0, "tokens_trained": 7, **gaps, **changes}


def test_equal_numbers_are_no_collapse() -> None:
    _, agreed = findings.findings([row(), row()], "rollout", exact=True)
    assert agreed.kind == "measured"
    assert "agreed to the last bit on all 14 trained tokens" in agreed.text
    assert any("collapsed" in found.text for found in findings.findings([row()], "rollout"))


@pytest.mark.parametrize(
    "changes", [{"max_delta_logp": 1e-7}, {"max_delta_logp_native": 2e-7}, {"flipped": 0.01}, {"max_delta_logp": None}]
)
def test_a_difference_is_a_warning(changes: dict[str, float | None]) -> None:
    """Null too: that is what NaN becomes in the file."""
    found = findings.findings([row(), row(**changes)], "rollout", exact=True)
    assert [f.kind for f in found] == ["measured", "warning"]
    assert "was to be exact, but" in found[1].text
    assert (
        findings.findings([row(), row(tokens_trained=0, max_delta_logp=None)], "off", exact=True)[1].kind == "measured"
    )
