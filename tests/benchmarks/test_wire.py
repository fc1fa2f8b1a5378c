"""The benchmark of wire forms: every form is checked against the record, and says its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import harness, wire
from benchmarks.models import MODELS


def test_every_form_is_timed_and_says_its_size(tmp_path: Path) -> None:
    words = ["--tokens", "8", "--repeats", "1", "--out", str(tmp_path)]
    assert harness.main("wire", "", wire.cases, words) == 0
    [path] = tmp_path.glob("wire-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 5 * len(MODELS)
    assert all(row["median_us"] > 0 for row in rows)
    sizes = {row["implementation"]: int(row["note"].split()[0]) for row in rows if row["model"] == "kimi-k2"
             and "bytes" in row["note"]}  # fmt: skip
    assert sizes["pacenote"] < sizes["vllm"] < sizes["sglang"]


def test_a_form_that_gives_another_record_fails() -> None:
    where = wire.geometry("glm-4.7-flash", MODELS["glm-4.7-flash"])
    assert (where.num_layers, where.layers[0]) == (47, 1)
    made = wire.make(where, 3, 0)
    wire.check(made, made)
    with pytest.raises(AssertionError, match="another record"):
        wire.check(made, made.truncate(2))
