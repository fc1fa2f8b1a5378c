"""Scopes refuse every misalignment, and attach and detach leave a model as they found it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pacenote.kernels.pack import Routes, pack
from pacenote.kernels.spec import FREE, REPLAY
from pacenote.replay.errors import ReplayError, ScopeError, UnsupportedModel
from pacenote.replay.hf import Replay, attach
from pacenote.replay.record import CACHED, DECODE, MISSING, PREFILL, RECOMPUTED, RoutingRecord
from pacenote.replay.scope import as_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

Build = Callable[..., Any]
BATCH, LENGTH, EXPERTS, TOP_K, LAYERS = 2, 6, 8, 2, 2
REPLAYED = torch.full((LENGTH,), REPLAY, dtype=torch.uint8)


@pytest.fixture
def model(tiny: Build) -> Any:
    return tiny("glm4_moe_lite")


@pytest.fixture
def replay(model: Any) -> Replay:
    return attach(model)


def ids(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.arange(3, 3 + batch * length).view(batch, length)


def rows(*lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*lead, LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].int()


def run(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("given", "tokens", "words"),
    [
        (rows(BATCH, LENGTH), ids(LENGTH, BATCH), r"input \[2, 6\].*got \[6, 2\].*swapped"),
        (rows(BATCH, LENGTH - 1), ids(), r"input \[2, 5\].*got \[2, 6\]"),
        (rows(BATCH * LENGTH), ids(), r"input \[1, 12\].*got \[2, 6\]"),
        (rows(LENGTH - 1), ids(1), r"input \[1, 5\].*got \[1, 6\]"),
        (rows(LENGTH), ids(LENGTH, 1), r"input \[1, 6\].*got \[6, 1\].*swapped"),
        (rows(1, 12), ids(3, 4), r"input \[1, 12\].*got \[3, 4\]"),
    ],
)
def test_rows_of_another_shape_than_the_input(
    model: Any, replay: Replay, given: Tensor, tokens: Tensor, words: str
) -> None:
    with pytest.raises(ScopeError, match=words), replay.rows(given):
        run(model, tokens)
    with replay.rows(rows(BATCH, LENGTH)):  # the failure left nothing behind
        run(model, ids())


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        (rows(LENGTH)[:, :1], None, r"2 layers, 2 experts\].*got \[6, 1, 2\]"),
        (rows(LENGTH)[..., :1], None, r"got \[6, 2, 1\]"),
        (rows(LENGTH)[0], None, r"got \[2, 2\]"),
        (rows(1, 2, 3), None, r"got \[1, 2, 3, 2, 2\]"),
        (rows(LENGTH).float(), None, "uint8, uint16, int32 or int64, got torch.float32"),
        (rows(LENGTH).to(torch.int8), None, "got torch.int8"),
        (rows(LENGTH).tolist(), None, "tensor or array, got list"),
        (None, None, "got NoneType"),
        (rows(LENGTH), torch.ones(5, dtype=torch.uint8), r"state \[6\] uint8.*got \[5\]"),
        (rows(LENGTH), torch.ones(6), "got .* torch.float32"),
        (rows(LENGTH), torch.full((6,), 3, dtype=torch.uint8), "state codes.*got 3"),
        (Routes(rows=rows(LENGTH), state=REPLAYED), REPLAYED, "no state beside"),
        (Routes(rows=rows(LENGTH), state=REPLAYED, num_experts=16), None, "over 8 experts, got 16"),
    ],
)
def test_rows_that_fit_no_input(replay: Replay, given: Any, state: Any, words: str) -> None:
    with pytest.raises(ScopeError, match=words), replay.rows(given, state):
        pytest.fail("the scope opened")


def test_uint8_rows_of_more_than_256_experts_are_refused(tiny: Build) -> None:
    replay = attach(tiny("qwen3_moe", num_experts=300))
    with pytest.raises(ScopeError, match="rows of 300 experts as uint16, int32 or int64, got"):
        replay.rows(rows(LENGTH).to(torch.uint8)).__enter__()


def test_a_scope_that_no_forward_read(replay: Replay) -> None:
    with pytest.raises(ScopeError, match="got none: these rows were not replayed"), replay.rows(rows(LENGTH)):
        pass


def test_an_exception_in_flight_is_not_replaced(replay: Replay) -> None:
    with pytest.raises(KeyError), replay.rows(rows(LENGTH)):
        raise KeyError


def test_nested_scopes(model: Any, replay: Replay) -> None:
    with replay.rows(rows(1, LENGTH)):
        with pytest.raises(ScopeError, match="nested"):
            replay.rows(rows(1, LENGTH)).__enter__()
        run(model, ids(1))
    with replay.record():
        with pytest.raises(ScopeError, match="nested"):
            replay.record().__enter__()
        run(model, ids(1))


def test_several_forwards_in_one_scope_read_the_same_rows(model: Any, replay: Replay) -> None:
    with replay.rows(rows(BATCH, LENGTH)):
        first, second = run(model, ids()), run(model, ids())
    assert torch.equal(first, second)
    assert replay.audit()["replayed"].tolist() == [2 * BATCH * LENGTH] * LAYERS


def test_a_router_that_goes_round_its_hook_is_noticed(model: Any, replay: Replay) -> None:
    """As a fused kernel does: replay would be silently off in that layer."""
    gate = model.model.layers[2].mlp.gate
    gate.__dict__["_forward_hooks"] = {}
    with pytest.raises(ScopeError, match=r"layers \[2\] did not"), replay.rows(rows(BATCH, LENGTH)):
        run(model, ids())


def test_a_layer_that_runs_twice_is_noticed(model: Any, replay: Replay) -> None:
    def twice(module: nn.Module, args: Any, kwargs: Any) -> None:
        module.forward(*args, **kwargs)

    model.model.layers[2].register_forward_pre_hook(twice, with_kwargs=True)
    with pytest.raises(ScopeError, match="one read of layer 2"), replay.rows(rows(BATCH, LENGTH)):
        run(model, ids())


def test_backward_of_a_checkpointed_model_outside_of_the_scope(model: Any, replay: Replay) -> None:
    """It would recompute with the native routing: silently wrong gradients."""
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with replay.rows(rows(BATCH, LENGTH)):
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    with pytest.raises(ScopeError, match="backward inside the scope"):
        loss.backward()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()  # native passes are nobody's business


def test_embeddings_instead_of_ids(model: Any, replay: Replay) -> None:
    embedded = model.get_input_embeddings()(ids()).detach()
    with replay.rows(rows(BATCH, LENGTH)):
        by_ids = run(model, ids())
    with replay.rows(rows(BATCH, LENGTH)), torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, by_ids)
    with pytest.raises(ScopeError, match=r"got \[2, 6\]"), replay.rows(rows(LENGTH)):
        model(inputs_embeds=embedded, use_cache=False)


def test_the_base_model_may_be_called_or_attached(model: Any) -> None:
    replay = attach(model.model)
    with replay.rows(rows(BATCH, LENGTH)), replay.record() as used, torch.no_grad():
        model.model(ids(), use_cache=False)
    assert torch.equal(used.rows(), rows(BATCH, LENGTH))


def test_routes_of_a_packed_batch(model: Any, replay: Replay) -> None:
    state = torch.tensor([REPLAY] * 5 + [FREE], dtype=torch.uint8)
    with replay.rows(Routes(rows=rows(LENGTH).to(torch.uint8), state=state)), replay.record() as used:
        run(model, ids(1))
    assert torch.equal(used.rows()[0, :5], rows(LENGTH)[:5])
    assert replay.audit()["free"].tolist() == [1] * LAYERS


@dataclass(frozen=True)
class Sample:
    """As kernels.pack.Sample."""

    tokens: Any
    loss_mask: Any
    logprobs: Any
    experts: Any
    provenance: Any
    version: Any
    num_experts: int


def sample(length: int, seed: int) -> Sample:
    given = rows(length - 1).roll(seed, 0).numpy().astype(np.uint8)
    return Sample(
        tokens=np.arange(3 + seed, 3 + seed + length, dtype=np.int32),
        loss_mask=np.ones(length, dtype=np.uint8),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        experts=given,
        provenance=np.full(length - 1, DECODE, dtype=np.uint8),
        version=np.zeros(length, dtype=np.int32),
        num_experts=EXPERTS,
    )


def test_a_packed_batch_replays_each_sample_as_if_alone(model: Any, replay: Replay) -> None:
    samples = [sample(7, 0), sample(4, 2)]
    batch = pack(samples, pad_to_multiple=8)
    assert batch.padding > 0
    with torch.no_grad(), replay.rows(batch.routes), replay.record() as used:
        packed = model(**batch.inputs).logits[0]
    audit = replay.audit(reset=True)
    assert audit["replayed"].tolist() == [9] * LAYERS
    assert audit["pad"].tolist() == [batch.padding] * LAYERS
    start = 0
    for one in samples:
        stop = start + len(one.tokens) - 1
        assert np.array_equal(used.rows()[0, start:stop].numpy(), one.experts)
        with replay.rows(one.experts):
            alone = run(model, torch.from_numpy(one.tokens[:-1]).long()[None])[0]
        torch.testing.assert_close(packed[start:stop], alone, atol=2e-5, rtol=0)
        start = stop


def test_layer_major_rows_are_not_copied(replay: Replay) -> None:
    stored = torch.zeros(LAYERS, LENGTH, TOP_K, dtype=torch.uint8)
    made = as_rows(Routes(rows=stored.permute(1, 0, 2), state=REPLAYED), None, replay.geometry)
    assert made.experts.data_ptr() == stored.data_ptr()


def test_a_record_decides_by_provenance(model: Any, replay: Replay) -> None:
    provenance = np.array([PREFILL, DECODE, CACHED, MISSING, RECOMPUTED, DECODE], dtype=np.uint8)
    record = RoutingRecord.of(rows(LENGTH).numpy(), replay.geometry, provenance=provenance, version=0)
    with replay.rows(record), replay.record() as used:
        run(model, ids(1))
    assert torch.equal(used.rows()[0, [0, 1, 2, 5]], rows(LENGTH)[[0, 1, 2, 5]])
    assert replay.audit()["free"].tolist() == [2] * LAYERS
    with pytest.raises(ScopeError, match=r"input \[1, 6\].*got \[1, 7\]"), replay.rows(record):
        run(model, ids(1, 7))  # N tokens have N-1 rows: the last token is no input
    with pytest.raises(ScopeError, match="no state beside RoutingRecord"):
        replay.rows(record, torch.ones(6, dtype=torch.uint8)).__enter__()
    other = RoutingRecord(
        experts=record.experts, provenance=provenance, version=record.version, layers=(0, 1), num_experts=EXPERTS
    )
    with pytest.raises(ScopeError, match=r"expected a record of .*\(1, 2\).*got .*\(0, 1\)"):
        replay.rows(other).__enter__()


def test_recording_keeps_the_last_forward_only(model: Any, replay: Replay) -> None:
    with replay.record() as first:
        run(model, ids())
    with replay.record() as both:
        run(model, ids(1, 3))
        run(model, ids())
    assert torch.equal(both.rows(), first.rows())
    assert both.rows().dtype == torch.int32
    assert replay.audit().total("replayed") == 0  # recording alone counts nothing


def test_recomputation_does_not_overwrite_a_recording(model: Any, replay: Replay) -> None:
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with replay.record() as recording:
        loss = model(input_ids=ids(1, 3), labels=ids(1, 3), use_cache=False).loss
        run(model, ids())
        last = recording.rows()
        loss.backward()
    assert torch.equal(recording.rows(), last)


def test_recording_nothing(model: Any, replay: Replay) -> None:
    with replay.record() as recording:
        pass
    run(model, ids())  # after the block, so not recorded
    with pytest.raises(ScopeError, match="nothing is recorded"):
        recording.rows()


def test_recording_a_decode_step_with_a_cache(model: Any, replay: Replay) -> None:
    tokens = ids(2, 5)
    with replay.record() as whole:
        run(model, tokens)
    with torch.no_grad():
        with replay.record() as prompt:
            cache = model(input_ids=tokens[:, :4], use_cache=True).past_key_values
        with replay.record() as decoded:
            model(input_ids=tokens[:, 4:], past_key_values=cache, use_cache=True)
    assert decoded.rows().shape == (2, 1, LAYERS, TOP_K)
    joined = torch.cat([prompt.rows(), decoded.rows()], dim=1)
    assert torch.equal(joined.sort(-1).values, whole.rows().sort(-1).values)


def test_attaching_changes_nothing_and_detaching_restores(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    before, generator = run(model, ids()), torch.random.get_rng_state()
    replay = attach(model)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.equal(run(model, ids()), before)
    with replay.rows(rows(BATCH, LENGTH)):
        assert not torch.equal(run(model, ids()), before)
    replay.detach()
    assert torch.equal(run(model, ids()), before)
    assert [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    replay.detach()
    with pytest.raises(ScopeError, match="was detached"):
        replay.rows(rows(BATCH, LENGTH)).__enter__()
    attach(model).detach()


def test_one_attachment_a_model(model: Any, replay: Replay) -> None:
    with pytest.raises(ReplayError, match="detach\\(\\) the other"):
        attach(model)
    with replay.record():
        with pytest.raises(ScopeError, match="leave it first"):
            replay.detach()
        run(model, ids())


def test_models_do_not_share_a_scope(tiny: Build, model: Any, replay: Replay) -> None:
    reference = copy.deepcopy(model)  # hooks and all: its copy of the Replay has no scope open
    other = tiny("qwen3_moe", seed=5)
    other_replay = attach(other)
    plain = run(reference, ids()), run(other, ids())
    with replay.rows(rows(BATCH, LENGTH)):
        run(model, ids())
        assert torch.equal(run(reference, ids()), plain[0])
        assert torch.equal(run(other, ids()), plain[1])
        with other_replay.rows(rows(1, LENGTH)):
            run(other, ids(1))
    assert replay.audit().total("replayed") == BATCH * LENGTH * LAYERS
    assert other_replay.audit().total("replayed") == LENGTH * LAYERS


def test_the_audit_resets(model: Any, replay: Replay) -> None:
    with replay.rows(rows(BATCH, LENGTH)):
        run(model, ids())
    first = replay.audit(reset=True)
    assert first.total("replayed") == BATCH * LENGTH * LAYERS
    assert first.layers == replay.layers == (1, 2)
    empty = replay.audit()
    assert empty.total("replayed") == 0
    assert np.isnan(empty.margin).all()


def test_margins_are_means_over_flipped_rows(model: Any, replay: Replay) -> None:
    margins = []
    for times in (1, 2):
        for _ in range(times):
            with replay.rows(rows(BATCH, LENGTH)):
                run(model, ids())
        audit = replay.audit(reset=True)
        assert (audit["flipped"] > 0).all()
        assert (audit.margin > 0).all()
        margins.append(audit.margin)
    assert np.allclose(margins[0], margins[1], rtol=1e-6)


def test_overlap_counts_shared_experts(model: Any, replay: Replay) -> None:
    with replay.record() as recording:
        run(model, ids())
    native, given = recording.rows(), rows(BATCH, LENGTH)
    with replay.rows(given):
        run(model, ids())
    shared = (native[:, :, 0, :, None] == given[:, :, 0, None, :]).any(-1).sum()  # later layers see other inputs
    flipped = (native[:, :, 0].sort(-1).values != given[:, :, 0].sort(-1).values).any(-1).sum()
    assert int(replay.audit()["overlap"][0]) == int(shared)
    assert int(replay.audit()["flipped"][0]) == int(flipped)


def _altered(gate: Any, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give one router module another forward, as another family or version would have."""
    forward = gate.forward
    gate.forward = lambda hidden: change(*forward(hidden))


