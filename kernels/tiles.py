"""Work in pieces of one constant shape, so that what a row or an element becomes does not depend on its neighbours.

Libraries choose kernels, blocking and the order of a sum by the whole shape, and vectorised loops treat the last few
elements with other instructions. In pieces of a constant shape, padded with zeros, a number meets the same instructions
wherever it stands and whatever runs beside it.

Legend: T rows, R rows of a tile, N length of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 32
"""Rows of a tile."""
LANES = 64
"""A multiple of what one turn of torch's vectorised loops takes on any CPU: two registers of 512 bits of bfloat16."""
PIECE = 16384
"""Elements of a call: torch splits calls of 32768 and more between threads, anywhere."""


def pad_rows(x: Tensor, rows: int = ROWS) -> Tensor:
    """x [T, ...] lengthened by zero rows to a multiple of `rows`, contiguous."""
    short = -x.shape[0] % rows
    return torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short else x.contiguous()


def by_rows(call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """What `call` makes of the rows of x [..., N], computed in tiles [R, N].

    Args:
        call: a tile [R, N] to tensors [R, ...], each row of them from the same row of the tile.

    Returns:
        The tensors, [..., and what follows the rows].
    """
    flat = x.reshape(-1, x.shape[-1])
    padded = pad_rows(flat)
    parts = [call(padded[start : start + ROWS]) for start in range(0, max(1, len(padded)), ROWS)]
    joined = [
        torch.cat(outs)[: len(flat)] if len(outs) > 1 else outs[0][: len(flat)] for outs in zip(*parts, strict=True)
    ]
    return tuple(out.reshape(*x.shape[:-1], *out.shape[1:]) for out in joined)


def by_elements(call: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """[...]: what the pointwise `call` makes of operands [...], broadcast, in contiguous pieces without a remainder."""
    first, *others = operands
    shape = torch.broadcast_shapes(*(x.shape for x in operands)) if others else first.shape  # type: ignore[no-untyped-call]
    flat = [pad_rows(x.expand(shape).reshape(-1), LANES) for x in operands]
    starts = range(0, max(1, len(flat[0])), PIECE)
    parts = [call(*(x[start : start + PIECE] for x in flat)) for start in starts]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out[: shape.numel()].reshape(shape)
