"""Every family: recorded rows, replayed, give the same logits and gradients to the last bit; other rows give others."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.families import FAMILIES, REFUSED
from pacenote.replay.hf import Replay, attach
from pacenote.replay.spec import families, geometry_from_config, router_spec

Build = Callable[..., Any]
BATCH, LENGTH = 2, 12


def step(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one forward and backward pass; of a model without a head, its hidden states."""
    model.zero_grad()
    out = model(input_ids=tokens, use_cache=False)[0]
    out.float().square().mean().backward()
    return out.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def foreign(replay: Replay) -> Tensor:
    """Valid rows [B, S, L, K] int32 that no router chose."""
    geometry = replay.geometry
    shape = (BATCH, LENGTH, len(geometry.layers), geometry.num_experts)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., : geometry.top_k].int()


def routers(model: Any, grads: dict[str, Tensor]) -> int:
    """How many routers have a gradient."""
    names = {
        name for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("router") and hasattr(module, "top_k")
    }  # fmt: skip
    return sum(any(name.startswith(f"{router}.") and g.any() for name, g in grads.items()) for router in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", families())
def test_replaying_the_own_routes_is_exact_and_others_are_not(tiny: Build, family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    tokens = torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    replay = attach(model)
    with replay.record() as recording:
        logits, grads = step(model, tokens)
    rows = recording.rows()
    assert rows.shape == (BATCH, LENGTH, len(replay.layers), replay.geometry.top_k)
    with replay.rows(rows):
        again, grads_again = step(model, tokens)
    assert float((again - logits).abs().max()) == 0.0
    assert grads.keys() == grads_again.keys()
    assert max(float((grads[name] - grads_again[name]).abs().max()) for name in grads) == 0.0
    audit = replay.audit(reset=True)
    assert audit["replayed"].tolist() == [BATCH * LENGTH] * len(replay.layers)
    # Equal logits are ties, which torch.topk breaks another way than the lowest index; bfloat16 has many.
    assert audit.total("flipped") <= (0 if dtype == torch.float32 else audit.total("replayed") // 4)

    other = foreign(replay)
    with replay.rows(other), replay.record() as replayed:
        moved, grads_moved = step(model, tokens)
    assert torch.equal(replayed.rows(), other)
    assert not torch.equal(moved, logits)
    assert replay.audit().total("flipped") > 0
    assert routers(model, grads_moved) == len(replay.layers)

    replay.detach()
    assert torch.equal(step(model, tokens)[0], logits)


def test_a_bias_that_is_rounded_into_the_scores_is_refused(tiny: Build) -> None:
    """LFM2 adds its bias in bfloat16 if both are: the same rows would be replayed, but free ones routed otherwise."""
    model = tiny("lfm2_moe", dtype=torch.bfloat16)
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.bfloat16()
    with pytest.raises(UnsupportedModel, match="of its choices differ"):
        attach(model)


def test_a_spec_that_rounds_what_the_module_does_not_is_refused(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral", dtype=torch.bfloat16)
    attach(model).detach()
    rounds = RouterSpec(score="softmax", renormalize=True, weight_dtype="logits")
    monkeypatch.setitem(FAMILIES, "mixtral", dataclasses.replace(FAMILIES["mixtral"], router=lambda fields: rounds))
    with pytest.raises(UnsupportedModel, match="to weigh experts as"):
        attach(model)


def test_layers_that_the_config_names_and_the_model_does_not_have_are_refused(tiny: Build) -> None:
    """DeepSeek's own code leaves layers dense by `moe_layer_freq`, transformers' does not."""
    model = tiny("deepseek_v3")
    model.config.moe_layer_freq = 2
    with pytest.raises(UnsupportedModel, match=r"one router in each of the layers \(2,\) of the config"):
        attach(model)


def test_what_no_spec_describes_is_refused_with_the_reason() -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "num_layers": 1,
        "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["longcat_flash"](**small))
    with pytest.raises(UnsupportedModel, match="not longcat_flash's: "):
        attach(model)


@pytest.mark.parametrize("family", REFUSED)
def test_a_refusal_says_why_before_anything_is_read(family: str) -> None:
    for config in ({"model_type": family}, {"model_type": "outer", "text_config": {"model_type": family}}):
        with pytest.raises(UnsupportedModel) as error:
            geometry_from_config(config)
        assert REFUSED[family] in str(error.value)
        with pytest.raises(UnsupportedModel):
            router_spec(config)
    assert family not in FAMILIES


def routed_kinds() -> dict[str, set[str]]:
    """For each folder of transformers with a router that returns three values or more, its `model_type`s."""
    import transformers

    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        if not any(node.name.lower().endswith("router") and gives_triples(node) for node in classes):
            continue
        config = (path.parent / f"configuration_{path.stem.removeprefix('modeling_')}.py").read_text(encoding="utf-8")
        found[path.stem.removeprefix("modeling_")] = {
            str(node.value.value)
            for node in ast.walk(ast.parse(config))
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model_type"
            and isinstance(node.value, ast.Constant)
        }  # fmt: skip
    return found


def gives_triples(router: ast.ClassDef) -> bool:
    forward = next(part for part in router.body if isinstance(part, ast.FunctionDef) and part.name == "forward")
    last = forward.body[-1]
    return isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple) and len(last.value.elts) >= 3


def test_every_router_of_the_installed_transformers_is_in_the_table_or_refused() -> None:
    kinds = routed_kinds()
    assert len(kinds) > 30
    unjudged = {folder: names for folder, names in kinds.items() if not names & {*FAMILIES, *REFUSED}}
    assert not unjudged