def _louder(logits: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return logits, weights * 1.01, experts


def _worst(logits: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts = logits.topk(TOP_K, largest=False).indices
    scores = logits.sigmoid().gather(1, experts)
    return logits, scores / (scores.sum(-1, keepdim=True) + 1e-20) * 1.8, experts


def _pair(logits: Tensor, weights: Tensor, experts: Tensor) -> Any:
    return logits, weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_louder, r"layer 2 \(Glm4MoeLiteTopkRouter\) to weigh experts .* differ by 0.0"),
        (_worst, r"layer 2 \(Glm4MoeLiteTopkRouter\) to choose experts .* of its choices differ"),
        (_pair, r"layer 2 to return logits, weights and experts .* got \[\(64, 8\), \(64, 2\)\]"),
    ],
)
def test_the_self_check_refuses_a_router_unlike_its_spec(model: Any, change: Any, words: str) -> None:
    _altered(model.model.layers[2].mlp.gate, change)
    with pytest.raises(UnsupportedModel, match=words):
        attach(model)
    assert not model.model._forward_pre_hooks


def test_the_self_check_sees_a_config_that_lies(model: Any) -> None:
    model.config.routed_scaling_factor = 2.0
    with pytest.raises(UnsupportedModel, match=r"scale=2\.0"):
        attach(model)


def test_routers_must_be_where_the_config_says(model: Any) -> None:
    model.config.mlp_layer_types = ["sparse"] * 3
    with pytest.raises(UnsupportedModel, match=r"layers \(0, 1, 2\) of the config, got \{1: 1, 2: 1\}"):
        attach(model)


def test_what_cannot_be_attached(tiny: Build) -> None:
    with pytest.raises(UnsupportedModel, match="with a config, got Linear"):
        attach(nn.Linear(2, 2))
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))
    with pytest.raises(UnsupportedModel, match="got 'llama'"):
        attach(dense)
    with pytest.raises(UnsupportedModel, match="meta device"):
        attach(tiny("glm4_moe_lite").to("meta"))


def test_zero_and_huge_router_weights_pass_the_self_check(tiny: Build) -> None:
    """All logits equal, or scores saturated: ties, which are no difference."""
    for factor in (0.0, 1e4):
        model = tiny("glm4_moe_lite")
        for index in (1, 2):
            gate = model.model.layers[index].mlp.gate
            gate.weight.data.mul_(factor)
            gate.e_score_correction_bias.zero_()
        attach(model).detach()
