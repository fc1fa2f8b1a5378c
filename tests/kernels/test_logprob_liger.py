"""liger-kernel as a back end: what it computes if it is there, and what is refused whether or not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.kernels import logprob_liger
from pacenote.kernels.logprob import linear_logprob


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [9, 16], weight [40, 16], targets [9] of which one is ignored."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(30, (9,), generator=g)
    targets[2] = -100
    hidden, weight = torch.randn(9, 16, generator=g), torch.randn(40, 16, generator=g)
    return hidden.to(device), weight.to(device), targets.to(device)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"vocab_bound": 30}, {"mask": True}])
def test_is_what_chunked_is(options: dict[str, Any], device: torch.device) -> None:
    pytest.importorskip(logprob_liger.MODULE, reason="liger-kernel is not installed, or has no scaled cross entropy")
    hidden, weight, targets = inputs(device)
    hidden[2] = float("nan")
    if "mask" in options:
        options = {"mask": torch.arange(9, device=device) % 2 == 0}
    found = []
    for mode in ("liger", "chunked"):
        pair = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_logprob(pair[0], pair[1], targets, mode=mode, **options)
        grads = torch.autograd.grad(out[0].sum() + 0.3 * out[1].sum(), pair)
        found.append([x.detach() for x in (*out, *grads)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bias": torch.zeros(40)}, "got a bias: use mode='chunked'"),
        ({"temperature": torch.ones(9)}, "got a temperature a token"),
        ({"hidden": torch.zeros(9, 16).double(), "weight": torch.zeros(40, 16).double()}, "got float64"),
    ],
)
def test_refuses(changed: dict[str, Any], words: str) -> None:
    hidden, weight, targets = inputs(torch.device("cpu"))
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "mode": "liger", **changed}
    with pytest.raises(ValueError, match=words):
        linear_logprob(**arguments)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, logprob_liger.MODULE, None)
    hidden, weight, targets = inputs(torch.device("cpu"))
    with pytest.raises(ImportError, match=r"expected liger-kernel 0\.8\.5 or newer for mode='liger'"):
        linear_logprob(hidden, weight, targets, mode="liger")
