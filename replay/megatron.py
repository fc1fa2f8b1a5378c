"""attach_megatron(chunks): replay and record the routers of a megatron-core model under its own schedules.

One object of ours sits on each TopKRouter of the chunks given; no flag is set, no class patched, no list of all routers
kept, so other models of the process, and multi-token-prediction layers, route as ever.

    replay = pn.attach_megatron(chunks)
    batches = [pn.pack(samples, layers=replay.places(layers), layout=replay.layout) for samples in microbatches]
    with replay.rows(batches):  # spans forward and backward of all microbatches of the step
        forward_backward(forward_step_func=..., model=chunks, num_microbatches=len(batches), ...)

Auxiliary losses and z-loss are Megatron's own: the former balance the experts that the trainer would choose, not the
replayed ones, and both look at padding unless the model is given a padding_mask. Counts for expert biases follow the
replayed experts and leave padding out. Rows that are routed freely inside a scope break ties to the lowest index, where
torch.topk breaks them as it likes.

Legend: M microbatches, L MoE layers of this rank, T tokens at a router, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacenote.kernels.layout import Layout
from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.route import RouteStats
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec
from pacenote.replay.align import places
from pacenote.replay.audit import Audit
from pacenote.replay.counters import LayerCounters
from pacenote.replay.errors import ReplayError, ScopeError, UnsupportedModel
from pacenote.replay.megatron_fused import FusedSeat, check_fused, fused_layers
from pacenote.replay.megatron_router import (
    Seat,
    find_routers,
    refuse,
    router_spec,
    selection_spec,
    self_check,
)
from pacenote.replay.megatron_step import Microbatch, Read, Step, in_backward


def attach_megatron(
    chunks: nn.Module | Sequence[nn.Module], *, fused: bool | Collection[int] = False
) -> MegatronReplay:
    """Attach to this rank's model chunk, or its chunks in the order of virtual pipeline stages.

    Wrappers (DistributedDataParallel, Float16Module) are looked through. Every router routes random logits once, and
    must choose and weigh as its config says.

    Args:
        chunks: of one model.
        fused: routers that, inside a scope, score, choose, weigh and lay out in the route kernel instead of Megatron's
            chain of ops: all of them, or those of these layers (global ids from 0, other ranks' among them).

    Raises:
        UnsupportedModel: a config or router that cannot be replayed, or fused, exactly, with each reason.
        ReplayError: a chunk is attached already, or `fused` names what is no MoE layer.
    """
    given = [chunks] if isinstance(chunks, nn.Module) else list(chunks)
    if not given:
        raise UnsupportedModel("expected at least one model chunk, got none")
    models = [_unwrap(chunk) for chunk in given]
    config = models[0].config
    refuse(config)
    found = [find_routers(model) for model in models]
    spec, selection = router_spec(config), selection_spec(config)
    layers = [router.layer_number - 1 for routers in found for router in routers]
    opted = fused_layers(fused, layers, config)
    for router in [router for routers in found for router in routers]:
        if isinstance(router.router_replay, Seat):
            raise ReplayError("expected chunks without replay, these have it: detach() the other MegatronReplay first")
        self_check(router, spec, selection)
        if router.layer_number - 1 in opted:
            check_fused(router, spec, selection)
    return MegatronReplay(models, found, spec, selection, opted)


class MegatronReplay:
    """Replay and recording of one rank's chunks. Made by `attach_megatron`.

    Attributes:
        layers: global ids, from 0, of this rank's MoE layers in the order of the rows' L axis: chunk after chunk.
        fused: those of them whose routers are fused.
        layout: which part of a batch this rank's routers see, for `pack(layout=...)` and `replay.align`.
        spec: how the routers weigh experts.
        num_experts: E.
        top_k: K.
    """

    def __init__(
        self,
        models: list[Any],
        routers: list[list[Any]],
        spec: RouterSpec,
        selection: RouterSpec,
        fused: frozenset[int],
    ) -> None:
        """Seat an object on every router of the models, and hook the models' forward passes."""
        config = models[0].config
        self.spec, self.num_experts, self.top_k = spec, int(config.num_moe_experts), int(config.moe_router_topk)
        self.layout = _layout(models[0])
        places_of = count()

        def seat_of(router: Any, chunk: int) -> Seat:
            if router.layer_number - 1 in fused:
                return FusedSeat(router, self, selection, spec, chunk=chunk, index=next(places_of))
            return Seat(router, self, selection, chunk=chunk, index=next(places_of))

        self._seats = [[seat_of(router, chunk) for router in found] for chunk, found in enumerate(routers)]
        seats = [seat for chunk in self._seats for seat in chunk]
        self.layers = tuple(seat.layer for seat in seats)
        self.fused = tuple(layer for layer in self.layers if layer in fused)
        self._counters = LayerCounters(self.layers)
        self._running = [False] * len(models)
        # Whether the last forward pass of a chunk that keeps a graph was in a scope.
        self._replayed = [False] * len(models)
        self._step: Step | None = None
        self._recording: MegatronRecording | None = None
        self._handles = []
        for seat in seats:
            seat.take_seat()
        for number, model in enumerate(models):
            hook = _ChunkHook(self, number)
            self._handles += [
                model.register_forward_pre_hook(hook.begin, prepend=True),
                model.register_forward_hook(hook.end),
            ]

    def places(self, moe_layers: Sequence[int]) -> tuple[int, ...]:
        """Where this rank's layers stand in rows over `moe_layers` (global ids, ascending), for `pack(layers=...)`.

        Raises:
            ScopeError: a layer of this rank is not among them.
        """
        return places(moe_layers, self.layers)

    @contextmanager
    def rows(self, microbatches: Sequence[Any]) -> Iterator[MegatronReplay]:
        """Replay these rows in the M forward passes of every chunk in the block, and in their recomputation.

        Args:
            microbatches: one each, in the schedule's order: a PackedBatch or Routes; rows [T, L, K] (uint8, uint16,
                int32 or int64; an id below 0 leaves its row to the router); or (rows, state [T] uint8). Rows are this
                rank's part: its layers, and its tokens as its routers see them.

        Raises:
            ScopeError: rows that do not fit model, layout or router; passes out of order; a nested scope; at the end,
                rows that were not used exactly once, by chunk, microbatch and layer.
        """
        self._check_attached()
        if self._step is not None:
            raise ScopeError("expected one scope of rows at a time, got a nested one: leave the outer one first")
        if isinstance(microbatches, Tensor | PackedBatch | Routes) or not len(microbatches):
            raise ScopeError(
                "expected a sequence of microbatches, one for each forward pass: put a single one in a list"
            )
        given = [self._microbatch(number, value) for number, value in enumerate(microbatches)]
        chunks = [{seat.index: seat.layer for seat in chunk} for chunk in self._seats]
        self._step = step = Step(given, chunks)
        try:
            yield self
        finally:
            self._step, self._running = None, [False] * len(self._seats)
        step.close()

    @contextmanager
    def record(self) -> Iterator[MegatronRecording]:
        """Keep the experts of every forward pass of the block; inside `rows`, the replayed ones.

        Raises:
            ScopeError: a recording inside a recording.
        """
        self._check_attached()
        if self._recording is not None:
            raise ScopeError("expected one recording at a time, got a nested one")
        self._recording = recording = MegatronRecording(len(self.layers))
        try:
            yield recording
        finally:
            self._recording, self._running = None, [False] * len(self._seats)

    def audit(self, reset: bool = False) -> Audit:
        """Counts by layer of this rank since attach or the last reset. The only call that waits for the device."""
        return self._counters.audit(reset=reset)

    def detach(self) -> None:
        """Give every router back what it had, and remove the hooks. A second call does nothing.

        Raises:
            ScopeError: a scope or a recording is open.
        """
        if self._step is not None or self._recording is not None:
            raise ScopeError("expected no open scope or recording at detach(), leave it first")
        if self._handles:
            for seat in [seat for chunk in self._seats for seat in chunk]:
                seat.leave_seat()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, seat: Seat, scores: Tensor) -> tuple[Read, RouteStats | None] | None:
        """Rows for a router that scores its tokens [T, E]; None without an open scope. Routers ask, not users."""
        if self._step is None:
            # A checkpoint that keeps a graph while it runs forward is not known to a scope as it closes; here it shows.
            if self._replayed[seat.chunk] and not self._running[seat.chunk] and in_backward():
                raise ScopeError(
                    f"expected backward inside the scope: layer {seat.layer} is recomputed after its scope closed, and "
                    "would differentiate another routing; keep `with replay.rows(...)` open over backward"
                )
            return None
        read = self._step.take(seat.chunk, seat.index, scores)
        # Recomputation counts for nothing: a row counts once.
        return read, None if read.again else self._counters.of(seat.index, scores.device)

    def chosen(self, seat: Seat, experts: Tensor) -> None:
        """A router goes on with experts [T, K]. Routers tell, not users."""
        if self._recording is not None and self._running[seat.chunk]:
            self._recording.put(seat.index, experts)

    def _check_attached(self) -> None:
        if not self._handles:
            raise ScopeError("expected attached chunks, this replay was detached: call attach_megatron(chunks) again")

    def _begin(self, chunk: int) -> None:
        self._running[chunk] = True
        if torch.is_grad_enabled():
            self._replayed[chunk] = self._step is not None
        if self._step is not None:
            self._step.passes[chunk].begin()

    def _end(self, chunk: int, output: Any) -> None:
        self._running[chunk] = False
        if self._step is not None:
            self._step.passes[chunk].end(output)

    def _microbatch(self, number: int, value: Any) -> Microbatch:
        """What a user gave for microbatch `number`, checked."""
        where, state = f"microbatch {number}", None
        if isinstance(value, PackedBatch):
            if value.layout != self.layout:
                raise ScopeError(f"expected {where} packed for {self.layout}, this rank's, got {value.layout}")
            value = value.routes
            if value is None:
                raise ScopeError(f"expected {where} with routes, got a batch whose samples brought none")
        if isinstance(value, Routes):
            if value.num_experts not in (None, self.num_experts):
                raise ScopeError(f"expected {where} over {self.num_experts} experts, got {value.num_experts}")
            value, state = value.rows, value.state
        elif isinstance(value, tuple):
            value, state = value
        rows, state = _tensor(value, f"rows of {where}"), None if state is None else _tensor(state, f"state of {where}")
        if rows.ndim != 3 or tuple(rows.shape[1:]) != (len(self.layers), self.top_k):
            more = ": sequences [B, S] are flattened by pacenote.replay.align" if rows.ndim == 4 else ""
            raise ScopeError(
                f"expected rows of {where} [T, {len(self.layers)} layers of this rank, {self.top_k} experts], "
                f"got {list(rows.shape)}{more}"
            )
        wide = self.num_experts > 256
        if rows.dtype not in (torch.uint16, torch.int32, torch.int64) and (wide or rows.dtype != torch.uint8):
            kinds = "uint16, int32 or int64" if wide else "uint8, uint16, int32 or int64"
            raise ScopeError(f"expected rows of {where}, over {self.num_experts} experts, as {kinds}, got {rows.dtype}")
        if state is not None:
            if state.dtype != torch.uint8 or tuple(state.shape) != tuple(rows.shape[:1]):
                raise ScopeError(
                    f"expected state of {where} [{len(rows)}] uint8, one a row, got {list(state.shape)} {state.dtype}"
                )
            if state.device.type == "cpu" and len(state) and int(state.max()) > max(FREE, REPLAY, PAD):
                raise ScopeError(
                    f"expected state codes {FREE} free, {REPLAY} replay, {PAD} pad, got {int(state.max())}"
                )
            state = state.to(rows.device, non_blocking=True).contiguous()
        return Microbatch(experts=rows.permute(1, 0, 2).contiguous(), state=state)


