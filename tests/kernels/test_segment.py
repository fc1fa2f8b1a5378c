"""Ragged sums and means: every check of `segment_checks`, random segments, autograd, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.kernels import launch
from pacenote.kernels.segment import segment_mean, segment_sum
from tests.kernels.segment_checks import CHECKS, check

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@settings(
    max_examples=30 if launch.INTERPRETED else 80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lengths=st.lists(st.sampled_from((0, 1, 2, 30, 512, 700)), max_size=5),
    padding=st.integers(0, 3),
    masked=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 999),
)
def test_any_segments(
    lengths: list[int], padding: int, masked: bool, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    check(lengths, device, padding=padding, masked=masked, dtype=dtype, seed=seed)


def test_opcheck(device: torch.device) -> None:
    ids = torch.tensor([0, 0, 2, 2, 2, -1], dtype=torch.int32, device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for given_mask in (mask, None):
        values = torch.randn(6, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.pacenote.segment_sum.default, (values, ids, given_mask, 3), test_utils=checks)
        grad = torch.randn(3, device=device, requires_grad=True)
        torch.library.opcheck(
            torch.ops.pacenote.segment_spread.default, (grad, ids, given_mask, torch.float32), test_utils=checks
        )


def test_gradcheck(device: torch.device) -> None:
    ids = torch.tensor([0, 0, 2, 2, 2, -1], device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    values = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    for function in (segment_sum, segment_mean):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, ids, 3, mask=mask), values)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x * x, ids, 3, mask=mask), values)


def test_compiles_whole(device: torch.device) -> None:
    ids = torch.tensor([0] * 5 + [1] * 3 + [-1], dtype=torch.int32, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return segment_mean(x * 2, ids, 2).square().sum()

    plain, compiled = (torch.arange(9.0, device=device).requires_grad_() for _ in range(2))
    loss(plain).backward()  # type: ignore[no-untyped-call]
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert compiled.grad is not None
    assert torch.equal(plain.grad, compiled.grad)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.zeros(3, 1)}, r"expected values \[any\] of float64 or .*, got \[3, 1\] of float32"),
        ({"values": torch.zeros(3).int()}, r"expected values .*got \[3\] of int32"),
        ({"segment_ids": torch.zeros(4).int()}, r"expected segment_ids \[3\] of int32 or int64, got \[4\] of int32"),
        ({"segment_ids": torch.zeros(3)}, r"expected segment_ids .*got \[3\] of float32"),
        ({"mask": torch.zeros(3)}, r"expected mask \[3\] of bool, got \[3\] of float32"),
        ({"num_segments": -1}, r"expected num_segments >= 0, got -1"),
    ],
)
def test_refuses(changed: dict[str, Any], words: str) -> None:
    args: dict[str, Any] = {
        "values": torch.zeros(3),
        "segment_ids": torch.zeros(3).int(),
        "num_segments": 2,
        "mask": None,
        **changed,
    }
    with pytest.raises(ValueError, match=words):
        segment_sum(args["values"], args["segment_ids"], args["num_segments"], mask=args["mask"])
