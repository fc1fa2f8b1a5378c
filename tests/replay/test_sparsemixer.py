"""Phi-3.5-MoE, whose routers draw experts at random in training: inside a scope or a recording they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.kernels.spec import FREE, PAD, REPLAY
from pacenote.replay.errors import ScopeError
from pacenote.replay.hf import attach
from tests.replay.conftest import Build

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

BATCH, LENGTH, EXPERTS, TOP_K = 2, 12, 16, 2
TOKENS = torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one forward and backward pass."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Bit for bit."""
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def foreign(layers: int) -> Tensor:
    """Valid rows [B, S, L, K] int32 that no router chose."""
    shape = (BATCH, LENGTH, layers, EXPERTS)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :TOP_K].int()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest, tiny: Build) -> Iterator[Any]:
    """A tiny model whose logits are close together, so that experts are drawn and weights are not all 1."""
    model = tiny("phimoe", dtype=request.param, router_jitter_noise=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield model


def test_attaching_draws_nothing(model: Any) -> None:
    """The routers are tried as in evaluation."""
    model.train()
    state = torch.get_rng_state()
    attach(model).detach()
    assert torch.equal(torch.get_rng_state(), state)


def test_attaching_leaves_every_module_in_its_mode(tiny: Build) -> None:
    model = tiny("ernie4_5_moe").train()
    statics = [module for name, module in model.named_modules() if name.endswith(".moe_statics")]
    assert statics
    statics[0].eval()
    modes = [module.training for module in model.modules()]
    attach(model).detach()
    assert [module.training for module in model.modules()] == modes


def test_training_replays_as_evaluation_does(model: Any) -> None:
    """Recorded, foreign, free and padding rows: the same logits and gradients in both modes, and in any order."""
    replay = attach(model)
    with replay.record() as recording:
        native = step(model)
    rows, other = recording.rows(), foreign(len(replay.layers))
    states = torch.tensor([REPLAY, FREE, REPLAY, PAD] * (BATCH * LENGTH // 4), dtype=torch.uint8).view(BATCH, LENGTH)
    cases = ((rows, None), (torch.full_like(rows, -1), None), (other, None), (other, states))
    outs: list[list[tuple[Tensor, dict[str, Tensor]]]] = []
    for train in (False, True):
        model.train(train)
        outs.append([])
        for given, state in cases:
            with replay.rows(given, state):
                outs[-1].append(step(model))
    assert all(same(a, b) for a, b in zip(*outs, strict=True))
    assert same(outs[0][0], native)
    assert same(outs[0][1], native)
    assert len({float(out[0].float().sum()) for out in outs[0]}) == 3
    counts = replay.audit()
    per_pass = BATCH * LENGTH * len(replay.layers)
    names = ("replayed", "free", "missing", "pad")
    assert [counts.total(name) for name in names] == [5 * per_pass, 2.5 * per_pass, 2 * per_pass, per_pass / 2]


def test_what_is_recorded_in_training_can_be_replayed(model: Any) -> None:
    replay = attach(model)
    native = step(model)
    model.train()
    assert not torch.equal(step(model)[0], step(model)[0]), "the module draws"
    with replay.record() as recording:
        recorded = step(model)
    assert same(recorded, native)
    with replay.rows(recording.rows()):
        assert same(step(model), native)
    replay.detach()
    assert not torch.equal(step(model)[0], step(model)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny: Build, reentrant: bool) -> None:
    model = tiny("phimoe", router_jitter_noise=0.2)
    replay = attach(model)
    native = step(model)
    rows = foreign(len(replay.layers))
    with replay.rows(rows):
        plain = step(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with replay.rows(rows):
        assert same(step(model), plain)
    with replay.record():
        assert same(step(model), native)
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    with pytest.raises(ScopeError, match=r"or record\(\), open over backward"):
        loss.backward()


def test_a_weight_far_below_the_best_is_not_zero(tiny: Build) -> None:
    """The worst two experts of every token: softmax over all that are better, and gradients reach the routers."""
    model = tiny("phimoe")
    replay = attach(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, out: seen.append((out[0], out[1])))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
        rows = torch.stack([logits.argsort(-1)[:, :TOP_K].view(BATCH, LENGTH, TOP_K) for logits, _ in seen], dim=2)
    seen.clear()
    with replay.rows(rows):
        _, grads = step(model)
    logits, weights = seen[0]
    wanted = logits.gather(1, rows[:, :, 0].reshape(-1, TOP_K)).exp() / logits.exp().sum(1, keepdim=True)
    wanted[:, 1] /= 1 - wanted[:, 0]  # without the first
    torch.testing.assert_close(weights, wanted)
    assert bool((weights > 0).all())
    routers = [gradient for name, gradient in grads.items() if ".router." in name]
    assert len(routers) == len(replay.layers)
    assert all(bool(gradient.any()) for gradient in routers)
