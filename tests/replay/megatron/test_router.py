"""Rows at megatron-core routers: replayed exactly, checked, counted, and padding left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels.pack import Routes
from pacenote.kernels.spec import FREE, PAD, REPLAY
from pacenote.replay.errors import ScopeError
from pacenote.replay.megatron import attach_megatron
from tests.replay.megatron.single import BATCH, EXPERTS, LENGTH, TOKENS, foreign, ids, make, same, step

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid_bias": {},
    "sigmoid": {"moe_router_enable_expert_bias": False},
    "sigmoid_top1": {"moe_router_topk": 1},
    "sigmoid_groups": {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "softmax_pre": {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
    "softmax_post": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": None,
    },
    "softmax_groups": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_topk": 4,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
    },
    "float64": {"moe_router_dtype": "fp64"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}


@pytest.fixture
def tiny(one_process: Path) -> Any:
    """A model whose routers are those of GLM-4.7-Flash."""
    return make()


def routing(model: Any, into: list[tuple[int, Tensor, Tensor]]) -> Iterator[Any]:
    """Keep (layer, probs [T, E], map [T, E]) of every router call."""
    from tests.replay.megatron.model import routers

    for layer, router in routers([model]).items():
        yield router.register_forward_hook(lambda _, __, out, layer=layer: into.append((layer, *out)))


@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_own_rows_are_exact_and_other_rows_are_obeyed(kind: str, mla: bool) -> None:
    model = make(mla=mla, **ROUTERS[kind])
    replay = attach_megatron(model)
    assert (replay.layers, replay.num_experts) == ((1, 2, 3), EXPERTS)
    with replay.record() as recording:
        before = step(model)
    rows = recording.rows()
    with replay.rows([rows]):
        assert same(step(model), before)
    audit = replay.audit(reset=True)
    assert audit["replayed"].tolist() == [TOKENS] * 3
    assert audit.total("flipped") == 0

    other, seen = foreign(replay), list[tuple[int, Tensor, Tensor]]()
    handles = list(routing(model, seen))
    with replay.rows([other]), replay.record() as replayed:
        losses, grads = step(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(replayed.rows(), other.int())
    for layer, probs, chosen in seen:
        wanted = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, other[:, layer - 1].long(), True)
        assert torch.equal(chosen, wanted)
        assert bool((probs[wanted] > 0).all())
        assert not bool(probs[~wanted].any())
    assert float((losses - before[0]).abs().max()) > 0.01
    assert replay.audit()["replayed"].tolist() == [TOKENS] * 3  # since the reset
    assert replay.audit().total("flipped") > 0
    # One sigmoid score, not renormalised, still has a gradient; gathered from masked scores it would have none.
    assert all(bool(grads[f"decoder.layers.{layer}.mlp.router.weight"].any()) for layer in replay.layers)


def test_bfloat16_parameters_replay_exactly() -> None:
    model = make(params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True).bfloat16()
    replay = attach_megatron(model)
    with replay.record() as recording:
        before = step(model)
    with replay.rows([recording.rows()]):
        assert same(step(model), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_rows_of_every_dtype_are_the_same_rows(tiny: Any, dtype: torch.dtype) -> None:
    replay = attach_megatron(tiny)
    rows = foreign(replay)
    with replay.rows([rows]):
        wanted = step(tiny)
    with replay.rows([Routes(rows=rows.to(dtype), state=torch.full((TOKENS,), REPLAY, dtype=torch.uint8))]):
        assert same(step(tiny), wanted)
    with replay.rows([rows.to(dtype).numpy()]):
        assert same(step(tiny), wanted)


def test_rows_that_cannot_be_replayed_are_routed_freely_and_counted(tiny: Any) -> None:
    replay = attach_megatron(tiny)
    native = step(tiny)
    rows = torch.full((TOKENS, 3, 2), -1, dtype=torch.int32)
    rows[1::4] = 0  # all-zero rows, as padding with zeros leaves them
    rows[2::4] = torch.tensor([1, EXPERTS], dtype=torch.int32)
    rows[3::4] = torch.tensor([5, -1], dtype=torch.int32)
    with replay.rows([rows]):
        assert same(step(tiny), native)
    audit = replay.audit()
    quarter = TOKENS // 4
    assert audit["duplicate"].tolist() == audit["out_of_range"].tolist() == [quarter] * 3
    assert audit["free"].tolist() == audit["missing"].tolist() == [2 * quarter] * 3
    free = torch.full((TOKENS,), FREE, dtype=torch.uint8)
    with replay.rows([(foreign(replay), free)]):
        assert same(step(tiny), native)


def test_padding_is_spread_without_weight_and_not_counted(tiny: Any) -> None:
    from tests.replay.megatron.model import routers

    replay, seen = attach_megatron(tiny), list[tuple[int, Tensor, Tensor]]()
    state = torch.full((TOKENS,), REPLAY, dtype=torch.uint8)
    state[TOKENS // 2 :] = PAD
    rows, handles = foreign(replay), list(routing(tiny, seen))
    biased = list(routers([tiny]).values())
    for router in biased:
        router.local_tokens_per_expert.zero_()
    with replay.rows([(rows, state)]):
        step(tiny)
    for handle in handles:
        handle.remove()
    pads = state == PAD
    for _, probs, chosen in seen:
        assert not bool(probs[pads].any())
        assert chosen[pads].sum(1).tolist() == [2] * int(pads.sum())  # dispatchers count on K a token
        assert float(chosen[pads].sum(0).float().std()) < 1.0  # spread, not an expert-parallel hot spot
    for router, layer in zip(biased, range(3), strict=True):
        wanted = torch.bincount(rows[~pads][:, layer].long().flatten(), minlength=EXPERTS)
        assert torch.equal(router.local_tokens_per_expert, wanted.float())
    assert replay.audit()["pad"].tolist() == [TOKENS // 2] * 3


@pytest.mark.parametrize("recompute", [False, True])
def test_padding_is_taken_out_of_counts_where_they_are_made(recompute: bool) -> None:
    """A checkpointed forward and an evaluation count nothing, so nothing is taken back after them."""
    from tests.replay.megatron.model import routers

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = make(**(full if recompute else {}))
    replay = attach_megatron(model)
    rows, state = foreign(replay), torch.tensor([REPLAY, PAD], dtype=torch.uint8).repeat(TOKENS // 2)
    for router in routers([model]).values():
        router.local_tokens_per_expert.zero_()
    with replay.rows([(rows, state)]):
        step(model)
    with torch.no_grad(), replay.rows([(rows, state)]):
        model(ids(), torch.arange(LENGTH).expand(BATCH, -1), None)
    for layer, router in enumerate(routers([model]).values()):
        wanted = torch.bincount(rows[::2, layer].long().flatten(), minlength=EXPERTS)
        assert torch.equal(router.local_tokens_per_expert, wanted.float())


def test_counts_of_biases_follow_the_replayed_map(tiny: Any) -> None:
    from tests.replay.megatron.model import routers

    replay = attach_megatron(tiny)
    rows = foreign(replay)
    for router in routers([tiny]).values():
        router.local_tokens_per_expert.zero_()
    with replay.rows([rows]):
        step(tiny)
    with torch.no_grad(), replay.rows([rows]):
        tiny(ids(), torch.arange(LENGTH).expand(BATCH, -1), None)  # evaluation counts nothing
    for layer, router in enumerate(routers([tiny]).values()):
        wanted = torch.bincount(rows[:, layer].long().flatten(), minlength=EXPERTS)
        assert torch.equal(router.local_tokens_per_expert, wanted.float())


def test_auxiliary_losses_are_of_the_own_choice_and_not_of_the_replayed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module says of them: Megatron computes them from the scores and its own top-k, replay or not."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))  # a schedule's part
    model = make(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.5)
    replay, tracker = attach_megatron(model), get_moe_metrics_tracker()

    def first_layer(rows: Tensor | None) -> dict[str, float]:
        tracker.clear()
        if rows is None:
            step(model)
        else:
            with replay.rows([rows]):
                step(model)
        said = {name: float(entry.values[1]) for name, entry in tracker.metrics.items()}
        return {name: value for name, value in said.items() if value}  # cleared losses of other models stay, as zeros

    own = first_layer(None)
    assert set(own) == {"load_balancing_loss", "z_loss"}
    assert min(own.values()) > 0
    assert first_layer(foreign(replay)) == own
    tracker.clear()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(BATCH, LENGTH, 3, 2, dtype=torch.uint8), "align"),
        (torch.zeros(TOKENS, 4, 2, dtype=torch.uint8), r"\[T, 3 layers of this rank, 2 experts\], got \[24, 4, 2\]"),
        (torch.zeros(TOKENS, 3, 2), "uint8, uint16, int32 or int64, got torch.float32"),
        ((torch.zeros(TOKENS, 3, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)), r"state .*\[24\]"),
        ((torch.zeros(TOKENS, 3, 2, dtype=torch.uint8), torch.full((TOKENS,), 7, dtype=torch.uint8)), "got 7"),
        ("rows", "tensor or array, got str"),
        (np.zeros((TOKENS, 3, 2), np.float64), "float64"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused_at_entry(tiny: Any, rows: Any, message: str) -> None:
    replay = attach_megatron(tiny)
    with pytest.raises(ScopeError, match=f"microbatch 0.*{message}|{message}"), replay.rows([rows]):
        raise AssertionError("not reached")
    native = step(tiny)
    replay.detach()
    assert same(step(tiny), native)


def test_more_than_256_experts_do_not_travel_in_a_byte() -> None:
    model = make(num_moe_experts=260, num_layers=2)
    replay = attach_megatron(model)
    rows = torch.tensor([[[258, 259]]]).expand(TOKENS, 1, 2)
    with (
        pytest.raises(ScopeError, match=r"uint16, int32 or int64, got torch\.uint8"),
        replay.rows([rows.to(torch.uint8)]),
    ):
        pass
    with replay.rows([rows.to(torch.uint16)]), replay.record() as recording:
        step(model)
    assert torch.equal(recording.rows(), rows.int())


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes a host wait for a device, and copies."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "_to_copy")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = dict.fromkeys(self.NAMES, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_replay_never_waits_and_copies_nothing_a_layer(tiny: Any) -> None:
    """Against the same step without a scope. Inside the definition of the op nothing is dispatched: it is one op."""
    replay = attach_megatron(tiny)
    state = torch.full((TOKENS,), REPLAY, dtype=torch.uint8)
    state[-1] = PAD
    with Waits() as native:
        step(tiny)
    with replay.rows([(foreign(replay), state)]), Waits() as counted:
        assert replay._step is not None
        assert replay._step._host[0].experts.is_contiguous()  # token-major rows are turned once, at entry
        step(tiny)
    assert sum(native.counts.values()) > 0
    assert counted.counts == native.counts
