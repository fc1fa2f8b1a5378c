"""Named checks of the batch-invariant linear layer, each a function of the device; see `mutants_invariant`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pacenote.kernels.invariant import add_outer, invariant_linear
from tests.kernels.route_oracle import no_worse

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
SIZES = ((1, 5, 3, True), (35, 70, 131, True), (64, 64, 64, False), (17, 33, 1, True))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def close(mine: Tensor, other: Tensor) -> None:
    """Two [...] are equal but for roundings, of products whose sizes or layouts differ."""
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Normal numbers [shape], the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def both_ways(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Result [T, V] and gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = invariant_linear(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@named
def values(device: torch.device) -> None:
    """Result and gradients against float64, tiles that are full, not full and several, with a bias and without."""
    for dtype in FLOATS:
        for tokens, dim, outputs, biased in (
            (1, 5, 3, True),
            (35, 70, 131, True),
            (64, 64, 64, False),
            (17, 33, 1, True),
        ):
            x, weight = (normal(n, dim, seed=i, dtype=dtype, device=device) for i, n in enumerate((tokens, outputs)))
            bias = normal(outputs, seed=2, dtype=dtype, device=device) if biased else None
            grad = normal(tokens, outputs, seed=3, dtype=dtype, device=device)
            given = [t for t in (x, weight, bias) if t is not None]

            def plain(kind: torch.dtype, given: list[Tensor] = given, grad: Tensor = grad) -> list[Tensor]:
                leaves = [t.to(kind).requires_grad_() for t in given]
                out = torch.nn.functional.linear(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

            ours, usual, exact = both_ways(x, weight, bias, grad), plain(dtype), plain(torch.float64)
            assert [o.dtype for o in ours] == [dtype] * len(ours)
            for name, mine, other, exactly in zip(
                ("result", "dx", "dweight", "dbias"), ours, usual, exact, strict=False
            ):
                no_worse(f"{name} of {[tokens, dim, outputs]}", mine, other, exactly, dtype)


@named
def rows_alone(device: torch.device) -> None:
    """A row of the result and of its gradient is the same bits alone, in any part, in any order, before any padding."""
    for dtype in FLOATS:
        x, weight = normal(70, 75, dtype=dtype, device=device), normal(140, 75, seed=1, dtype=dtype, device=device)
        bias, grad = normal(140, seed=2, device=device), normal(70, 140, seed=3, dtype=dtype, device=device)
        whole = both_ways(x, weight, bias, grad)[:2]
        order = torch.randperm(70, generator=torch.Generator().manual_seed(4)).to(device)
        parts: list[slice | Tensor] = [slice(0, 1), slice(69, 70), slice(3, 36), slice(31, 48), order]
        for part in parts:
            alone = both_ways(x[part], weight, bias, grad[part])[:2]
            for name, got, all_rows in zip(("result", "dx"), alone, whole, strict=True):
                assert torch.equal(got, all_rows[part]), f"{name} of {part} {dtype}: other bits"
        loud = torch.cat([x, 1e4 * normal(30, 75, seed=5, dtype=dtype, device=device)])
        assert torch.equal(invariant_linear(loud, weight, bias)[:70], whole[0])


@named
def tokens_in_order(device: torch.device) -> None:
    """The weight's gradient adds token after token: parts of whole tiles, one after another, are the bits of all."""
    for dtype in FLOATS:
        a, b = normal(200, 70, dtype=dtype, device=device), normal(200, 40, seed=1, dtype=dtype, device=device)
        whole, parts, longer = (torch.zeros(70, 40, device=device) for _ in range(3))
        add_outer(whole, a, b)
        for part in (slice(0, 64), slice(64, 192), slice(192, 200)):
            add_outer(parts, a[part], b[part])
        assert torch.equal(whole, parts)
        add_outer(longer, *(torch.cat([t, torch.zeros_like(t[:77])]) for t in (a, b)))
        assert torch.equal(whole, longer)


@named
def strides(device: torch.device) -> None:
    """Views of inputs and gradients give the bits of their copies; a weight of another layout gives close numbers."""
    x, weight = normal(20, 3, 40, device=device)[:, 1], normal(70, 40, seed=1, device=device)
    columns = normal(40, 20, seed=2, device=device).t()
    grad = normal(70, 20, seed=3, device=device).t()
    one = normal(1, 20, device=device).sum().expand(20, 70)  # what sum().backward() gives: strides of 0
    turned = weight.t().contiguous().t()
    for given, slope in ((x, grad), (x, one), (columns, grad)):
        wanted = both_ways(given.contiguous(), weight, None, slope.contiguous())
        for got, want in zip(both_ways(given, weight, None, slope), wanted, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(both_ways(given, turned, None, slope), wanted, strict=True):
            close(got, want)
    assert torch.equal(invariant_linear(x, turned)[:1], invariant_linear(x[:1], turned))


@named
def not_a_number(device: torch.device) -> None:
    """NaN and infinities stay in their row."""
    x, weight = normal(20, 40, device=device), normal(70, 40, seed=1, device=device)
    clean = invariant_linear(x, weight)
    spoilt = x.clone()
    spoilt[3], spoilt[7, 0] = float("nan"), float("inf")
    got = invariant_linear(spoilt, weight)
    assert got[3].isnan().all()
    assert not got[7].isfinite().any()
    rest = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(got[rest], clean[rest])


@named
def sizes(device: torch.device) -> None:
    """No tokens, no inputs, batches of more dimensions, one row given as a vector."""
    weight = normal(70, 40, device=device)
    assert invariant_linear(weight[:0], weight).shape == (0, 70)
    assert not both_ways(weight[:0], weight, None, weight.new_zeros(0, 70))[2].any()
    nothing = invariant_linear(weight.new_zeros(3, 0), weight.new_zeros(5, 0), torch.arange(5.0, device=device))
    assert nothing.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 3
    x = normal(2, 3, 40, device=device)
    assert torch.equal(invariant_linear(x, weight).reshape(6, 70), invariant_linear(x.reshape(6, 40), weight))
    assert torch.equal(invariant_linear(x[1, 2], weight), invariant_linear(x, weight)[1, 2])
