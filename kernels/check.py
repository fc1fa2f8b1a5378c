"""Argument checks of the ops, in one wording: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


def tensor(
    value: object, name: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Check dtype, device and shape of an argument, for example [T, None]; None is any size.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {name} as a tensor {_kind(shape, dtypes)}, got {type(value).__name__}")
    same = value.ndim == len(shape) and all(w is None or w == s for w, s in zip(shape, value.shape, strict=True))
    if not same or value.dtype not in dtypes:
        got = f"{list(value.shape)} of {short(value.dtype)}"
        raise ValueError(f"expected {name} {_kind(shape, dtypes)}, got {got}")
    if value.device != device:
        raise ValueError(f"expected {name} on {device} as the other arguments, got {value.device}: move it first")


def _kind(shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> str:
    """In words, and only for an error: torch.compile makes no text of a size that varies."""
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    return f"[{wanted}] of {' or '.join(map(short, dtypes))}"


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")
