"""The tokens whose logprob is asked for: their targets, temperatures and places, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pacenote.kernels import check

IGNORED, SCORED, WRONG = 0, 1, 2
"""State of a token: no result and no gradient; both; or a target out of range or a temperature not positive: NaN."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The n of T tokens that need logits.

    Attributes:
        targets: [n] int64, within the vocabulary.
        state: [n] uint8 IGNORED, SCORED, WRONG.
        heat: temperature [n] or 0-d in the dtype of the logits, 1 where a token is ignored; None: 1 everywhere.
        picked: [n] int64, their places among the T, or None for all of them.
        shape: of the result, T numbers.
    """

    targets: Tensor
    state: Tensor
    heat: Tensor | None
    picked: Tensor | None
    shape: torch.Size

    @classmethod
    def of(
        cls,
        targets: Tensor,
        temperature: float | Tensor,
        ignore_index: int,
        bound: int,
        like: Tensor,
        *,
        mask: Tensor | None = None,
        picked: Tensor | None = None,
    ) -> Rows:
        """Check and pick.

        Args:
            targets: [...] int64 or int32, in [0, bound) or `ignore_index`.
            temperature: a number above 0, or such numbers [...].
            ignore_index: target of an ignored token.
            bound: size of the vocabulary.
            like: [..., any], whose device and dtype the logits have.
            mask: [...] bool, the tokens to pick. Waits for the device once, to learn how many are set.
            picked: [n] int64, their places instead, all different; nothing waits.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; on the CPU a temperature or target out of range.
        """
        device, kind = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
        check.tensor(targets, "targets", tuple(targets.shape), (torch.int64, torch.int32), device)
        flat = targets.reshape(-1).long()
        if mask is not None:
            check.tensor(mask, "mask", tuple(targets.shape), (torch.bool,), device)
            picked = mask.reshape(-1).nonzero()[:, 0]
        elif picked is not None:
            check.tensor(picked, "picked", (None,), (torch.int64,), device)
        flat = flat if picked is None else flat[picked]
        live, inside = flat != ignore_index, (flat >= 0) & (flat < bound)
        if device.type == "cpu" and not bool((inside | ~live).all()):
            wrong = int(flat[~inside & live][0])
            raise ValueError(f"expected targets in [0, {bound}) or ignore_index={ignore_index}, got {wrong}")
        heat = _heat(temperature, targets, live, picked, kind)
        known = inside if heat is None else inside & (heat > 0)
        state = torch.where(live, torch.where(known, SCORED, WRONG), IGNORED).to(torch.uint8)
        return cls(flat.clamp(0, bound - 1), state, heat, picked, targets.shape)

    def take(self, values: Tensor, part: slice) -> Tensor:
        """Rows of [T, any] that a chunk needs, [C, any]."""
        return values[part] if self.picked is None else values[self.picked[part]]

    def put(self, values: Tensor, part: slice, into: Tensor) -> None:
        """Write a chunk's rows [C, any] where they belong in [T, any]."""
        if self.picked is None:
            into[part] = values
        else:
            into.index_copy_(0, self.picked[part], values)

    def place(self, values: Tensor) -> Tensor:
        """Results [C] of all tokens that were picked, back among zeros in the shape of the targets [...]."""
        if self.picked is None:
            return values.reshape(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy(0, self.picked, values).reshape(self.shape)

    def chunks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` of the n tokens."""
        for start in range(0, len(self.targets), size):
            yield slice(start, min(start + size, len(self.targets)))

    def live(self, part: slice) -> Tensor:
        """Which tokens of a chunk have a result, [C] bool."""
        return self.state[part] != IGNORED

    def heat_of(self, part: slice) -> Tensor | None:
        """Temperature of a chunk: [C], 0-d, or None for 1."""
        return self.heat if self.heat is None or not self.heat.ndim else self.heat[part]


def _heat(
    temperature: float | Tensor, targets: Tensor, live: Tensor, picked: Tensor | None, kind: torch.dtype
) -> Tensor | None:
    """Temperature [n], 0-d, or None for 1."""
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        return None if temperature == 1 else torch.full((), float(temperature), dtype=kind, device=live.device)
    check.tensor(temperature, "temperature", tuple(targets.shape), check.FLOATS, live.device)
    heat = temperature.detach().to(kind).reshape(-1)
    heat = torch.where(live, heat if picked is None else heat[picked], 1.0)
    if live.device.type == "cpu" and not bool((heat > 0).all()):
        raise ValueError(f"expected temperatures above 0, got {float(heat[~(heat > 0)][0])}")
    return heat
