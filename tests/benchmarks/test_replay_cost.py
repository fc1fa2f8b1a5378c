"""The benchmark of a training step with and without replay: small and real, its bytes exact, its times ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import replay_bytes, replay_cost, wire
from benchmarks.models import MODELS
from benchmarks.replay_cost import MODES, WORKS
from benchmarks.replay_models import SUBJECTS, build
from pacenote.replay.binary import decode_record, encode_record
from pacenote.replay.spec import geometry_from_config

HEADER, RUN = 40, 8
"""Bytes of a record's header, checksum included, and of a run of provenance or versions."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of a few tokens writes."""
    out = tmp_path_factory.mktemp("replay_cost")
    assert replay_cost.main(["--models", "tiny", "--tokens", "40", "--repeats", "1", "--out", str(out)]) == 0
    [path] = out.glob("replay_cost-*.json")
    assert sorted(file.suffix for file in out.iterdir()) == [".csv", ".json", ".png"]
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_every_part_of_a_step_is_measured_in_every_mode(found: dict[str, Any]) -> None:
    assert found["benchmark"] == "replay_cost"
    about = found["machine"]
    assert {"device", "commit", "sources", "date", "torch", "transformers", "threads"} <= set(about)
    assert len(about["load_before"]) == len(about["load_after"]) == 3
    rows = [row for row in found["rows"] if row["work"] != "bytes"]
    assert [(row["work"], row["implementation"]) for row in rows] == [(work, mode) for work in WORKS for mode in MODES]
    for row in rows:
        assert (row["model"], row["tokens"], row["layers"], row["k"], row["repeats"]) == ("tiny", 40, 5, 2, 1)
        assert row["p10_us"] == row["median_us"] == row["p90_us"] > 0
        assert (row["peak_bytes"] is None) == (row["work"] == "step")
        assert row["implementation"] != "off" or row["over_off_percent"] == row["processor_over_off_percent"] == 0


def test_bytes_are_those_of_the_rows(found: dict[str, Any]) -> None:
    rows = {row["model"]: row for row in found["rows"] if row["work"] == "bytes"}
    assert list(rows) == ["tiny", *MODELS]
    for name, row in rows.items():
        tokens, samples, layers = row["tokens"], row["samples"], row["layers"]
        ids = tokens * layers * row["k"] * row["id"]
        assert row["id"] == (1 if row["experts"] <= 256 else 2)
        assert row["host_routes_bytes"] == row["device_routes_bytes"] == ids + tokens, name
        body = HEADER + 4 * layers + RUN * 3  # prompt and answer, and one version
        assert row["wire_routes_bytes"] == ids + samples * (body + -body % 8)
        assert row["device_other_bytes"] == tokens * (4 + 8 + 1 + 4 + 4 + 8 + 4)
        assert row["host_other_bytes"] == (tokens + samples) * (4 + 1 + 4 + 4)
        assert 0 < row["samples_routes_bytes"] - ids < 300 * samples + 4 * layers * samples  # names in the header
        assert row["device_routes_a_token"] == layers * row["k"] * row["id"] + 1
    tiny = rows["tiny"]
    assert tiny["held_off_bytes"] == 0
    assert tiny["held_rollout_bytes"] == tiny["device_routes_bytes"]
    assert tiny["held_trainer_bytes"] == tiny["held_rollout_only_bytes"] == tiny["held_rollout_bytes"]


def test_what_is_counted_is_what_travels() -> None:
    where = wire.geometry("kimi-k2", MODELS["kimi-k2"])
    made = wire.make(where, 9, 0)
    trajectory = replay_bytes.sample(np.arange(10), made)
    assert decode_record(encode_record(replay_bytes.record(trajectory))) == replay_bytes.record(trajectory)
    assert np.array_equal(replay_bytes.record(trajectory).experts, made.experts)
    bare = replay_bytes.without_routes(trajectory)
    assert (bare.experts, bare.trained, trajectory.trained) == (None, 5, 5)


def test_a_cut_model_routes_as_the_whole() -> None:
    """Its width, experts and vocabulary are the public model's, and so is its dense layer."""
    glm, qwen = (SUBJECTS[name].config() for name in ("glm-4.7-flash, 4 layers", "qwen3-30b-a3b, 4 layers"))
    for config, layers, experts, k in ((glm, (1, 2, 3), 64, 4), (qwen, (0, 1, 2, 3), 128, 8)):
        geometry = geometry_from_config(config.to_dict())
        assert (geometry.layers, geometry.num_experts, geometry.top_k, config.hidden_size) == (layers, experts, k, 2048)
    assert (glm.vocab_size, qwen.vocab_size) == (154_880, 151_936)


def test_a_step_that_replays_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    directory = build(SUBJECTS["tiny"].config(), tmp_path, device)
    trainer = replay_cost.Trainer(directory, SUBJECTS["tiny"], 40, device)
    trainer.check("rollout")
    monkeypatch.setattr(trainer, "rows", 41)
    with pytest.raises(AssertionError, match="rollout: 400 rows were replayed, expected 410"):
        trainer.check("rollout")
