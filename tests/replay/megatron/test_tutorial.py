"""The lines of docs/replay.md for megatron-core run as they stand, and its table of layouts is the tests' own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pacenote.kernels.pack import PackedBatch
from tests.replay.megatron import layouts_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "replay.md"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron")


def test_replay_in_a_megatron_trainer(one_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.replay.megatron import drive, model

    chunks = model.chunks(model.config(), None)
    microbatches = [[drive.trajectory(ids, model.MOE_LAYERS) for ids in batch] for batch in drive.tokens(3)]

    def forward_step(batches: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = chunk(
            input_ids=batch.tokens.long()[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            labels=batch.targets[None],
            packed_seq_params=drive.packed_seq_params(batch),
        )
        return output, lambda losses: ((losses * batch.loss_mask[None]).sum(), {})

    found = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (lines,) = [text for text in found if "attach_megatron" in text]
    names: dict[str, Any] = {
        "chunks": chunks,
        "microbatches": microbatches,
        "moe_layers": model.MOE_LAYERS,
        "forward_step": forward_step,
    }
    exec(lines, names)
    replay = names["replay"]
    positions = sum(len(sample.tokens) - 1 for samples in microbatches for sample in samples)
    assert replay.audit()["replayed"].tolist() == [positions] * len(model.MOE_LAYERS)
    assert "flipped" in capsys.readouterr().out
    grads = drive.router_grads(chunks)
    assert sorted(grads) == list(model.MOE_LAYERS)
    assert all(0 < float(gradient.norm()) < float("inf") for gradient in grads.values())
    replay.detach()


def test_the_table_is_what_the_tests_run_over() -> None:
    table = layouts_table.table()
    assert table in PAGE.read_text("utf-8"), f"docs/replay.md has another table; it should be:\n{table}"
