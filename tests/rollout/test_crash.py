"""SIGKILL between an engine's answer and the client's, at every kind of step; `crash` says what is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def crash(folder: Path, model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.rollout.crash", str(folder), "--model", str(model), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)


@pytest.mark.parametrize(("by", "kills"), [("line", 24), ("opcode", 12), ("sqlite", 12)])
def test_killed_anywhere_it_goes_on_as_if_nothing_had_been(
    tiny_dir: Path, tmp_path: Path, by: str, kills: int, long: bool
) -> None:
    count = {"line": 0, "opcode": 4000, "sqlite": 0}[by] if long else kills
    result = crash(tmp_path / "killed", tiny_dir, "--by", by, "--kills", str(count))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("0 lost something\n")


def test_a_server_that_answers_too_early_is_found_out(tiny_dir: Path, tmp_path: Path) -> None:
    result = crash(tmp_path / "killed", tiny_dir, "--kills", "24", "--fault")
    assert result.returncode == 1, result.stdout
    assert "steps said to be done" in result.stderr
