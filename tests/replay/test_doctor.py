"""The doctor: every family's full-size config, what cannot be replayed, what cannot be told, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pacenote.replay import doctor
from pacenote.replay.families import REFUSED
from pacenote.replay.hf import attach
from pacenote.replay.spec import RoutingGeometry, router_spec
from pacenote.trainer.cli import main
from tests.replay.conftest import Build, default_config

FAMILIES = (
    "glm4_moe_lite", "deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss", "kimi_k2", "ernie4_5_moe", "nemotron_h",
    "phimoe",
)  # fmt: skip


def written(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config, default=str), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_configs_are_exact_and_no_weight_is_read(family: str, tmp_path: Path) -> None:
    config = default_config(family)
    written(tmp_path, config)
    found = doctor.diagnose(tmp_path)
    assert (found.verdict, found.status, found.why, found.family) == ("exact", 0, None, family)
    assert [(trial.logits, trial.gradients) for trial in found.trials] == [(0.0, 0.0)] * 2
    assert found.geometry is not None
    assert found.geometry.num_layers == config.get("num_hidden_layers", len(config.get("layers_block_type", ())))


def test_the_text_part_of_a_multimodal_config(tmp_path: Path) -> None:
    path = written(tmp_path, {"model_type": "kimi_k25", "text_config": default_config("kimi_k2"), "vision_config": {}})
    assert doctor.diagnose(path).status == 0


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_replayed(family: str, tmp_path: Path) -> None:
    found = doctor.diagnose(written(tmp_path, {"model_type": family}))
    assert (found.status, found.why) == (1, REFUSED[family])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2}, "no router of llama is known"),
        ({}, "no router of None is known"),
        ({"model_type": "glm4_moe_lite"}, "num_hidden_layers in the config"),
        (
            {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
             "hidden_act": "no such"},
            "expected transformers to build a small mixtral .*no such",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_told(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    found = doctor.diagnose(written(tmp_path, config))
    assert (found.verdict, found.status) == ("cannot tell", 2)
    assert found.why is not None
    assert re.search(words, found.why)


def test_a_rounded_bias_is_told_of_in_its_dtype(tmp_path: Path) -> None:
    found = doctor.diagnose(written(tmp_path, default_config("lfm2_moe")))
    assert found.status == 1
    assert [trial.why is None for trial in found.trials] == [True, False]
    assert found.why is not None
    assert "bfloat16" in found.why


def test_a_router_that_computes_something_else_is_not_exact(tiny: Build) -> None:
    model = tiny("qwen3_moe")
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = False
    trial = doctor.attempt(model, "a changed model")
    assert trial.why is not None
    assert "to weigh experts as" in trial.why


def test_experts_that_do_not_follow_the_router_are_not_exact(tiny: Build) -> None:
    """The hook's output goes nowhere: recording and replaying agree, and would be called exact."""
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.forward = lambda hidden, experts, weights: torch.zeros_like(hidden)
    trial = doctor.attempt(model, "a deaf model")
    assert trial.logits == 0
    assert trial.why == "other routes change nothing: the experts do not follow the router's output"
    attach(model).detach()  # nothing was left behind


def test_the_weights_are_tried_where_asked(tiny: Build, tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    found = doctor.diagnose(tmp_path, weights=True)
    assert found.status == 0
    assert found.trials[-1].subject == "the model, float32"
    (tmp_path / "model.safetensors").unlink()
    found = doctor.diagnose(tmp_path, weights=True)
    assert found.status == 2
    assert found.why is not None
    assert found.why.startswith("the model does not load: ")
    assert doctor.diagnose(tmp_path).status == 0


def test_layers_in_words() -> None:
    geometry = RoutingGeometry(num_layers=9, layers=(1, 2, 3, 5, 7, 8), num_experts=384, top_k=8)
    assert doctor.where(geometry) == "6 of 9 layers: 1-3, 5, 7-8"
    assert doctor.how_many(geometry) == "8 of 384 a token; its routes are 96 bytes"


def test_what_no_engine_does_in_training_is_told() -> None:
    """Real Phi-3.5-MoE and Mixtral configs set their noise; sparsemixer draws whatever they set."""
    drawn, noisy = "routed as in evaluation", "multiplied by noise, replayed or not: set {} to 0"
    for family, fields, words in (
        ("phimoe", {}, [drawn]),
        ("phimoe", {"input_jitter_noise": 0.01}, [drawn, noisy.format("input_jitter_noise")]),
        ("mixtral", {"router_jitter_noise": 0.01}, [noisy.format("router_jitter_noise")]),
    ):
        config = default_config(family, **fields)
        told = doctor.in_training(config, router_spec(config))
        assert told is not None
        assert told.count(";") == len(words) - 1
        assert all(part in told for part in words)
        found = doctor.Diagnosis(model="m", family=family, verdict="exact", why=None, training=told)
        assert f"training   {told}\n" in found.text()
    config = default_config("mixtral")
    assert doctor.in_training(config, router_spec(config)) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, default_config("glm4_moe_lite")))
    assert main(["doctor", path]) == 0
    text = capsys.readouterr().out
    assert "routes in  46 of 47 layers: 1-46\n" in text
    assert text.endswith("replay     exact\n")
    assert main(["doctor", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["status"], found["geometry"]["top_k"]) == ("exact", 0, 4)
    assert found["spec"]["score"] == "sigmoid"
    written(tmp_path, {"model_type": "longcat_flash"})
    assert main(["doctor", "--json", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out)["why"].startswith("it counts experts that do nothing")


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), ("{", "text that is not"), ("[]", "got list")])
def test_what_is_no_config(text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main(["doctor", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out
    assert main(["doctor"]) == 2


def test_threads_do_not_change_the_verdict(tmp_path: Path) -> None:
    """Attention's backward pass on several threads differs from itself: that is not replay's."""
    written(tmp_path, default_config("qwen3_moe"))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert doctor.diagnose(tmp_path).verdict == "exact"
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
