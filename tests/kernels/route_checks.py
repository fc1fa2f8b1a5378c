"""Named checks of routing replay, each a function of the device: pytest runs them, and so does a machine without it.

Each is about one trap; `test_mutants.py` shows which broken kernel each of them catches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pacenote.kernels import reference
from pacenote.kernels.reference import COUNTERS
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec
from tests.kernels.route_oracle import FAMILIES, INF, NAN, Inputs, check, of_family, random

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
SIGMOID = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=1.8)
SOFTMAX = RouterSpec(score="softmax")
GROUPED = RouterSpec(score="sigmoid", groups=4, topk_groups=2)


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def _family(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(of_family(name, dtype=dtype), device)


for _name in FAMILIES:
    for _dtype in (torch.float32, torch.bfloat16, torch.float16):
        CHECKS[f"{_name}-{str(_dtype)[6:]}"] = partial(_family, _name, _dtype)


# --- sizes and types -------------------------------------------------------------------------------------------------


@named
def sizes(device: torch.device) -> None:
    """One token, a block and one more, E and K that are no powers of two, the largest of both, K = E."""
    shapes = ((1, 64, 4), (64, 7, 3), (65, 60, 10), (8, 512, 10), (3, 1024, 32), (2, 1000, 31), (3, 5, 5))
    for tokens, experts, k in shapes:
        check(random(SIGMOID, experts, k, tokens=tokens), device)
        check(random(SOFTMAX, experts, k, tokens=tokens, rows=torch.int64), device)


@named
def no_tokens(device: torch.device) -> None:
    """T = 0 gives empty results, zero stats and an empty gradient."""
    stats = RouteStats.zeros(device, 8)
    logits = torch.zeros(0, 8, device=device, requires_grad=True)
    weights, experts = replay_topk(logits, torch.zeros(0, 2, dtype=torch.uint8, device=device), SOFTMAX, stats=stats)
    weights.sum().backward()  # type: ignore[no-untyped-call]
    assert weights.shape == experts.shape == (0, 2)
    assert logits.grad is not None
    assert logits.grad.shape == (0, 8)
    assert stats.counters.tolist() == [0] * len(COUNTERS)
    assert stats.margin.item() == 0
    assert stats.load is not None
    assert stats.load.tolist() == [0] * 8


@named
def id_types(device: torch.device) -> None:
    """uint8 with 256 experts has no spare value: 255 is an expert. uint16 beyond E, int64 beyond int32."""
    inputs = random(SIGMOID, 256, 8, rows=torch.uint8)
    rows = inputs.rows.clone()
    rows[0] = torch.arange(248, 256).flip(0).to(torch.uint8)
    _, experts = check(replace(inputs, rows=rows), device)
    assert experts[0].tolist() == list(range(255, 247, -1))
    for dtype, wrong in ((torch.uint16, 65535), (torch.int64, 2**32 + 3), (torch.int64, -(2**32) + 3)):
        ids = torch.arange(4).repeat(3, 1)
        ids[1, 2] = wrong
        inputs = Inputs(torch.randn(3, 300, generator=torch.Generator().manual_seed(0)), ids.to(dtype), SIGMOID)
        _, experts = check(inputs, device)
        assert experts[0].tolist() == experts[2].tolist() == [0, 1, 2, 3]


@named
def layer_views(device: torch.device) -> None:
    """Rows and logits that are one layer of many, with NaN and wrong ids between; transposed and expanded views."""
    inputs = random(SIGMOID, 60, 4, tokens=70).on(device)
    logits = torch.full((70, 3, 67), NAN, device=device)
    logits[:, 1, 5:65] = inputs.logits
    rows = torch.full((70, 3, 4), -7, dtype=torch.int32, device=device)
    rows[:, 1] = inputs.rows
    expected = check(inputs, device)
    for view in (
        replace(inputs, logits=logits[:, 1, 5:65], rows=rows[:, 1]),
        replace(inputs, logits=inputs.logits.t().contiguous().t(), rows=inputs.rows.t().contiguous().t()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(check(view, device), expected, strict=True))
    check(replace(inputs, rows=inputs.rows[:1].expand(70, 4), logits=inputs.logits[:1].expand(70, 60)), device)


@named
def far_rows(device: torch.device) -> None:
    """Rows more than 2^31 bytes apart."""
    step = 1_100_000_000
    if device.type == "cpu":
        store = torch.from_numpy(np.zeros(2 * step + 4, np.uint8))  # pages that nobody touches take no memory
    else:
        store = torch.zeros(2 * step + 4, dtype=torch.uint8, device=device)
    rows = store.as_strided((3, 4), (step, 1))
    rows.copy_(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [7, 5, 3, 1]], dtype=torch.uint8))
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(device)
    _, experts = replay_topk(logits, rows, SIGMOID)
    assert experts.tolist() == rows.tolist()


# --- the own choice --------------------------------------------------------------------------------------------------


@named
def ties(device: torch.device) -> None:
    """Equal logits: the lowest index, in every family; logits on a grid tie often, without a bias also exactly."""
    for name in FAMILIES:
        inputs = of_family(name, grid=0.5, tokens=14)
        check(replace(inputs, bias=None), device, exact=True)
        flat = torch.zeros_like(inputs.logits)
        same = None if inputs.bias is None else torch.zeros_like(inputs.bias)
        state = torch.full((14,), FREE, dtype=torch.uint8)
        given = replace(inputs, logits=flat, bias=same, state=state).on(device)
        _, experts = replay_topk(given.logits, given.rows, given.spec, state=given.state, bias=given.bias)
        assert (experts.cpu() == torch.arange(experts.shape[1])).all()


@named
def order_of_logits(device: torch.device) -> None:
    """Saturated sigmoids and underflown softmaxes do not tie if their logits differ; -0 ties with 0 alone."""
    for spec in (SIGMOID, SOFTMAX):
        for values in (
            [30.0, 40.0, 35.0, 50.0, 45.0, 20.0],
            [-300.0, -200.0, 0.0, -250.0, -260.0, -400.0],
            [-0.0, 0.0, 0.0, -0.0, -1e-30, 1e-45],
            [-1e-45, -3e-45, -2e-39, -1.0, -1e-38, -1e-44],
        ):
            logits = torch.tensor([values])
            rows = torch.full((1, 5), -1)
            order = sorted(range(6), key=lambda e, v=values: (-v[e], e))  # type: ignore[misc]
            stats = RouteStats.zeros(device)
            _, experts = replay_topk(logits.to(device), rows.to(device), spec, stats=stats)
            assert experts.tolist() == [order[:5]], (values, experts.tolist())


@named
def infinities_and_nan(device: torch.device) -> None:
    """-inf logits, whole rows of them, NaN (counts as the largest, lowest index first), +inf."""
    g = torch.Generator().manual_seed(3)
    for spec in (SIGMOID, SOFTMAX, RouterSpec(score="softmax_topk"), GROUPED, replace(GROUPED, score="softmax")):
        inputs = random(spec, 40, 4, tokens=24, grid=0.25)
        logits, hit = inputs.logits, torch.rand(24, 40, generator=g)
        logits[hit < 0.5] = -INF
        logits[1] = -INF
        logits[4, :37] = -INF
        logits[8, 5] = logits[8, 31] = NAN
        logits[9] = NAN
        logits[10, 33] = INF
        logits[12, 3], logits[12, 30] = INF, NAN
        state = torch.where(torch.arange(24) % 2 == 0, FREE, REPLAY).to(torch.uint8)
        for kind in (state, 1 - state):
            check(replace(inputs, state=kind), device, exact=True)


@named
def bias_selects_only(device: torch.device) -> None:
    """A bias decides who is chosen, and reaches no weight."""
    logits = torch.zeros(2, 6)
    bias = torch.tensor([0.0, 3.0, 1.0, -INF, 2.0, 1.0])
    rows = torch.tensor([[-1, 0, 0], [0, 3, 5]])
    weights, experts = check(Inputs(logits, rows, RouterSpec(score="sigmoid"), bias=bias), device, exact=True)
    assert experts.tolist() == [[1, 4, 2], [0, 3, 5]]
    assert weights.tolist() == [[0.5] * 3] * 2


@named
def groups(device: torch.device) -> None:
    """Closed groups give nothing, whatever their best; the three group scores differ; equal groups: the lowest."""
    logits = torch.tensor(
        [[9.0, -9.0, 1.0, 1.0, 2.0, 0.5, 1.5, 1.4], [0.0] * 8, [1.0, 1.0, 0.0, 3.0, -1.0, 0.0, 3.0, 0.0]]
    )
    rows = torch.full((3, 2), -1)
    for group_score, expected in (
        ("top2", [[6, 7], [0, 1], [3, 2]]),
        ("max", [[0, 1], [0, 1], [3, 2]]),
        ("topk_share", [[6, 7], [0, 1], [3, 2]]),
    ):
        spec = RouterSpec(score="softmax_topk", groups=4, topk_groups=1, group_score=group_score)  # type: ignore[arg-type]
        _, experts = check(Inputs(logits, rows, spec), device, exact=True)
        assert experts.tolist() == expected, (group_score, experts.tolist())
    spec = RouterSpec(score="sigmoid", groups=3, topk_groups=2, group_score="topk_share")
    for experts_, k in ((384, 8), (96, 10), (9, 6), (15, 5)):
        check(random(spec, experts_, k, bias=True), device)
    check(random(replace(spec, groups=16, topk_groups=16), 64, 8, grid=0.5), device, exact=True)


# --- recorded rows ---------------------------------------------------------------------------------------------------


@named
def recorded_order(device: torch.device) -> None:
    """Experts come back in the order of the record, whatever their scores, and are counted as not flipped."""
    logits = torch.arange(12.0).repeat(2, 1)
    rows = torch.tensor([[9, 11, 8, 10], [7, 11, 10, 9]])  # 7 is the best that is not among the best four
    stats = RouteStats.zeros(device)
    _, experts = replay_topk(logits.to(device), rows.to(device), SIGMOID, stats=stats)
    assert experts.tolist() == rows.tolist()
    assert stats.counts() == {
        "replayed": 2, "free": 0, "duplicate": 0, "out_of_range": 0, "pad": 0, "flipped": 1, "overlap": 7, "missing": 0,
    }  # fmt: skip


@named
def invalid_rows(device: torch.device) -> None:
    """Missing, partly missing, repeated and out-of-range rows are routed freely, and counted by the first reason."""
    rows = torch.tensor([[-1, -1, -1], [2, -1, 3], [4, 5, 4], [0, 1, 6], [6, 6, 1], [-1, 7, 7], [0, 0, 0], [5, 0, 3]])
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    stats = RouteStats.zeros(device)
    _, experts = replay_topk(logits.to(device), rows.to(device), SIGMOID, stats=stats)
    own = logits.sort(dim=1, descending=True).indices[:, :3]
    assert experts[:7].tolist() == own[:7].tolist()
    assert experts[7].tolist() == [5, 0, 3]
    assert stats.counters.tolist()[:5] == [1, 3, 2, 2, 0]
    check(Inputs(logits, rows, SIGMOID), device)


@named
def padding(device: torch.device) -> None:
    """Padding: distinct experts spread over all, zero weight and gradient, no count; NaN there reaches nothing."""
    tokens, experts_ = 48, 24
    logits = torch.full((tokens, experts_), NAN)
    rows = torch.full((tokens, 3), 200, dtype=torch.uint8)
    state = torch.full((tokens,), PAD, dtype=torch.uint8)
    for spec in (SIGMOID, SOFTMAX, RouterSpec(score="softmax_topk")):
        _, experts = check(Inputs(logits, rows, spec, state), device)
        load = torch.bincount(experts.flatten(), minlength=experts_)
        assert load.tolist() == [tokens * 3 // experts_] * experts_


@named
def counts_add_up(device: torch.device) -> None:
    """Stats are added to in place; asking for them changes no result; every row has one fate, every pair an expert."""
    inputs = of_family("deepseek-v3", tokens=70).on(device)
    stats, given = RouteStats.zeros(device, 256), {"state": inputs.state, "bias": inputs.bias}
    outs = [replay_topk(inputs.logits, inputs.rows, inputs.spec, stats=s, **given) for s in (None, stats, stats)]
    assert all(torch.equal(a, b) for out in outs[1:] for a, b in zip(out, outs[0], strict=True))
    once, fewer = RouteStats.zeros(device, 256), RouteStats.zeros(device)
    for counted in (once, fewer):
        replay_topk(inputs.logits, inputs.rows, inputs.spec, stats=counted, **given)
    assert stats.counters.tolist() == [2 * n for n in once.counters.tolist()]
    assert sum(once.counters.tolist()[:5]) == 70
    assert min(once.counters.tolist()) > 0
    assert fewer.counters.tolist() == once.counters.tolist()
    assert fewer.margin.item() == once.margin.item() == stats.margin.item() / 2 > 0
    assert stats.load is not None
    assert once.load is not None
    assert torch.equal(stats.load, 2 * once.load)
    assert int(once.load.sum()) == 8 * (70 - once.counts()["pad"])
    stats.reset()
    assert not any(stats.counts().values())
    assert stats.margin.item() == 0
    assert not stats.load.any()


@named
def missing_rows(device: torch.device) -> None:
    """Missing: rows with a negative id that were to be replayed; not the free ones, not padding."""
    rows = torch.tensor([[-1, -1], [0, -5], [-1, 9], [-1, -1], [-1, 2], [-1, -1], [1, 2]])
    state = torch.tensor([REPLAY, REPLAY, REPLAY, FREE, FREE, PAD, FREE], dtype=torch.uint8)
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    for given, free, missing in ((state, 6, 3), (None, 6, 6)):
        stats = RouteStats.zeros(device)
        on = Inputs(logits, rows, SIGMOID, given).on(device)
        replay_topk(on.logits, on.rows, SIGMOID, state=on.state, stats=stats)
        counts = stats.counts()
        assert (counts["free"], counts["missing"]) == (free, missing)
        check(Inputs(logits, rows, SIGMOID, given), device)


def _margin(inputs: Inputs, device: torch.device) -> float:
    """The margin of the rows, after they were compared with the definition."""
    check(inputs, device)
    given, stats = inputs.on(device), RouteStats.zeros(device)
    replay_topk(given.logits, given.rows, given.spec, state=given.state, bias=given.bias, stats=stats)
    return stats.margin.item()


@named
def margins(device: torch.device) -> None:
    """The K-th best less the worst that is recorded, over flipped rows, in units of what selects."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 4.0, 8.0, 16.0]])
    for ids, margin in (([5, 4], 0), ([4, 5], 0), ([5, 3], 4), ([3, 5], 4), ([0, 5], 8), ([3, 1], 7), ([5, 5], 0)):
        assert _margin(Inputs(logits, torch.tensor([ids]), SOFTMAX), device) == margin, ids
    bias = torch.tensor([0.0, 0.0, 0.25, 1.0, 0.5, 0.0])
    flat = Inputs(torch.zeros(1, 6), torch.tensor([[4, 2]]), SIGMOID, bias=bias)
    assert _margin(flat, device) == 0.25  # 1.5 and 1 are chosen, 0.75 is the worst that is recorded
    for state in (FREE, PAD):
        still = replace(flat, state=torch.full((1,), state, dtype=torch.uint8))
        assert _margin(still, device) == 0
    many = Inputs(logits.repeat(70, 1), torch.tensor([[5, 3], [0, 5]]).repeat(35, 1), SOFTMAX)
    assert _margin(many, device) == 35 * 12
    stats, on = RouteStats.zeros(device), many.on(device)
    assert math.isnan(stats.mean_margin())
    replay_topk(on.logits, on.rows, SOFTMAX, stats=stats)
    assert stats.mean_margin() == 6


