"""Which rows are current, and what one forward pass reads of them. `recording` is the other direction.

Plain attributes throughout: on CUDA the backward pass, and with it the recomputation of checkpointed layers, runs on
another thread, where thread-locals and context variables would be empty.

Legend: T tokens (B x S flattened), L MoE layers, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacenote.kernels.spec import CACHED, DECODE, FREE, PAD, PREFILL, REPLAY
from pacenote.replay.errors import ScopeError
from pacenote.replay.record import RoutingRecord
from pacenote.replay.spec import RoutingGeometry

_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of one scope. `experts` [L, T, K] contiguous, `state` [T] uint8 or None, `shape` (B, S) of the input."""

    experts: Tensor
    state: Tensor | None
    shape: tuple[int, int]

    def to(self, device: torch.device) -> Rows:
        """The same on a device; the copy is asynchronous where it can be."""
        state = None if self.state is None else self.state.to(device, non_blocking=True)
        return Rows(experts=self.experts.to(device, non_blocking=True), state=state, shape=self.shape)


def as_rows(rows: Any, state: Any, geometry: RoutingGeometry) -> Rows:
    """Bring what a user passed into one form.

    Args:
        rows: tensor or array [T, L, K] (input [1, T]) or [B, S, L, K] (input [B, S]); or kernels.pack.Routes; or a
            RoutingRecord of T rows.
        state: [T] or [B, S] uint8 codes (FREE, REPLAY, PAD); None replays every row. Not with Routes or a record,
            which bring their own.
        geometry: the model's.

    Raises:
        ScopeError: a shape, dtype or model that does not fit, with what was expected and what came.
    """
    if isinstance(rows, RoutingRecord) or hasattr(rows, "state"):
        if state is not None:
            raise ScopeError(f"expected no state beside {type(rows).__name__}, which has its own: pass one of them")
        rows, state = _of_record(rows, geometry) if isinstance(rows, RoutingRecord) else _of_routes(rows, geometry)
    experts = _tensor(rows, "rows")
    shape = (geometry.num_experts, len(geometry.layers), geometry.top_k)
    if experts.ndim not in (3, 4) or tuple(experts.shape[-2:]) != shape[1:]:
        raise ScopeError(
            f"expected rows [T, {shape[1]} layers, {shape[2]} experts] or [B, S, {shape[1]}, {shape[2]}], "
            f"got {list(experts.shape)}"
        )
    if experts.dtype not in _DTYPES or (experts.dtype == torch.uint8 and shape[0] > 256):
        wanted = "uint8, uint16, int32 or int64" if shape[0] <= 256 else "uint16, int32 or int64"
        raise ScopeError(f"expected rows of {shape[0]} experts as {wanted}, got {experts.dtype}")
    lead = tuple(experts.shape[:-2])
    flat = None if state is None else _state(_tensor(state, "state"), lead)
    experts = experts.reshape(-1, *shape[1:]).permute(1, 0, 2).contiguous()
    return Rows(experts=experts, state=flat, shape=(1, lead[0]) if len(lead) == 1 else (lead[0], lead[1]))


def _of_routes(routes: Any, geometry: RoutingGeometry) -> tuple[Any, Any]:
    if routes.num_experts is not None and routes.num_experts != geometry.num_experts:
        raise ScopeError(f"expected routes over {geometry.num_experts} experts, got {routes.num_experts}")
    return routes.rows, routes.state


def _of_record(record: RoutingRecord, geometry: RoutingGeometry) -> tuple[Any, Any]:
    mine, theirs = (geometry.layers, geometry.num_experts), (record.layers, record.num_experts)
    if mine != theirs:
        raise ScopeError(f"expected a record of (layers, experts) = {mine}, got {theirs}")
    state = np.where(np.isin(record.provenance, (PREFILL, DECODE, CACHED)), REPLAY, FREE).astype(np.uint8)
    return record.experts.copy(), state


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        raise ScopeError(f"expected {name} as a tensor or array, got {type(value).__name__}")
    return value.detach()


def _state(state: Tensor, lead: tuple[int, ...]) -> Tensor:
    if tuple(state.shape) != lead or state.dtype != torch.uint8:
        raise ScopeError(f"expected state {list(lead)} uint8, one a row, got {list(state.shape)} {state.dtype}")
    if state.device.type == "cpu" and state.numel() and int(state.max()) > max(FREE, REPLAY, PAD):
        raise ScopeError(f"expected state codes {FREE} (free), {REPLAY} (replay), {PAD} (pad), got {int(state.max())}")
    return state.reshape(-1).contiguous()


class Scope:
    """Current rows, on every device that holds a router. Moved once, read by layer."""

    def __init__(self, rows: Rows, devices: Iterable[torch.device]) -> None:
        """Move the rows to each of the devices."""
        self.forwards = 0
        self._shape = rows.shape
        self._cached: int | None = None
        self._rows = {device: rows.to(device) for device in devices}

    def begin(self, shape: tuple[int, int], cached: int | None = 0) -> None:
        """A forward pass over input [B, S] starts, after `cached` positions in a cache (None: unknown).

        Raises:
            ScopeError: the rows are of another shape, or the scope's first pass was over other positions.
        """
        if shape != self._shape:
            swapped = ": the input's axes are swapped" if shape == self._shape[::-1] else ""
            raise ScopeError(f"expected input {list(self._shape)} as the rows have, got {list(shape)}{swapped}")
        if self.forwards and (cached is None or cached != self._cached):
            # One-token prompts and equal chunks have one shape throughout: only the cache tells their steps apart.
            after = "an unread number" if cached is None else cached
            raise ScopeError(
                f"expected every pass of a scope over the same positions, those after {self._cached} cached ones, "
                f"got one after {after}: open a scope with rows of its own for each step"
            )
        self._cached = cached
        self.forwards += 1

    def take(self, index: int, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [T, K] and state [T] of MoE layer number `index`, on the device of its logits [T, E].

        Raises:
            ScopeError: the router saw another number of tokens, or sits on a device it was not on at entry.
        """
        rows = self._rows.get(logits.device)
        if rows is None:
            raise ScopeError(f"expected routers on {[str(d) for d in self._rows]} as at entry, got {logits.device}")
        experts = rows.experts[index]
        if len(experts) != len(logits):
            raise ScopeError(f"expected {len(experts)} tokens at a router, one each row, got {len(logits)}")
        return experts, rows.state


class Forward:
    """One pass through the base model: how often each of the L routers was read in it."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        """No pass has run yet."""
        self.running = False
        self._layers = layers
        self._reads = [0] * len(layers)

    def begin(self) -> None:
        """A pass starts. Reads outside of one are recomputation of checkpointed layers."""
        self.running = True
        self._reads = [0] * len(self._layers)

    def read(self, index: int) -> None:
        """Count a read.

        Raises:
            ScopeError: the layer was read in this pass before.
        """
        self._reads[index] += 1
        if self._reads[index] > 1:
            raise ScopeError(f"expected one read of layer {self._layers[index]} a forward pass, got a second one")

    def end(self, *, check: bool) -> None:
        """The pass is over.

        Raises:
            ScopeError: `check`, and a router was not reached, so its layer did not replay.
        """
        self.running = False
        unread = [layer for layer, reads in zip(self._layers, self._reads, strict=True) if not reads]
        if check and unread:
            raise ScopeError(
                f"expected every router to run in a forward pass, those of layers {unread} did not: "
                "a fused kernel or a skipped layer goes round the hook"
            )
