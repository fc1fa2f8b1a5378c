"""Microbatches of a step: every pass reads its own rows, forward and recomputed, exactly once, or is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pacenote.kernels.layout import Layout
from pacenote.kernels.pack import Routes, pack
from pacenote.replay.errors import ScopeError
from pacenote.replay.megatron import MegatronReplay, attach_megatron
from pacenote.replay.megatron_step import Microbatch

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron"),
]

LAYERS = (1, 2, 3)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
Grads = dict[str, Tensor]


def make(**fields: Any) -> tuple[Any, MegatronReplay]:
    from tests.replay.megatron import model

    built = model.build(model.config(**fields))
    return built, attach_megatron(built)


def batches(replay: MegatronReplay, count: int) -> list[Any]:
    """Microbatches whose rows name their tokens, so that no two have the same."""
    from tests.replay.megatron import drive

    return [drive.sbhd(ids, replay, LAYERS) for ids in drive.tokens(count)]


def grads(model: Any) -> Grads:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def equal(a: Grads, b: Grads) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def forward(model: Any, batch: Any) -> Any:
    """The loss of one pass."""
    return (model(**batch.inputs) * batch.weights).sum()


def inside(replay: MegatronReplay, work: list[Any], *calls: Callable[[], Any]) -> None:
    """Make the calls in one scope with the rows of the batches."""
    with replay.rows([batch.rows for batch in work]):
        for call in calls:
            call()


@pytest.mark.parametrize("recompute", [FULL, BLOCK, SELECTIVE], ids=["full", "block", "selective"])
def test_recomputation_reads_the_same_rows(one_process: Path, recompute: dict[str, Any]) -> None:
    """Megatron's schedule without pipelining; to the last bit the gradients of the model that keeps everything."""
    from tests.replay.megatron import drive

    plain, plain_replay = make()
    wanted = drive.step([plain], batches(plain_replay, 3), plain_replay)
    model, replay = make(**recompute)
    model.train()
    assert drive.step([model], batches(replay, 3), replay) == wanted
    assert equal(grads(model), grads(plain))
    audit, once = replay.audit(), plain_replay.audit()
    assert audit["replayed"].tolist() == once["replayed"].tolist() == [3 * 32] * 3
    assert audit["flipped"].tolist() == once["flipped"].tolist()


def test_recomputation_without_its_rows_would_differ() -> None:
    """The test above can fail: another microbatch's rows in backward give other gradients."""
    model, replay = make(**FULL)
    first, second = batches(replay, 2)
    with replay.rows([first.rows]):
        forward(model, first).backward()
    wanted = grads(model)
    model.zero_grad()
    with pytest.raises(ScopeError, match="recomputation"), replay.rows([first.rows]):
        loss = forward(model, first)
    model.zero_grad()
    with replay.rows([second.rows, second.rows]):  # the second scope's rows reach the first one's backward
        forward(model, second).backward()
        forward(model, second)
        replay._step.passes[0].backward_starts(1)  # type: ignore[union-attr]
        loss.backward()
    assert not equal(grads(model), wanted)