@named
def margins_of_odd_rows(device: torch.device) -> None:
    """Ties are 0; so is what is not finite, and an expert of a closed group that beats the open ones."""
    for values, ids, margin in (
        ([1.0, 1.0, 1.0, 0.0], [2, 1], 0),
        ([1.0, -0.0, 0.0, 0.0], [0, 3], 0),
        ([2.0, 1.0, 0.5, -INF], [0, 3], 0),
        ([INF, INF, 0.0, 1.0], [0, 3], 0),
        ([NAN, NAN, 0.0, 1.0], [0, 3], 0),
        ([NAN, 2.0, 1.5, -1.0], [0, 3], 3),
        ([NAN, NAN, NAN, 1.0], [2, 1], 0),
    ):
        assert _margin(Inputs(torch.tensor([values]), torch.tensor([ids]), SOFTMAX), device) == margin, values
    logits = torch.tensor([[9.0, -9.0, 3.0, 2.0, 1.0, 0.5, -INF, -INF]])
    spec = RouterSpec(score="softmax_topk", groups=4, topk_groups=1)  # sums 0, 5, 1.5 and -inf: the second is open
    for ids, margin in (([2, 3], 0), ([2, 0], 0), ([2, 4], 1), ([0, 1], 11), ([2, 7], 0)):
        assert _margin(Inputs(logits, torch.tensor([ids]), spec), device) == margin, ids


