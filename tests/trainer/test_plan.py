"""`pacenote plan` against torch's own counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pacenote.kernels.pack import pack
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer import plan, recipes
from pacenote.trainer.cli import main
from pacenote.trainer.config import RunConfig
from pacenote.trainer.model import TinyShape, build_tiny, tiny_config
from pacenote.trainer.shapes import SHAPES

# Billions, as the models' cards say.
PUBLISHED = {"glm47_flash": (30, 3), "qwen3_30b_a3b": (30.5, 3.3), "moonlight": (16, 3), "deepseek_v3": (671, 37)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_are_those_of_the_models(name: str) -> None:
    found = plan.weights(SHAPES[name]())
    total, active = PUBLISHED[name]
    assert sum(weight.numel for weight in found) / 1e9 == pytest.approx(total, rel=0.005)
    assert plan.active(SHAPES[name](), found) / 1e9 == pytest.approx(active, rel=0.2)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.sampled_from([4, 8, 16]), st.integers(1, 4), st.sampled_from([32, 64]), st.integers(1, 2))
def test_every_parameter_is_counted_once(layers: int, experts: int, top_k: int, width: int, shared: int) -> None:
    hf = tiny_config(
        TinyShape(
            num_hidden_layers=layers,
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            hidden_size=width,
            n_shared_experts=shared,
        )
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    found = plan.weights(hf)
    assert sum(plan.by_kind(found).values()) == sum(p.numel() for p in model.parameters())
    state = dict(model.named_parameters())
    experts_held = sum(p.numel() for name, p in state.items() if ".experts." in name)
    assert plan.by_kind(found)["experts"] == experts_held
    idle = experts_held * (experts - top_k) // experts
    embedding = state["model.embed_tokens.weight"].numel()
    assert plan.active(hf, found) == sum(p.numel() for p in model.parameters()) - idle - embedding + width


def saved_bytes(hf: Any, tokens: int) -> int:
    """What autograd keeps of a forward pass, each storage once, weights not."""
    model = AutoModelForCausalLM.from_config(hf).train()
    model.set_experts_implementation("eager")
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack_(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.arange(tokens)[None] % 400, use_cache=False).last_hidden_state
    assert hidden.shape[1] == tokens
    return sum(kept.values())


@pytest.mark.parametrize("layers", [2, 6])
def test_activations_are_near_what_autograd_keeps(layers: int) -> None:
    """The estimate is of the least that has to be kept; transformers' modules, in float32, keep more."""
    hf = tiny_config(TinyShape(num_hidden_layers=layers))
    # Attention without a fused kernel keeps its weights, T^2 numbers a head: what grows with T alone is left.
    measured = (4 * saved_bytes(hf, 128) - saved_bytes(hf, 256)) / 2
    estimated = plan.activation_bytes(hf, 128, bytes_each=4, recompute=False)
    assert estimated / measured == pytest.approx(0.83, abs=0.05)


def test_routes_are_those_of_a_packed_batch(trajectories: list[Trajectory]) -> None:
    batch = pack(trajectories, max_len=None, device="cpu")
    assert batch.routes is not None
    rows = batch.routes.rows
    assert plan.route_bytes(SHAPES["tiny"]()) * batch.num_tokens == rows.numel() * rows.element_size()


def test_new_weights_are_as_large_as_on_disk(tmp_path: Path) -> None:
    config = recipes.tiny()
    found = plan.plan(recipes.shape(config), config, world=1)
    file = build_tiny(tmp_path / "model", seed=0) / "model.safetensors"
    assert found.step["new weights"] == pytest.approx(file.stat().st_size, rel=0.03)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_fit_the_gpus_that_they_name(name: str) -> None:
    config = recipes.find(name)
    assert isinstance(config, RunConfig)
    found = plan.plan(recipes.shape(config), config, world=recipes.WORLDS[name])
    gib = found.memory.total / 2**30
    assert gib < {"glm47_flash": 90, "qwen3_30b_a3b": 90}.get(name, 70)


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    """Their scales are tensors of their own, without which they load as other numbers."""
    weights = pytest.importorskip("pacenote.trainer.megatron_weights", exc_type=ImportError)
    save_file({"w": torch.ones(2, dtype=torch.float8_e4m3fn), "v": torch.ones(2)}, tmp_path / "model.safetensors")
    found = weights._Checkpoint(tmp_path)
    assert found.read("v").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"expected w in .* as float32, bfloat16 or float16, got torch\.float8_e4m3fn"):
        found.read("w")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "glm47_flash", "--world", "16", "--megatron.expert", "16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["world"] == 16
    assert main(["plan", "tiny"]) == 0
    assert "| experts | 0.492 |" in capsys.readouterr().out
    assert main(["plan", "glm47_flash", "--world", "9"]) == 2
    assert "expected --world that the --megatron.* sizes divide, got 9" in capsys.readouterr().err
    assert main(["plan", "nothing"]) == 2
    assert main(["train", "glm47_flash", "--device", "cpu"]) == 2
    assert "--model expects a model directory" in capsys.readouterr().err
