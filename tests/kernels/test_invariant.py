"""The batch-invariant linear layer: every check of `invariant_checks`, random shapes, autograd, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacenote.kernels import launch
from pacenote.kernels.invariant import invariant_linear
from tests.kernels.invariant_checks import CHECKS, both_ways, normal

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@settings(
    max_examples=30 if launch.INTERPRETED else 100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    tokens=st.integers(1, 50),
    dim=st.sampled_from((1, 2, 8, 17, 64, 100)),
    outputs=st.sampled_from((1, 2, 3, 16, 65, 130)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    data=st.data(),
)
def test_any_rows(
    tokens: int, dim: int, outputs: int, dtype: torch.dtype, data: st.DataObject, device: torch.device
) -> None:
    """Rows picked at random, in any order and any number, are the bits they are among all."""
    x, weight = (
        normal(tokens, dim, dtype=dtype, device=device),
        normal(outputs, dim, seed=1, dtype=dtype, device=device),
    )
    grad = normal(tokens, outputs, seed=2, dtype=dtype, device=device)
    picked = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=60))
    some = both_ways(x[picked], weight, None, grad[picked])
    whole = both_ways(x, weight, None, grad)
    assert torch.equal(some[0], whole[0][picked])
    assert torch.equal(some[1], whole[1][picked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_s_place(dtype: torch.dtype, device: torch.device) -> None:
    """The same row is the same bits in every place, whatever kernel a library has for a shape."""
    depths, widths = (
        ((9, 100), (3, 65)) if launch.INTERPRETED else ((*range(1, 34), 64, 100, 491), (1, 2, 3, 8, 17, 65))
    )
    for dim in depths:
        for outputs in widths:
            x, weight = (normal(1, dim, dtype=dtype, device=device), normal(outputs, dim, dtype=dtype, device=device))
            out = invariant_linear(x.expand(37, dim), weight)
            assert torch.equal(out, out[:1].expand_as(out)), (dim, outputs)
            assert torch.equal(out[:1], invariant_linear(x, weight)), (dim, outputs)


def test_gradcheck(device: torch.device) -> None:
    x, weight, bias = (
        normal(*s, seed=i, dtype=torch.float64, device=device).requires_grad_()
        for i, s in enumerate(((2, 9, 4), (7, 4), (7,)))
    )
    assert torch.autograd.gradcheck(invariant_linear, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = normal(5, 4, dtype=dtype, device=device), normal(7, 4, seed=1, dtype=dtype, device=device)
    for bias in (None, normal(7, seed=2, device=device)):
        leaves = [t if t is None else t.requires_grad_() for t in (x.detach(), weight.detach(), bias)]
        torch.library.opcheck(torch.ops.pacenote.invariant_linear.default, tuple(leaves))


def test_only_the_gradients_that_are_wanted(device: torch.device) -> None:
    given_three = normal(5, 4, device=device), normal(7, 4, seed=1, device=device), normal(7, seed=2, device=device)
    leaves = [t.clone().requires_grad_() for t in given_three]
    wanted = torch.autograd.grad(invariant_linear(*leaves).sum(), leaves)
    for i in range(3):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate(given_three)]
        (got,) = torch.autograd.grad(invariant_linear(*some).sum(), some[i])
        assert torch.equal(got, wanted[i])
    assert not invariant_linear(*given_three).requires_grad


def test_compiles_whole(device: torch.device) -> None:
    x, weight = normal(5, 4, device=device), normal(7, 4, seed=1, device=device)
    plain, compiled = (weight.clone().requires_grad_() for _ in range(2))

    def loss(w: torch.Tensor) -> torch.Tensor:
        return invariant_linear(x * 2, w).square().sum()

    loss(plain).backward()  # type: ignore[no-untyped-call]
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert compiled.grad is not None
    assert torch.equal(plain.grad, compiled.grad)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(3, 5)}, r"expected x \[\.\.\., 4\] of float32 for this weight, got \[3, 5\] of float32"),
        ({"x": torch.zeros(3, 4).double()}, r"expected x .*got \[3, 4\] of float64"),
        ({"x": torch.zeros(())}, r"expected x .*got \[\] of float32"),
        ({"weight": torch.zeros(4)}, r"expected weight \[any, any\] of float64 or .*, got \[4\] of float32"),
        ({"weight": torch.zeros(7, 4).int()}, r"expected weight .*got \[7, 4\] of int32"),
        ({"bias": torch.zeros(6)}, r"expected bias \[7\] of .*got \[6\] of float32"),
    ],
)
def test_refuses(changed: dict[str, Any], words: str) -> None:
    args: dict[str, Any] = {"x": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": None, **changed}
    with pytest.raises(ValueError, match=words):
        invariant_linear(args["x"], args["weight"], args["bias"])
