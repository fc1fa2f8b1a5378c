"""GLM-4.7-Flash in transformers and in megatron-core: one set of weights, one set of rows, one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.replay.errors import ReplayError
from pacenote.replay.hf import attach
from pacenote.replay.megatron import attach_megatron
from pacenote.replay.megatron_weights import MLA_NORM_EPS, to_megatron, to_transformers

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

BATCH, LENGTH, VOCAB = 2, 24, 64
Build = Callable[..., Any]


def pair(build: Build) -> tuple[Any, Any]:
    """A tiny GLM-4.7-Flash in transformers, and the same model in megatron-core."""
    from tests.replay.megatron import model

    theirs = build("glm4_moe_lite", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    fields = theirs.config
    settings = model.config(
        mla=True,
        num_layers=fields.num_hidden_layers,
        num_attention_heads=fields.num_attention_heads,
        ffn_hidden_size=fields.intermediate_size,
        moe_ffn_hidden_size=fields.moe_intermediate_size,
        moe_shared_expert_intermediate_size=fields.moe_intermediate_size * fields.n_shared_experts,
        moe_router_topk_scaling_factor=fields.routed_scaling_factor,
        layernorm_epsilon=fields.rms_norm_eps,
        q_lora_rank=fields.q_lora_rank,
        kv_lora_rank=fields.kv_lora_rank,
        qk_head_dim=fields.qk_nope_head_dim,
        qk_pos_emb_head_dim=fields.qk_rope_head_dim,
        v_head_dim=fields.v_head_dim,
    )
    ours = model.build(settings, vocab=VOCAB)
    missing, unexpected = ours.load_state_dict(to_megatron(theirs.state_dict()), strict=False)
    assert (unexpected, [name for name in missing if not name.endswith("_extra_state")]) == ([], [])
    for layer in ours.decoder.layers:
        layer.self_attention.q_layernorm.eps = layer.self_attention.kv_layernorm.eps = MLA_NORM_EPS
    return theirs, ours


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def megatron_logits(model: Any) -> Tensor:
    logits: Tensor = model(ids(), torch.arange(LENGTH).expand(BATCH, -1), None)
    return logits


def test_logits_routes_and_gradients_are_equal(tiny: Build) -> None:
    theirs, ours = pair(tiny)
    outer, inner = attach(theirs), attach_megatron(ours)
    assert (outer.layers, inner.layers) == ((1, 2), (1, 2))
    # Megatron casts the weights to the dtype of the logits; with float32 routers the two are one spec.
    assert (outer.spec.score, outer.spec.scale, outer.spec.eps) == (inner.spec.score, inner.spec.scale, inner.spec.eps)
    with torch.no_grad(), outer.record() as one, inner.record() as other:
        wanted, got = theirs(input_ids=ids(), use_cache=False).logits, megatron_logits(ours)
    assert float((wanted - got).abs().max()) < 1e-5
    assert torch.equal(one.rows().sort(-1).values, by_sequence(other.rows()).sort(-1).values)

    rows = torch.rand(BATCH, LENGTH, 2, 8, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :2]
    with outer.rows(rows.to(torch.uint8)):
        wanted = theirs(input_ids=ids(), use_cache=False).logits
        loss(wanted).backward()
    with inner.rows([rows.transpose(0, 1).flatten(0, 1).to(torch.uint8)]):
        got = megatron_logits(ours)
        loss(got).backward()
    assert float((wanted - got).abs().max()) < 1e-5
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in to_megatron(gradients).items():
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-5)
    assert bool(gradients["model.layers.1.mlp.gate.weight"].any())


def by_sequence(rows: Tensor) -> Tensor:
    """[B, S, L, K] of Megatron's [S B, L, K]."""
    return rows.view(LENGTH, BATCH, *rows.shape[1:]).transpose(0, 1)


def loss(logits: Tensor) -> Any:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())


def test_the_way_there_and_back_changes_no_bit(tiny: Build) -> None:
    theirs, ours = pair(tiny)
    state = theirs.state_dict()
    back = to_transformers(ours.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("convert", "names", "message"),
    [
        (to_megatron, ["model.layers.0.mlp.gate_proj.weight"], "up_proj.weight beside"),
        (to_megatron, ["model.layers.0.mlp.up_proj.weight"], "got model.layers.0.mlp.up_proj.weight"),
        (to_megatron, ["model.layers.0.self_attn.q_proj.weight"], "Glm4MoeLite"),
        (to_transformers, ["decoder.layers.0.self_attention.linear_qkv.weight"], "to_megatron names them"),
        (to_transformers, ["decoder.layers.1.mlp.experts.local_experts.4.linear_fc1.weight"], "all experts"),
    ],
)
def test_other_weights_are_refused(convert: Any, names: list[str], message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        convert({name: torch.zeros(2, 2) for name in names})
