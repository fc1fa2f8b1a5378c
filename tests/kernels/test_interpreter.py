# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The strict interpreter refuses what it says it refuses; these kernels would pass in Triton's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pacenote.kernels import launch

if not launch.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0) if OTHER else tl.load(x + i, mask=i < n)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _double(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i, value + value)


@triton.jit
def _total(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def _atomic(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def _negative(x, y, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(value >= 0, "below zero")
    tl.store(y + tl.arange(0, BLOCK), value)


@triton.jit
def _times(x, y, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(n):
        total += tl.load(x + tl.arange(0, BLOCK)) * n
    tl.store(y + tl.arange(0, BLOCK), total)


def test_rounds_bfloat16_to_nearest() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, generator=g), torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38])])
    y = torch.empty(1004, dtype=torch.bfloat16)
    _copy[(1,)](x, y, 1004, BLOCK=1024, OTHER=True)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    z = torch.empty(1004)
    _copy[(1,)](y, z, 1004, BLOCK=1024, OTHER=True)
    torch.testing.assert_close(z, y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kernel", "dtype", "extra", "words"),
    [
        (_copy, torch.float32, {"n": 8, "OTHER": False}, ""),
        (_copy, torch.float32, {"n": 7, "OTHER": False}, "expected other= on a masked load"),
        (_copy, torch.float32, {"n": 9, "OTHER": True, "BLOCK": 16}, "addresses inside the tensors"),
        (_double, torch.bfloat16, {}, "expected float32 in add, got bfloat16"),
        (_total, torch.bfloat16, {}, "expected float32 in a reduction, got bfloat16"),
        (_atomic, torch.float32, {}, "expected atomics on integers only"),
        (_atomic, torch.int32, {}, ""),
        (_negative, torch.int32, {}, "below zero"),
        (_double, torch.int32, {"wrap": 2**30}, "int32 overflow"),
        (_double, torch.int32, {}, ""),
        (_times, torch.int32, {"n": 3}, ""),
    ],
)
def test_refuses(kernel: Any, dtype: torch.dtype, extra: dict[str, Any], words: str) -> None:
    x = torch.arange(-1, 7).to(dtype)
    extra = dict(extra)
    if "wrap" in extra:
        x[3] = extra.pop("wrap")
    call = {"BLOCK": 8, **extra}
    if not words:
        kernel[(1,)](x, torch.zeros(8, dtype=dtype), **call)
        return
    with pytest.raises(InterpreterError, match=words):
        kernel[(1,)](x, torch.zeros(8, dtype=dtype), **call)


def test_unknown_launch_arguments() -> None:
    x = torch.zeros(8)
    _double[(1,)](x, x, BLOCK=8, num_warps=2)
    with pytest.raises(KeyError, match="num_warp"):
        _double[(1,)](x, x, BLOCK=8, num_warp=2)
