"""A key/value cache with one slot a request, for batches whose requests join and leave at any step.

Legend: B rows in use, H key heads, M allocated length, W width of a step (tokens), D head size.

Rows in use are always the slots 0..B-1: a leaving request's slot is filled by the last one (`move`). A decode step then
reads views of the tensors and copies nothing but the new token. A model that caches latents (MLA) and one that caches
expanded heads both fit: shapes come from the first states that a layer sends. The tensors are inference tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [slots, H, M, D] each, written by position.

    Whatever lies behind a row's length is stale or padding; the step's mask hides it, and it is always finite because
    `SlotCache.clear` zeroes it, so that a hidden value cannot leak as 0 * NaN.
    """

    is_compileable = False
    is_sliding = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate the tensors; head counts and sizes come from the states [B, H, W, D]."""
        values = key_states if value_states is None else value_states
        self.keys = self._allocate(key_states)
        self.values = self._allocate(values)
        self.is_initialized = True

    @torch.inference_mode()
    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, dim = states.shape
        return states.new_zeros((self._cache.slots, heads, self._cache.allocated, dim))

    @torch.inference_mode()
    def grow(self, length: int) -> None:
        """Lengthen the tensors to `length` positions; what is cached stays."""
        if self.keys is None or self.values is None:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((old.shape[0], old.shape[1], length, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    @torch.inference_mode()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this step's states and return what the step attends to.

        Args:
            key_states, value_states: [B, H, W, D].

        Returns:
            Prefill: the states themselves (a prompt starts at position 0). Decode: views [B, H, width, D] of the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cache = self._cache
        if cache.positions is None:
            start, stop, width = cache.first, cache.first + key_states.shape[0], key_states.shape[2]
            self.keys[start:stop, :, :width] = key_states
            self.values[start:stop, :, :width] = value_states
            return key_states, value_states
        rows = cache.rows
        self.keys[rows, :, cache.positions] = key_states[:, :, 0]
        self.values[rows, :, cache.positions] = value_states[:, :, 0]
        count = key_states.shape[0]
        return self.keys[:count, :, : cache.width], self.values[:count, :, : cache.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys; the engine passes its own 4D mask, so this only keeps callers content."""
        return self._cache.width, 0

    def get_seq_length(self, *args: Any) -> int:
        """Longest cached length before this step, in tokens."""
        return self._cache.width

    def get_max_length(self) -> int:
        """Allocated length M, in tokens."""
        return self._cache.allocated

    def get_max_cache_shape(self) -> int:
        """Allocated length M, in tokens (the name before transformers 5.20)."""
        return self._cache.allocated


class SlotCache(Cache):  # type: ignore[misc]
    """All layers' slots and the description of the current step.

    Args:
        num_layers: decoder layers.
        slots: how many requests can run at once.
        max_len: longest request, prompt and answer together, in tokens.

    The tensors start short and double up to `max_len`, so that a long context costs memory only once it is used.
    """

    def __init__(self, *, num_layers: int, slots: int, max_len: int) -> None:
        self.slots = slots
        self.max_len = max_len
        self.allocated = min(max_len, 128)
        self.first = 0
        self.width = 0
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.positions: torch.Tensor | None = None
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def begin_prefill(self, first: int, width: int) -> None:
        """The next forward writes prompts into slots `first`.. from position 0; `width` is the padded length W."""
        self._reserve(width)
        self.first, self.width, self.positions = first, width, None

    def begin_decode(self, positions: torch.Tensor) -> None:
        """The next forward writes one token a row, at `positions` [B] int64, into slots 0..B-1."""
        width = int(positions.max()) + 1
        self._reserve(width)
        self.width, self.positions = width, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target`."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]

    @torch.inference_mode()
    def clear(self) -> None:
        """Zero everything. Needed when weights change: a NaN of broken weights must not outlive them."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys.zero_()
                layer.values.zero_()

    def _reserve(self, width: int) -> None:
        assert width <= self.max_len, f"width {width} is past max_len {self.max_len}"
        if width <= self.allocated:
            return
        while self.allocated < width:
            self.allocated = min(self.max_len, self.allocated * 2)
        for layer in self.layers:
            layer.grow(self.allocated)


def prefill_mask(width: int, rows: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Additive mask [B, 1, W, W] of B = `rows` right-padded prompts: causal.

    A prompt's own tokens stand before its padding, so causality alone keeps the padding out of every real row.
    """
    closed = torch.full((width, width), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    return closed.expand(rows, 1, width, width)


def decode_mask(positions: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, 1, width] for one new token a row at `positions` [B]: it sees the keys 0..position."""
    keys = torch.arange(int(positions.max()) + 1, device=positions.device)
    closed = keys[None, :] > positions[:, None]
    mask = torch.zeros(closed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(closed, torch.finfo(dtype).min)[:, None, None, :]
