"""The lines of docs/replay.md run as they stand, and its table is the tests' own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import model as models
from tests.replay import families_table, features
from tests.trainer import recorded

PAGE = Path(__file__).resolve().parent.parent / "docs" / "replay.md"


def block(words: str) -> str:
    """The one code block of the page with these words."""
    found = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) if words in text]
    assert len(found) == 1
    return str(found[0])


def test_replay_in_a_transformers_trainer(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectories: list[Trajectory] = recorded.record(tiny_dir)
    model = models.load(tiny_dir).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 1e-2),
        "trajectories": trajectories,
        "advantages": [1.0 if i % 2 else -0.5 for i in range(len(trajectories))],
    }
    lines = block("pn.attach(model)")
    assert len(lines.strip().splitlines()) <= 12
    exec(lines, names)
    audit = names["replay"].audit()
    positions = sum(len(t.tokens) - 1 for t in trajectories)
    assert audit["replayed"].tolist() == [positions] * len(names["replay"].layers)
    assert "flipped" in capsys.readouterr().out
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)]
    assert sum(name.endswith("mlp.gate.weight") for name in moved) == len(names["replay"].layers)


@pytest.mark.parametrize("table", [families_table.table(), features.table()], ids=["families", "features"])
def test_tables_are_what_the_tests_run_over(table: str) -> None:
    assert table in PAGE.read_text("utf-8"), f"docs/replay.md has another table; it should be:\n{table}"
