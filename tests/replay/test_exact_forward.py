"""Whole models in exact form: a token's hidden states, experts and logprobs are its sequence's alone, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.exact import Exact
from pacenote.replay.hf import attach

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")

Build = Callable[..., Any]
FAMILIES = ("glm4_moe_lite", "qwen3_moe", "mixtral", "deepseek_v3")
LENGTHS = (35, 1, 9)


def sequences(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def packed(model: Any, many: list[Tensor]) -> list[Tensor]:
    """Hidden states [S, D] of each, computed in one row."""
    places = torch.cat([torch.arange(len(ids)) for ids in many])
    hidden = model.base_model(input_ids=torch.cat(many)[None], position_ids=places[None], use_cache=False)[0][0]
    starts = [sum(len(ids) for ids in many[:number]) for number in range(len(many))]
    return [hidden[start : start + len(ids)] for start, ids in zip(starts, many, strict=True)]


def decoded(model: Any, many: list[Tensor], first: int) -> list[Tensor]:
    """Hidden states [S, D] of each: a prompt of `first` tokens, then one by one, each sequence over its own cache."""
    out = []
    for ids in many:
        cache, parts = DynamicCache(config=model.config), [ids[:first], *ids[first:, None]]
        states = [
            model.base_model(input_ids=part[None], past_key_values=cache, use_cache=True)[0][0]
            for part in parts
            if len(part)
        ]
        out.append(torch.cat(states))
    return out


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_packing_and_order_change_no_bit(tiny: Build, family: str, dtype: torch.dtype) -> None:
    model, many = tiny(family, dtype=dtype), sequences()
    plain = packed(model, many)
    exact = Exact(model)
    replay = attach(model)
    with exact.forward(), replay.record() as recording:
        whole = packed(model, many)
    routes = recording.rows()
    with exact.forward():
        assert equal(packed(model, many[::-1])[::-1], whole)
        assert equal(decoded(model, many, first=5), whole)
        with replay.rows(routes[0]):
            assert equal(packed(model, many), whole)
    counts = replay.audit()
    assert (counts.total("replayed"), counts.total("pad")) == (sum(LENGTHS) * len(replay.layers), 0)
    assert counts.total("flipped") == 0
    for mine, usual in zip(whole, plain, strict=True):
        error = (mine - usual).float().norm() / usual.float().norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.2)  # a flipped expert moves a bfloat16 token


@torch.no_grad()
def test_without_it_decoding_changes_bits(tiny: Build) -> None:
    model, many = tiny("glm4_moe_lite"), sequences()
    assert not equal(decoded(model, many, first=5), packed(model, many))


@torch.no_grad()
def test_logprobs_are_the_sequences_own(tiny: Build) -> None:
    model, many = tiny("qwen3_moe"), sequences()
    exact = Exact(model)
    with exact.forward():
        hidden = packed(model, many)
    targets = torch.cat([ids.roll(-1) for ids in many])
    mask = torch.arange(len(targets)) % 3 > 0
    whole, entropy = exact.logprobs(torch.cat(hidden)[None], targets, 0.7, mask)
    assert not whole[~mask].any()
    heat = torch.full((len(targets),), 0.7)
    singly = [
        exact.logprobs(row[None], target[None], heat[:1])
        for row, target in zip(torch.cat(hidden), targets, strict=True)
    ]
    assert torch.equal(torch.cat([logprob for logprob, _ in singly])[mask], whole[mask])
    assert torch.equal(torch.cat([value for _, value in singly])[mask], entropy[mask])
    logp = (exact.logits(torch.cat(hidden)).double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(whole[mask].double(), logp.gather(1, targets[:, None])[mask, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["glm4_moe_lite", "qwen3_moe"])
def test_gradients_are_the_usual_ones(tiny: Build, family: str) -> None:
    model, ids = tiny(family).train(), sequences()[0]
    replay = attach(model)
    with torch.no_grad(), replay.record() as recording:
        model.base_model(input_ids=ids[None], use_cache=False)

    def gradients(exact: Exact | None) -> dict[str, Tensor]:
        model.zero_grad()
        with replay.rows(recording.rows()):
            with contextlib.nullcontext() if exact is None else exact.forward():
                hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            logits = hidden @ model.get_output_embeddings().weight.t()
            loss: Any = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    usual = gradients(None)
    mine = gradients(Exact(model))
    assert mine.keys() == usual.keys()
    for name, gradient in usual.items():
        assert (mine[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_detach_leaves_the_model_as_it_was(tiny: Build) -> None:
    model, ids = tiny("glm4_moe_lite"), sequences()[0][None]
    before = model(ids, use_cache=False).logits, model.config._attn_implementation, model.config._experts_implementation
    exact = Exact(model)
    assert model.config._attn_implementation != before[1]
    exact.detach()
    assert torch.equal(model(ids, use_cache=False).logits, before[0])
    assert (model.config._attn_implementation, model.config._experts_implementation) == before[1:]


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("qwen3_next", {}, "got aten.convolution.default of"),
        ("glm_moe_dsa", {}, "have a weight on its right, got aten.bmm.default"),
        ("gpt_oss", {}, "got s_aux in GptOssAttention"),
        ("minimax", {}, "over a cache, got ValueError"),
        ("granitemoe", {"logits_scaling": 2.0}, "the output weight's alone, the model's are"),
    ],
)
def test_models_without_an_exact_form_are_refused_by_name(tiny: Build, family: str, fields: Any, reason: str) -> None:
    model = tiny(family, **fields)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=reason):
        Exact(model)
    assert model.config._attn_implementation == before


def test_every_operation_is_named(tiny: Build) -> None:
    """What docs/exact.md lists, of a GLM-4.7-Flash."""
    model = tiny("glm4_moe_lite")
    replay, exact = attach(model), Exact(model)
    ids = sequences()[0][None]
    with torch.no_grad(), exact.forward(), replay.record() as recording:
        hidden = model.base_model(ids, use_cache=False)[0]
    with torch.no_grad(), exact.forward(), replay.rows(recording.rows()):
        model.base_model(ids, use_cache=False)
    exact.logprobs(hidden, ids[0], 1.0)
    kinds: dict[str, set[str]] = {}
    for name, kind in exact.operations.items():
        kinds.setdefault(kind, set()).add(name)
    assert kinds["matmul by rows"] >= {"mm"}
    assert kinds["in pieces"] == {"cos", "pow", "rsqrt", "sigmoid", "silu", "sin"}
    assert kinds["in row tiles"] == {"mean", "sum", "topk"}
    assert kinds["one op"] == {"pacenote::invariant_attention", "pacenote::replay_topk", "linear_logprob"}
    assert kinds["rounded once"] >= {"add", "mul", "div", "index_add"}