@named
def loads(device: torch.device) -> None:
    """Tokens per expert: replayed pairs and freely chosen ones, no padding, also of whole blocks of padding."""
    logits = torch.arange(6.0).repeat(200, 1)
    rows = torch.tensor([[0, 1], [2, 0], [-1, 0], [3, 3], [4, 9]], dtype=torch.int32).repeat(40, 1)
    state = torch.full((200,), PAD, dtype=torch.uint8)
    state[:5] = state[195:] = REPLAY
    state[196] = FREE
    stats = RouteStats.zeros(device, 6)
    given = Inputs(logits, rows, SIGMOID, state).on(device)
    replay_topk(given.logits, given.rows, SIGMOID, state=given.state, stats=stats)
    assert stats.load is not None
    assert stats.load.tolist() == [3, 2, 1, 0, 7, 7]
    all_to_one = Inputs(torch.zeros(300, 1), torch.zeros(300, 1, dtype=torch.uint8), SOFTMAX)
    check(all_to_one, device)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@named
def renormalisation(device: torch.device) -> None:
    """The flag decides, also for K = 1; eps is in the sum; faint scores keep their digits."""
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    for spec, expected in (
        (RouterSpec(score="sigmoid"), torch.sigmoid(torch.tensor(2.0)).item()),
        (RouterSpec(score="sigmoid", renormalize=True), 1.0),
        (RouterSpec(score="softmax"), logits.softmax(1)[0, 1].item()),
        (RouterSpec(score="softmax_topk"), 1.0),
        (RouterSpec(score="softmax_topk", renormalize=True, eps=1.0), 0.5),
    ):
        weights, _ = check(Inputs(logits, torch.tensor([[1]]), spec), device)
        assert abs(weights.item() - expected) < 1e-6
    inputs = random(SIGMOID, 64, 4)
    for shift in (-20.0, -60.0, 20.0):
        check(replace(inputs, logits=inputs.logits + shift), device)