@pytest.mark.parametrize("recompute", [{}, FULL, SELECTIVE], ids=["kept", "full", "selective"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_backward_passes_may_come_in_any_order(recompute: dict[str, Any], order: tuple[int, ...]) -> None:
    """Autograd says which microbatch runs backward, so no order is assumed of it."""
    model, replay = make(**recompute)
    work = batches(replay, 3)
    wanted: Grads = {}
    for number in order:
        with replay.rows([work[number].rows]):
            forward(model, work[number]).backward()
    wanted = grads(model)
    model.zero_grad()
    with replay.rows([batch.rows for batch in work]):
        losses = [forward(model, batch) for batch in work]
        for number in order:
            losses[number].backward()
    assert equal(grads(model), wanted)


def test_one_backward_over_several_microbatches_is_right() -> None:
    """Autograd runs the later pass to its end before the earlier one, even where a loss entangles their outputs."""

    def entangled(model: Any, work: list[Any]) -> Any:
        first, second = (model(**batch.inputs) for batch in work)
        return (first * second).mean()

    def summed(model: Any, work: list[Any]) -> Any:
        return sum(forward(model, batch) for batch in work)

    def backward(loss: Callable[[Any, list[Any]], Any], model: Any, work: list[Any]) -> None:
        loss(model, work).backward()

    for loss in (summed, entangled):
        plain, plain_replay = make()
        work = batches(plain_replay, 2)
        inside(plain_replay, work, partial(backward, loss, plain, work))
        model, replay = make(**FULL)
        inside(replay, work, partial(backward, loss, model, work))
        assert equal(grads(model), grads(plain))


def test_a_backward_pass_that_was_cut_off_stops_the_next() -> None:
    model, replay = make(**FULL)
    work = batches(replay, 2)
    failing = model.decoder.layers[1].mlp.router

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    def cut_off() -> None:
        losses = [forward(model, batch) for batch in work]
        handle = failing.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            losses[0].backward()
        handle.remove()
        losses[1].backward()

    with pytest.raises(ScopeError, match="chunk 0, microbatch 0 to end before that of microbatch 1"):
        inside(replay, work, cut_off)


def test_a_second_backward_pass_is_refused() -> None:
    """Gradients of one recomputation twice over are what no step wants, and rows count once."""
    model, replay = make(**FULL)
    [work] = batches(replay, 1)

    def twice() -> None:
        loss = model(**{**work.inputs, "labels": None}).square().mean()  # Megatron's own loss overwrites its logits
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(ScopeError, match="one recomputation of chunk 0, microbatch 0, layer 3, got two"):
        inside(replay, [work], twice)


def test_forward_only_passes_leave_nothing_behind() -> None:
    """Scoring before a step, through the schedule: nothing of it reaches the next backward pass."""
    from tests.replay.megatron import drive

    model, replay = make(**FULL)
    work = batches(replay, 3)
    wanted = drive.step([model], work, replay)
    expected = grads(model)
    for _ in range(2):
        with torch.no_grad():
            assert drive.step([model], work[::-1], replay, forward_only=True) == wanted[::-1]
    assert drive.step([model], work, replay) == wanted
    assert equal(grads(model), expected)
    model.eval()
    assert drive.step([model], work, replay, forward_only=True) == wanted


def test_a_pass_that_is_missing_is_named() -> None:
    model, replay = make()
    work = batches(replay, 3)
    with pytest.raises(ScopeError, match=r"missing: chunk 0: forward passes of microbatches \[2\]"):
        inside(replay, work, *(lambda batch=batch: forward(model, batch).backward() for batch in work[:2]))
    with pytest.raises(ScopeError, match=r"forward passes of microbatches \[0, 1, 2\]"):
        inside(replay, work)


def test_a_pass_too_many_is_refused() -> None:
    model, replay = make()
    [work] = batches(replay, 1)
    with pytest.raises(ScopeError, match=r"expected 1 forward passes of chunk 0.*one more"):
        inside(replay, [work], *[lambda: forward(model, work).backward()] * 2)


def test_backward_outside_the_scope_is_refused_by_chunk_microbatch_and_layer() -> None:
    model, replay = make(**FULL)
    first, second = work = batches(replay, 2)
    wanted = r"missing: chunk 0, microbatch 1: recomputation of layers \[1, 2, 3\] in backward"
    with pytest.raises(ScopeError, match=wanted):
        inside(replay, work, lambda: forward(model, first).backward(), lambda: forward(model, second))
    model, replay = make()  # nothing is recomputed: backward needs no rows
    with replay.rows([first.rows]):
        loss = forward(model, first)
    loss.backward()


def test_checkpoints_of_torch_are_followed_and_refused_likewise() -> None:
    """They keep a graph while they run forward, so that only backward shows that they recompute."""
    plain, plain_replay = make()
    [work] = batches(plain_replay, 1)
    inside(plain_replay, [work], lambda: forward(plain, work).backward())
    model, replay = make()
    for layer in model.decoder.layers[1:]:
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)
    inside(replay, [work], lambda: forward(model, work).backward())
    assert equal(grads(model), grads(plain))
    assert replay.audit()["replayed"].tolist() == [32] * 3
    with replay.rows([work.rows]):
        loss = forward(model, work)
    with pytest.raises(ScopeError, match="layer 3 is recomputed after its scope closed"):
        loss.backward()
    forward(model, work).backward()  # outside of scopes from beginning to end: Megatron's own routing


def test_a_router_that_is_asked_outside_of_a_pass_is_refused() -> None:
    model, replay = make()
    [work] = batches(replay, 1)
    router, hidden = model.decoder.layers[2].mlp.router, torch.randn(16, 2, 32)
    with pytest.raises(ScopeError, match="chunk 0, layer 2 to route inside a forward pass"):
        inside(replay, [work], lambda: forward(model, work).backward(), lambda: router(hidden))
    with torch.no_grad(), pytest.raises(ScopeError, match="inside a forward pass"):
        inside(replay, [work], lambda: router(hidden))


def test_a_router_that_is_not_reached_or_reached_twice_is_named() -> None:
    model, replay = make()
    [work] = batches(replay, 1)
    layers = model.decoder.layers
    mlp, layers[2].mlp = layers[2].mlp, layers[0].mlp
    with pytest.raises(ScopeError, match=r"none from chunk 0, microbatch 0, layers \[2\]"):
        inside(replay, [work], lambda: forward(model, work))
    layers[2].mlp = layers[3].mlp = mlp
    with pytest.raises(ScopeError, match="got two: chunk 0, microbatch 0, layer 2"):
        inside(replay, [work], lambda: forward(model, work))


def test_the_wrong_number_of_tokens_is_named_by_chunk_microbatch_and_layer() -> None:
    model, replay = make()
    first, second = batches(replay, 2)
    short = replace(second, rows=Routes(rows=second.rows.rows[:-1], state=second.rows.state[:-1]))
    with pytest.raises(ScopeError, match="expected 31 tokens, one a row, at chunk 0, microbatch 1, layer 1, got 32"):
        inside(replay, [first, short], lambda: forward(model, first), lambda: forward(model, second))


def test_an_error_in_the_block_passes_and_the_next_scope_works() -> None:
    from tests.replay.megatron import drive

    model, replay = make(**FULL)
    work = batches(replay, 2)
    wanted = drive.step([model], work, replay)
    with pytest.raises(ZeroDivisionError):
        inside(replay, work, lambda: forward(model, work[0]), lambda: 1 // 0)
    assert drive.step([model], work, replay) == wanted


def test_scopes_do_not_nest_and_detach_waits_for_them() -> None:
    model, replay = make()
    [work] = batches(replay, 1)
    with replay.rows([work.rows]):
        with pytest.raises(ScopeError, match="nested"), replay.rows([work.rows]):
            pass
        with pytest.raises(ScopeError, match="detach"):
            replay.detach()
        forward(model, work)
    with replay.record(), pytest.raises(ScopeError, match="nested"), replay.record():
        pass
    wrong: Any
    for wrong in (work.rows, work.rows.rows, []):
        with pytest.raises(ScopeError, match="sequence of microbatches"), replay.rows(wrong):
            pass


def test_recording_keeps_every_microbatch() -> None:
    from tests.replay.megatron import drive

    model, replay = make(**FULL)
    work = batches(replay, 3)
    with replay.record() as recording:
        drive.step([model], work, replay)
    for number, batch in enumerate(work):
        assert torch.equal(recording.rows(number), batch.rows.rows.int())
    with pytest.raises(ScopeError, match="microbatch 3"):
        recording.rows(3)


def test_a_batch_packed_for_another_rank_is_refused() -> None:
    from tests.replay.megatron import drive

    _, replay = make()
    samples = [drive.trajectory(ids[0], LAYERS) for ids in drive.tokens(2)]
    other = pack(samples, layout=Layout(sp_size=2, sp_rank=1), pad_to_multiple=2, num_experts=8)
    wanted = r"microbatch 0 packed for Layout.*sp_rank=0.*got Layout.*sp_rank=1"
    with pytest.raises(ScopeError, match=wanted), replay.rows([other]):
        pass
    own = pack(samples, num_experts=8)
    assert own.routes is not None
    wide = Routes(rows=own.routes.rows, state=own.routes.state, num_experts=16)
    with pytest.raises(ScopeError, match="over 8 experts, got 16"), replay.rows([wide]):
        pass


def test_megatron_cannot_count_for_biases_without_padding_itself() -> None:
    """Why padding's counts are taken back behind the router: its own mask [T] does not fit its map [T, E]."""
    model, _ = make()
    ids = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(RuntimeError, match="must match"):
        model(ids, ids, None, padding_mask=ids.bool())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_rows_and_states_travel_in_one_copy(dtype: torch.dtype) -> None:
    experts = torch.randint(0, 200, (3, 5, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = Microbatch(experts=experts, state=torch.arange(5, dtype=torch.uint8))
    with Copies() as copies:
        moved = rows.to(torch.device("cpu:0"))  # another name of the device: the road of a real one
    assert copies.count == 1
    assert moved.state is not None
    assert (moved.experts.dtype, moved.state.tolist()) == (dtype, [0, 1, 2, 3, 4])
    assert torch.equal(moved.experts.long(), experts.long())
    assert all(moved.experts[layer].is_contiguous() for layer in range(3))
    bare = Microbatch(experts=experts, state=None)
    with Copies() as copies:
        assert bare.to(torch.device("meta")).experts.shape == experts.shape
    assert copies.count == 1


class Copies(TorchFunctionMode):
    """Counts `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += fn is Tensor.to
        return fn(*args, **(kwargs or {}))


def test_backward_may_run_on_another_thread() -> None:
    """As it does on a GPU: nothing of the scope may live in thread-local places."""
    from tests.replay.megatron import cpu

    model, replay = make(**FULL)
    work = batches(replay, 2)
    inside(replay, work, *(partial(run_both, model, batch) for batch in work))
    wanted = grads(model)
    model.zero_grad()

    def on_thread(losses: list[Any]) -> None:
        with cpu.shim():
            for loss in losses:
                loss.backward()

    with replay.rows([batch.rows for batch in work]):
        thread = Thread(target=on_thread, args=([forward(model, batch) for batch in work],))
        thread.start()
        thread.join()
    assert equal(grads(model), wanted)


def run_both(model: Any, batch: Any) -> None:
    forward(model, batch).backward()