class MegatronRecording:
    """Experts that the routers of this rank used, by microbatch."""

    def __init__(self, num_layers: int) -> None:
        """Nothing is recorded yet."""
        self._experts: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def put(self, index: int, experts: Tensor) -> None:
        """Keep experts [T, K] of the next microbatch of layer number `index`."""
        self._experts[index].append(experts)

    def rows(self, microbatch: int = 0) -> Tensor:
        """Experts [T, L, K] int32 of a microbatch: forward passes of each chunk are counted from 0.

        Raises:
            ScopeError: it has not passed all chunks.
        """
        if not self._experts or any(len(kept) <= microbatch for kept in self._experts):
            counts = [len(kept) for kept in self._experts]
            raise ScopeError(f"expected microbatch {microbatch} to have passed every layer, got passes {counts}")
        return torch.stack([kept[microbatch] for kept in self._experts], dim=1).to(torch.int32)


class _ChunkHook:
    """Forward hooks of one chunk."""

    def __init__(self, replay: MegatronReplay, chunk: int) -> None:
        self._replay, self._chunk = replay, chunk

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the chunk's forward pass."""
        self._replay._begin(self._chunk)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it."""
        self._replay._end(self._chunk, output)


def _unwrap(chunk: nn.Module) -> Any:
    """The GPTModel (or the like) inside wrappers, which hold it as `module`."""
    model: Any = chunk
    while not hasattr(model, "pg_collection") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not hasattr(model, "config") or not hasattr(model, "pg_collection"):
        raise UnsupportedModel(f"expected megatron-core model chunks such as GPTModel, got {type(chunk).__name__}")
    return model


def _layout(model: Any) -> Layout:
    """This rank's part of a batch, from the model's process groups."""
    cp, tp = model.pg_collection.cp, model.pg_collection.tp
    cut = bool(model.config.sequence_parallel) and tp.size() > 1
    return Layout(
        cp_size=cp.size(),
        cp_rank=cp.rank(),
        sp_size=tp.size() if cut else 1,
        sp_rank=tp.rank() if cut else 0,
    )


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        raise ScopeError(f"expected {name} as a tensor or array, got {type(value).__name__}")
    return value.detach()