@named
def narrow_scores(device: torch.device) -> None:
    """Scores in the logits' dtype: every step is rounded; scores that round alike tie if scores select."""
    for name in ("narrow-sigmoid", "narrow-softmax", "gpt-oss"):
        inputs = of_family(name, dtype=torch.bfloat16)
        weights, _ = check(replace(inputs, spec=replace(inputs.spec, weight_dtype="float32")), device)
        assert torch.equal(weights, weights.bfloat16().float())
    logits = torch.tensor([[5.0, 9.0, 8.0, 12.0, -1.0]], dtype=torch.bfloat16)
    spec, bias, missing = RouterSpec(score="sigmoid", score_dtype="logits"), torch.zeros(5), torch.full((1, 3), -1)
    for given, chosen in ((bias, [1, 2, 3]), (None, [3, 1, 2])):
        _, experts = check(Inputs(logits, missing, spec, bias=given), device, exact=True)
        assert experts.tolist() == [chosen]


@named
def repeats_itself(device: torch.device) -> None:
    """The same bits twice, and for a row alone as among others."""
    for name in ("deepseek-v3", "qwen3-plain", "gpt-oss"):
        inputs = of_family(name).on(device)
        first, second = check(inputs, device), check(inputs, device)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        one = replace(inputs, logits=inputs.logits[:1], rows=inputs.rows[:1], state=inputs.state[:1])  # type: ignore[index]
        alone = replay_topk(one.logits, one.rows, one.spec, state=one.state, bias=one.bias)
        assert all(torch.equal(a, b[:1]) for a, b in zip(alone, first, strict=True))


@named
def spread_is_the_definition(device: torch.device) -> None:
    """Padding far down a batch still follows the definition, also where t K is beyond E."""
    state = torch.full((200,), PAD, dtype=torch.uint8, device=device)
    logits, rows = torch.zeros(200, 60, device=device), torch.zeros(200, 7, dtype=torch.uint8, device=device)
    _, experts = replay_topk(logits, rows, SOFTMAX, state=state)
    assert torch.equal(experts, reference.pad_experts(200, 7, 60, device))
