"""Named checks of the sort of pairs by expert, each a function of the device; see `route_checks`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pacenote.kernels.permute import Permutation, permutation

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def check(experts: Tensor, num_experts: int) -> Permutation:
    """Sort experts [T, K], and compare with numpy's stable sort.

    Raises:
        AssertionError: they differ.
    """
    out = permutation(experts, num_experts)
    ids = experts.long().cpu().numpy().reshape(-1)
    bins = np.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    order = np.argsort(bins, kind="stable")
    assert {part.dtype for part in (out.order, out.place, out.offsets, out.token)} == {torch.int32}
    assert out.place.shape == experts.shape
    assert np.array_equal(out.offsets.cpu().numpy(), np.searchsorted(bins[order], np.arange(num_experts + 1))), (
        "offsets"
    )
    assert np.array_equal(out.order.cpu().numpy(), order), "order"
    assert np.array_equal(out.place.cpu().numpy().reshape(-1)[order], np.arange(len(order))), "place"
    assert np.array_equal(out.token.cpu().numpy(), order // experts.shape[1]), "token"
    return out


def random(
    tokens: int,
    k: int,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.int32,
    dropped: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Experts [T, K] of which the share `dropped` are ids that no expert has."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, k), generator=g)
    wrong = torch.randint(num_experts, torch.iinfo(dtype).max, (tokens, k), generator=g) if dropped else ids
    if dtype in (torch.int32, torch.int64):
        wrong = torch.where(torch.rand(tokens, k, generator=g) < 0.5, -wrong, wrong)
    return torch.where(torch.rand(tokens, k, generator=g) < dropped, wrong, ids).to(dtype).to(device)


@named
def by_hand(device: torch.device) -> None:
    """Pairs of one expert keep their order; dropped ones stand at the end in theirs."""
    experts = torch.tensor([[2, 0], [1, 2], [-1, 0], [7, 1]], device=device)
    out = check(experts, 3)
    assert out.order.tolist() == [1, 5, 2, 7, 0, 3, 4, 6]
    assert out.place.tolist() == [[4, 0], [2, 5], [6, 1], [7, 3]]
    assert out.offsets.tolist() == [0, 2, 4, 6]
    assert out.token.tolist() == [0, 2, 1, 3, 0, 1, 2, 3]


@named
def sizes(device: torch.device) -> None:
    """One pair, a chunk and one more or less, several chunks; K and E of one, no powers of two, the largest."""
    for tokens, k, num_experts in (
        (1, 1, 1), (1, 1, 5), (3, 2, 1), (127, 1, 7), (128, 1, 8), (129, 1, 9), (511, 1, 3), (512, 1, 6), (513, 1, 2),
        (64, 4, 64), (90, 10, 60), (700, 2, 30), (200, 8, 254), (200, 8, 255), (200, 8, 256), (50, 32, 1024),
        (70, 31, 1000), (1300, 3, 17),
    ):  # fmt: skip
        check(random(tokens, k, num_experts, device=device), num_experts)


@named
def no_tokens(device: torch.device) -> None:
    """T = 0 gives empty orders and offsets of 0."""
    out = check(torch.zeros(0, 3, dtype=torch.uint8, device=device), 5)
    assert out.order.shape == out.token.shape == (0,)
    assert out.offsets.tolist() == [0] * 6


@named
def id_types(device: torch.device) -> None:
    """Every type, with all its values: 255 of 256 experts is one; ids beyond E, below 0, beyond 32 bits are dropped."""
    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.int64):
        for num_experts in (64, 256):
            check(random(150, 4, num_experts, dtype=dtype, device=device), num_experts)
        check(random(150, 4, 64, dtype=dtype, dropped=0.3, device=device), 64)
    far = torch.tensor([[2**32 + 1, 1], [-(2**32) + 1, 0], [2**63 - 1, -(2**63)]], device=device)
    assert check(far, 2).order.tolist() == [3, 1, 0, 2, 4, 5]
    assert check(torch.full((3, 1), 65535, device=device, dtype=torch.int32).to(torch.uint16), 1024).offsets[-1] == 0


@named
def dropped(device: torch.device) -> None:
    """E itself is no expert; all pairs dropped, or none; dropped pairs in each chunk."""
    everything = torch.arange(-2, 6, dtype=torch.int32, device=device).repeat(200, 1)
    out = check(everything, 4)
    assert out.offsets.tolist() == [0, 200, 400, 600, 800]
    assert out.order[800:804].tolist() == [0, 1, 6, 7]
    assert check(torch.full((300, 2), 4, device=device), 4).order.tolist() == list(range(600))
    assert check(torch.full((300, 2), -1, device=device), 4).offsets.tolist() == [0] * 5
    check(random(700, 2, 5, dropped=0.9, device=device), 5)


@named
def uneven(device: torch.device) -> None:
    """All pairs to one expert, first or last; long runs; experts that nobody asks for."""
    for expert in (0, 3, 7):
        out = check(torch.full((600, 2), expert, device=device), 8)
        assert out.order.tolist() == list(range(1200))
        assert out.offsets.tolist() == [0] * (expert + 1) + [1200] * (8 - expert)
    check((torch.arange(1400, device=device) // 100 % 5)[:, None], 8)
    check((torch.arange(1400, device=device) % 3 * 7)[:, None], 24)


@named
def layer_views(device: torch.device) -> None:
    """One layer of many, a transposed view, every second column, one row for all: the same as a copy of it."""
    store = torch.full((3, 130, 5, 8), 9, dtype=torch.uint8, device=device)
    store[1, :, 2] = random(130, 8, 60, dtype=torch.uint8, device=device)
    for view in (
        store[1, :, 2],
        store[1, :30, 2].t(),
        store[1, :, 2, ::2],
        store[1, ::3, 2],
        store[1, :, 2][:1].expand(130, 8),
    ):
        mine, copied = check(view, 60), permutation(view.contiguous(), 60)
        assert torch.equal(mine.order, copied.order)


@named
def far_rows(device: torch.device) -> None:
    """Rows more than 2^31 bytes apart."""
    step = 1_100_000_000
    if device.type == "cpu":
        store = torch.from_numpy(np.zeros(2 * step + 4, np.uint8))  # pages that nobody touches take no memory
    else:
        store = torch.zeros(2 * step + 4, dtype=torch.uint8, device=device)
    experts = store.as_strided((3, 4), (step, 1))
    experts.copy_(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [7, 5, 3, 1]], dtype=torch.uint8))
    check(experts, 8)


@named
def repeats_itself(device: torch.device) -> None:
    """The same bits each time."""
    experts = random(900, 8, 128, device=device)
    first = check(experts, 128)
    for _ in range(3):
        again = permutation(experts, 128)
        for name in ("order", "place", "offsets"):
            assert torch.equal(getattr(again, name), getattr(first, name)), name
