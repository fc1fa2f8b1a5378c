"""Experts that routers used: of the last forward pass, or of all the passes of a generation.

Legend: B sequences of S positions, L MoE layers, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacenote.replay.errors import ScopeError


class Recording:
    """Experts that the routers of the last forward pass used, replayed or their own."""

    def __init__(self, num_layers: int) -> None:
        """Nothing is recorded yet."""
        self._experts: list[Tensor | None] = [None] * num_layers
        self._shape: tuple[int, int] | None = None

    def begin(self, shape: tuple[int, int], ids: Tensor | None, cached: int | None) -> None:
        """A new pass over input [B, S]: forget the one before."""
        self._shape = shape
        self._experts = [None] * len(self._experts)

    def put(self, index: int, experts: Tensor) -> None:
        """Keep the experts [T, K] of MoE layer number `index`."""
        self._experts[index] = experts

    def rows(self) -> Tensor:
        """Experts [B, S, L, K] int32 of the last forward pass, for its input [B, S], on the last router's device.

        Raises:
            ScopeError: no forward pass ran to its end.
        """
        kept = [experts for experts in self._experts if experts is not None]
        if self._shape is None or len(kept) != len(self._experts):
            raise ScopeError("expected a finished forward pass inside record(), got none: nothing is recorded")
        device = kept[-1].device
        stacked = torch.stack([experts.to(device) for experts in kept], dim=1).to(torch.int32)
        return stacked.view(*self._shape, *stacked.shape[1:])


class GenerationRecording:
    """Experts of every position that a generation has read, over its passes with a key-value cache or without one.

    A pass that starts behind `cached` positions keeps the rows of those and adds its own. Only the tokens can tell
    whether somebody has reordered the cache meanwhile (beam search does): they are kept, and `rows` compares them.
    """

    def __init__(self, num_layers: int) -> None:
        """Nothing is recorded yet."""
        self._num_layers = num_layers
        self._last = Recording(num_layers)
        self._rows: list[Tensor] = []  # [B, S, L, K] of each pass but the last
        self._ids: list[Tensor] = []  # [B, S] of each pass

    def begin(self, shape: tuple[int, int], ids: Tensor | None, cached: int | None) -> None:
        """A new pass over ids [B, S] behind `cached` positions.

        Raises:
            ScopeError: no ids, or positions in the cache that are not known or were not recorded.
        """
        if ids is None:
            raise ScopeError("expected input_ids in a recording of a generation, got embeddings: nothing proves these")
        if cached is None:
            raise ScopeError(
                "expected a cache that knows its length without waiting, such as transformers' dynamic one, got another"
            )
        held = sum(part.shape[1] for part in self._ids)
        if cached > held:
            raise ScopeError(f"expected a generation recorded from its start, got a cache of {cached - held} more")
        if self._ids:
            self._rows.append(self._last.rows())
        self._rows, self._ids = _cut(self._rows, cached), _cut(self._ids, cached)
        self._last = Recording(self._num_layers)
        self._last.begin(shape, ids, cached)
        self._ids.append(ids.detach())

    def put(self, index: int, experts: Tensor) -> None:
        """Keep the experts [T, K] of MoE layer number `index` for the pass that runs."""
        self._last.put(index, experts)

    def rows(self, tokens: Tensor) -> Tensor:
        """Experts [B, S, L, K] int32 of the S positions that were read; of generated ids [B, N] that is N - 1.

        Args:
            tokens: [B, N] integer, N >= S, prompts and answers as `generate` returns them.

        Raises:
            ScopeError: no pass ran to its end, or the tokens are not those that were read.
        """
        rows = torch.cat([*self._rows, self._last.rows()], dim=1)
        ids = torch.cat([part.to(rows.device) for part in self._ids], dim=1)
        read = ids.shape[1]
        if tokens.ndim != 2 or tokens.shape[0] != ids.shape[0] or tokens.shape[1] < read:
            raise ScopeError(f"expected tokens [{ids.shape[0]}, {read} or more], got {list(tokens.shape)}")
        differ = (tokens[:, :read].to(ids.device) != ids).nonzero()
        if len(differ):
            sequence, place = differ[0].tolist()
            raise ScopeError(
                f"expected the tokens that were read, got another at sequence {sequence}, position {place}: "
                "a generation that reorders its cache, as beam search does, cannot be recorded"
            )
        return rows


def _cut(parts: list[Tensor], positions: int) -> list[Tensor]:
    """Tensors [B, S, ...] that make up the first `positions` positions."""
    kept = []
    for part in parts:
        if positions > 0:
            kept.append(part[:, :positions])
        positions -= part.shape[1]
    return kept
