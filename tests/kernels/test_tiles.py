"""Pieces of a constant shape: what a number becomes does not depend on what runs beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pacenote.kernels import tiles

DTYPES = (torch.float32, torch.bfloat16)
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "rsqrt": lambda x: x.abs().add(0.1).rsqrt(),
}
ROWWISE: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "mean": lambda x: (x.mean(1),),
    "softmax": lambda x: (x.softmax(1),),
    "topk": lambda x: tuple(x.topk(3, dim=1, sorted=False)),
}


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POINTWISE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 300), data=st.data())
def test_an_element_does_not_depend_on_its_place(
    name: str, dtype: torch.dtype, seed: int, count: int, data: st.DataObject
) -> None:
    x = values(seed, count, dtype=dtype)
    whole = tiles.by_elements(POINTWISE[name], x)
    start = data.draw(st.integers(0, count - 1))
    assert torch.equal(tiles.by_elements(POINTWISE[name], x[start:]), whole[start:])
    assert torch.equal(tiles.by_elements(POINTWISE[name], x.flip(0)), whole.flip(0))
    strided = torch.stack([x, x], 1)[:, 0]
    assert torch.equal(tiles.by_elements(POINTWISE[name], strided), whole)
    torch.testing.assert_close(whole, POINTWISE[name](x))


def test_many_elements_and_operands_of_several_shapes() -> None:
    x, y = values(0, 3, 2 * tiles.PIECE + 5), values(1, 3, 1)
    whole = tiles.by_elements(torch.atan2, x, y)
    torch.testing.assert_close(whole, torch.atan2(x, y))
    assert torch.equal(tiles.by_elements(torch.atan2, x[1], y[1]), whole[1])
    assert tiles.by_elements(torch.sigmoid, x[:0]).shape == (0, x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWWISE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 80), length=st.integers(3, 70), data=st.data())
def test_a_row_does_not_depend_on_its_batch(
    name: str, dtype: torch.dtype, seed: int, rows: int, length: int, data: st.DataObject
) -> None:
    x = values(seed, rows, length, dtype=dtype)
    whole = tiles.by_rows(ROWWISE[name], x)
    order = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    for some, all_ in zip(tiles.by_rows(ROWWISE[name], x[order]), whole, strict=True):
        assert torch.equal(some, all_[order])
    again = tiles.by_rows(ROWWISE[name], x[None, :, None])
    assert [out.shape[:3] for out in again] == [(1, rows, 1)] * len(whole)
