"""A fused router is the router that it stands in for, to the last bit: experts, probs, losses, gradients, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels.spec import FREE, PAD, REPLAY
from pacenote.replay.megatron import attach_megatron
from tests.replay.megatron.pair import ROUTERS, SOFTMAX, Pair, assert_alike, mixed, outcome
from tests.replay.megatron.single import BATCH, EXPERTS, LENGTH, TOKENS, ids, make, same, step

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.mark.parametrize("kind", ROUTERS)
def test_rows_of_every_fate_are_routed_as_without_fusion(kind: str) -> None:
    pair = Pair.of(**ROUTERS[kind])
    assert pair.replays[1].fused == pair.replays[1].layers == (1, 2, 3)
    assert pair.replays[0].fused == ()
    with pair.replays[1].record() as recording:  # outside of a scope: Megatron's own routing, and recorded
        native = step(pair.models[1])
    assert same(native, step(pair.models[0]))
    own = assert_alike(pair, recording.rows())
    assert same((own.losses, own.grads), native)
    assert own.audit["replayed"] == [TOKENS] * 3
    free = assert_alike(pair, (recording.rows(), torch.full((TOKENS,), FREE, dtype=torch.uint8)))
    assert same((free.losses, free.grads), native)
    found = assert_alike(pair, mixed(pair.replays[1]))
    assert min(found.audit["replayed"] + found.audit["free"] + found.audit["pad"] + found.audit["out_of_range"]) > 0
    assert not same((found.losses, found.grads), native)
    assert all(bool(found.grads[f"decoder.layers.{layer}.mlp.router.weight"].any()) for layer in (1, 2, 3))


REGIMES = ("as they are", "tied", "saturated")


@pytest.fixture(scope="module")
def regimes(one_process: Path) -> dict[tuple[str, str], Pair]:
    """Pairs of models whose experts' scores are as they are, equal in twos, or rounded to 0 and 1."""
    pairs = {}
    for kind in ("glm", "sigmoid", "softmax_pre", "softmax_post", "deepseek"):
        for regime in REGIMES:
            pairs[kind, regime] = pair = Pair.of(**ROUTERS[kind])
            for routers in pair.routers():
                for router in routers:
                    if regime == "tied":
                        router.weight.data[1::2] = router.weight.data[::2]
                    elif regime == "saturated":
                        router.weight.data *= 50
                    if router.expert_bias is not None and regime != "as they are":
                        router.expert_bias.zero_()
    return pairs


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(("glm", "sigmoid", "softmax_pre", "softmax_post", "deepseek")),
    regime=st.sampled_from(REGIMES),
    rows=st.lists(st.integers(-1, EXPERTS), min_size=64, max_size=64),
    states=st.lists(st.sampled_from((FREE, REPLAY, PAD)), min_size=TOKENS, max_size=TOKENS),
    seed=st.integers(0, 3),
)
def test_any_rows_and_states_are_routed_as_without_fusion(
    regimes: dict[tuple[str, str], Pair], kind: str, regime: str, rows: list[int], states: list[int], seed: int
) -> None:
    """Ties between scores are broken alike, also where the logits behind equal scores differ."""
    pair = regimes[kind, regime]
    k = pair.replays[0].top_k
    experts = torch.tensor(rows).repeat(TOKENS * 3 * k // len(rows) + 1)[: TOKENS * 3 * k].view(TOKENS, 3, k)
    assert_alike(pair, (experts, torch.tensor(states, dtype=torch.uint8)), tokens=ids(seed))


@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_reads_the_same_rows(recompute: dict[str, Any], mla: bool) -> None:
    pair = Pair.of(mla=mla, **recompute)
    kept = make(mla=mla)
    wanted = outcome(kept, attach_megatron(kept), mixed(pair.replays[0]))
    found = assert_alike(pair, mixed(pair.replays[1]))
    assert same((found.losses, found.grads), (wanted.losses, wanted.grads))
    assert str(found.audit) == str(wanted.audit)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.loads, wanted.loads, strict=True))


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["kept", "full"])
def test_one_forward_one_backward_in_one_process(recompute: dict[str, Any]) -> None:
    """The order of a pipeline's first stage, and forward-only passes before it."""
    from tests.replay.megatron import drive

    pair = Pair.of(**recompute)
    seen = []
    for model, replay in zip(pair.models, pair.replays, strict=True):
        work = [drive.sbhd(tokens, replay, replay.layers) for tokens in drive.tokens(4)]
        rows = [batch.rows for batch in work]
        with replay.rows(rows), torch.no_grad():
            scores = [(model(**batch.inputs) * batch.weights).sum() for batch in work]
        model.zero_grad()
        losses: list[Tensor] = []
        with replay.rows(rows):
            for number, batch in enumerate(work):
                losses.append((model(**batch.inputs) * batch.weights).sum())
                if number:
                    losses[number - 1].backward()  # type: ignore[no-untyped-call]
            losses[-1].backward()  # type: ignore[no-untyped-call]
        assert torch.equal(torch.stack(losses), torch.stack(scores))
        seen.append((torch.stack(losses).detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert same(*seen)


LOSSES: dict[str, dict[str, Any]] = {
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5},
    "seq_aux": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5},
    "global_aux": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5},
    "z": {"moe_z_loss_coeff": 0.5},
    "all_per_token": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.5, 0.3, 0.2],
        "moe_z_loss_coeff": 0.5,
        "calculate_per_token_loss": True,
    },
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "padding_mask"])
@pytest.mark.parametrize("kind", LOSSES)
def test_auxiliary_losses_are_megatrons_own(kind: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a padding mask under softmax, since Megatron cannot count for biases with one."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))  # a schedule's part
    pair = Pair.of(**LOSSES[kind], **(SOFTMAX if masked else {}))
    tracker, inputs = get_moe_metrics_tracker(), {}
    if masked:
        inputs["padding_mask"] = torch.arange(LENGTH).expand(BATCH, -1) >= LENGTH - 3
    reported = []
    for model, replay in zip(pair.models, pair.replays, strict=True):
        tracker.clear()
        outcome(model, replay, mixed(replay), **inputs)
        reported.append({name: entry.values.tolist() for name, entry in tracker.metrics.items()})
    assert reported[0] == reported[1]
    # The tracker knows the names of every loss it has ever seen.
    assert sum(any(values) for values in reported[0].values()) == (4 if kind == "all_per_token" else 1)
    found = assert_alike(pair, mixed(pair.replays[0]), **inputs)
    free_of_it = make(**(SOFTMAX if masked else {}))
    without = outcome(free_of_it, attach_megatron(free_of_it), mixed(pair.replays[0]))
    assert not all(torch.equal(found.grads[name], without.grads[name]) for name in without.grads)
    tracker.clear()


def test_deterministic_algorithms_and_autocast_change_nothing() -> None:
    pair = Pair.of()
    torch.use_deterministic_algorithms(True)
    try:
        assert_alike(pair, mixed(pair.replays[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(pair, mixed(pair.replays[0]))
