"""Named checks of ragged sums and means, each a function of the device; see `mutants_segment`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pacenote.kernels import reference
from pacenote.kernels.segment import segment_mean, segment_sum

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
NAN = float("nan")


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def check(
    lengths: list[int],
    device: torch.device,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int32,
    masked: bool = True,
    seed: int = 0,
) -> Tensor:
    """Compare sums, means and gradients with a loop in float64, NaN standing where the mask is not set; gives the sums.

    The error is at most twice that of plain torch's sum of the same numbers, plus one rounding of their magnitude.

    Raises:
        AssertionError: they differ.
    """
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    values = (torch.randn(total, generator=g) * torch.randn(total, generator=g).exp()).to(dtype)
    mask = torch.rand(total, generator=g) < 0.7
    segments = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)] + [-1] * padding, dtype=ids)
    counted = (segments >= 0) & (mask if masked else True)
    spoilt = torch.where(counted, values, NAN).to(device).requires_grad_()
    slope = torch.randn(len(lengths), generator=g)
    where = mask.to(device) if masked else None
    grads = []
    for function, mean in ((segment_sum, False), (segment_mean, True)):
        got = function(spoilt, segments.to(device), len(lengths), mask=where)
        assert (got.shape, got.dtype) == ((len(lengths),), reference.wide(values).dtype)
        for s, result in enumerate(got.tolist()):
            mine = values[counted & (segments == s)]
            share = max(1, len(mine)) if mean else 1
            gold = float(mine.double().sum()) / share
            plain = abs(float(reference.wide(mine).sum()) / share - gold)
            step = torch.finfo(got.dtype).eps * float(mine.double().abs().sum()) / share
            assert abs(result - gold) <= 2 * plain + step, f"segment {s}: {result}, expected {gold}"
        (grad,) = torch.autograd.grad((got * slope.to(device, got.dtype)).sum(), spoilt)
        counts = torch.tensor([max(1, int((counted & (segments == s)).sum())) for s in range(len(lengths))])
        each = slope / counts if mean else slope
        wanted = torch.where(counted, each[segments.long().clamp(min=0)] if lengths else torch.zeros(total), 0.0)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.cpu(), wanted.to(dtype))
        grads.append(got.detach())
    return grads[0]


@named
def sizes(device: torch.device) -> None:
    """Empty segments at any place, one position, a block and one more, several blocks a program."""
    check([1], device)
    check([0, 3, 0, 0, 5, 0], device)
    for n in (511, 512, 513, 4096, 4097, 8192, 8193, 20_000):
        check([7, n, 1], device, seed=n)
    check([2] * 30, device)


@named
def nothing(device: torch.device) -> None:
    """No positions, no segments, padding alone: sums are 0."""
    for lengths, padding in (([], 0), ([], 5), ([0, 0], 0), ([0], 7)):
        assert not check(lengths, device, padding=padding).any()


@named
def padding_counts_nothing(device: torch.device) -> None:
    """Positions of no segment, with a mask and without one."""
    for masked in (False, True):
        check([5, 0, 9, 600], device, padding=300, masked=masked)
        check([5], device, padding=1, masked=masked)


@named
def types(device: torch.device) -> None:
    """Values of every width, ids of both."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for ids in (torch.int32, torch.int64):
            check([40, 700, 3], device, dtype=dtype, ids=ids, padding=2)


@named
def alone_as_among_others(device: torch.device) -> None:
    """A segment's sum is the same bits whatever stands before and behind it, and whenever it is asked for."""
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(0)).to(device)
    alone = segment_sum(values[9_000:19_000], torch.zeros(10_000, dtype=torch.int32, device=device), 1)
    ids = torch.zeros(30_000, dtype=torch.int32, device=device)
    ids[9_000:], ids[19_000:] = 1, 2
    first, second = (segment_sum(values, ids, 3) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[1:2], alone)


@named
def views(device: torch.device) -> None:
    """Strided values, ids and masks."""
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(device)[:, 1]
    ids = torch.arange(40, device=device).div(13, rounding_mode="floor").int().repeat_interleave(2)[::2]
    mask = (torch.arange(80, device=device) % 3 == 0)[::2]
    expected = segment_sum(values.contiguous(), ids.contiguous(), 4, mask=mask.contiguous())
    assert torch.equal(segment_sum(values, ids, 4, mask=mask), expected)


@named
def unknown_segments(device: torch.device) -> None:
    """Ids that are no segment's count nothing and have no gradient, also where 32 bits would wrap them."""
    for last in (3, 7, 2**31 - 1, 2**32, 2**40 + 1):
        ids = torch.tensor([0, 0, 2, 2, last, last], device=device)
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, NAN, 5.0], device=device, requires_grad=True)
        sums = segment_sum(values, ids, 3)
        assert sums.tolist() == [3.0, 0.0, 7.0], (last, sums.tolist())
        (grad,) = torch.autograd.grad(sums.sum(), values)
        assert grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
