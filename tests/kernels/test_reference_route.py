"""The definition of routing replay, against one row at a time in Python floats, and against transformers' routers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels import reference
from pacenote.kernels.reference import COUNTERS
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec

REPLAYED, FREED, DUPLICATE, OUT_OF_RANGE, PADDED = range(5)
NAN, INF = float("nan"), float("inf")
# No two sums of scores of these are equal by accident, so ties are exactly those of equal logits and biases.
LOGITS = (0.0, 0.0, 0.31, 1.13, 2.02, -0.77, -INF, NAN)
CASES = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# --- one row, in Python ----------------------------------------------------------------------------------------------


def naive_scores(row: list[float], spec: RouterSpec) -> list[float]:
    """[E]."""
    if spec.score in ("softmax_topk", "sparsemixer"):
        return row
    if spec.score == "sigmoid":
        return [x if math.isnan(x) else (0.0 if x == -INF else 1 / (1 + math.exp(-x))) for x in row]
    top = max(row)
    if any(map(math.isnan, row)) or math.isinf(top):
        return [NAN] * len(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def best_first(values: list[float]) -> list[int]:
    """Indices by falling value, NaN before everything, ties by index."""
    return sorted(range(len(values)), key=lambda i: (0, 0.0, i) if math.isnan(values[i]) else (1, -values[i], i))


def naive_selection(row: list[float], spec: RouterSpec, bias: list[float] | None) -> list[float]:
    """[E]; without bias and groups the logits decide, since every score grows with its logit."""
    if bias is None and spec.groups == 1:
        return row
    return [s + b for s, b in zip(naive_scores(row, spec), bias or [0.0] * len(row), strict=True)]


def naive_closed(select: list[float], k: int, spec: RouterSpec) -> list[float]:
    """[E], -inf in closed groups."""
    if spec.groups == 1:
        return select
    size = len(select) // spec.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(spec.groups)]
    ranks = []
    for group in members:
        best = [select[group[i]] for i in best_first([select[e] for e in group])]
        depth = {"max": 1, "top2": 2, "topk_share": max(k // spec.topk_groups, 1)}[spec.group_score]
        ranks.append(sum(best[1:depth], best[0]))
    opened = [e for g in best_first(ranks)[: spec.topk_groups] for e in members[g]]
    return [s if e in opened else -INF for e, s in enumerate(select)]


def naive_choice(row: list[float], k: int, spec: RouterSpec, bias: list[float] | None) -> list[int]:
    """[K]."""
    return best_first(naive_closed(naive_selection(row, spec, bias), k, spec))[:k]


def naive_margin(row: list[float], ids: list[int], spec: RouterSpec, bias: list[float] | None) -> float:
    """The K-th best less the worst of `ids`, of a row whose choice is another set."""
    select = naive_selection(row, spec, bias)
    closed = naive_closed(select, len(ids), spec)
    last = closed[best_first(closed)[len(ids) - 1]]
    margin = last - select[ids[best_first([select[e] for e in ids])[-1]]]
    return max(margin, 0.0) if math.isfinite(margin) else 0.0


def naive_sparsemixer(row: list[float], experts: list[int], jitter: float) -> list[float]:
    """[K]; each expert in turn among those near or above it, the earlier ones left out."""
    weights = []
    for n, chosen in enumerate(experts):
        top, gates = row[chosen], []
        for e, x in enumerate(row):
            size = NAN if math.isnan(top) or math.isnan(x) else max(abs(x), top)
            # Otherwise the quotient is no number or below 0, and so not above the threshold.
            far = (top - x) / size > 2 * jitter if size and math.isfinite(top - x) else False
            gates.append(-INF if e in experts[:n] or far else x)
        weights.append(naive_scores(gates, RouterSpec(score="softmax"))[chosen])
    return weights


def naive_weights(row: list[float], experts: list[int], spec: RouterSpec) -> list[float]:
    """[K]."""
    if spec.score == "softmax_topk":
        w = naive_scores([row[e] for e in experts], RouterSpec(score="softmax"))
    elif spec.score == "sparsemixer":
        w = naive_sparsemixer(row, experts, spec.jitter)
    else:
        scores = naive_scores(row, spec)
        w = [scores[e] for e in experts]
    if spec.renormalize:
        total = math.fsum(w) + spec.eps
        w = [x / total if total else NAN for x in w]
    return [x * spec.scale for x in w]


def naive_fate(ids: list[int], experts: int, state: int) -> int:
    if state == PAD:
        return PADDED
    if state == FREE or any(e < 0 for e in ids):
        return FREED
    if any(e >= experts for e in ids):
        return OUT_OF_RANGE
    return DUPLICATE if len(set(ids)) < len(ids) else REPLAYED


@st.composite
def specs(draw: st.DrawFn, experts: int, k: int) -> RouterSpec:
    splits = [
        (groups, opened)
        for groups in range(1, experts + 1)
        for opened in range(1, groups + 1)
        if experts % groups == 0 and experts // groups * opened >= k
    ]
    groups, opened = draw(st.sampled_from(splits))
    score: Any = draw(st.sampled_from(("softmax", "sigmoid", "softmax_topk", "sparsemixer")))
    return RouterSpec(
        score=score,
        jitter=draw(st.sampled_from((0.0, 0.01, 0.3, 0.8))) if score == "sparsemixer" else 0.0,
        renormalize=draw(st.booleans()),
        eps=draw(st.sampled_from((0.0, 1e-20, 0.1))),
        scale=draw(st.sampled_from((1.0, 1.8))),
        groups=groups,
        topk_groups=opened,
        group_score=draw(st.sampled_from(("top2", "topk_share", "max"))),
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from((1, 2, 4, 6, 8, 12)))
    k, tokens = draw(st.integers(1, min(experts, 5))), draw(st.integers(0, 5))
    row = st.lists(st.sampled_from(LOGITS[: draw(st.integers(5, 8))]), min_size=experts, max_size=experts)
    ids = st.one_of(
        st.permutations(range(experts)).map(lambda p: p[:k]),
        st.lists(st.integers(-1, experts + 1), min_size=k, max_size=k),
    )
    bias = st.lists(st.sampled_from((0.0, 0.0, 0.17, -0.41)), min_size=experts, max_size=experts)
    return {
        "spec": draw(specs(experts, k)),
        "logits": [draw(row) for _ in range(tokens)],
        "rows": [draw(ids) for _ in range(tokens)],
        "states": draw(st.none() | st.lists(st.sampled_from((FREE, REPLAY, PAD)), min_size=tokens, max_size=tokens)),
        "bias": draw(st.none() | bias),
        "shape": (tokens, experts, k),
    }


def tensors(case: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    tokens, experts, k = case["shape"]
    logits = torch.tensor(case["logits"], dtype=torch.float64, device=device).reshape(tokens, experts)
    rows = torch.tensor(case["rows"], dtype=torch.int64, device=device).reshape(tokens, k)
    state = None if case["states"] is None else torch.tensor(case["states"], dtype=torch.uint8, device=device)
    bias = None if case["bias"] is None else torch.tensor(case["bias"], dtype=torch.float64, device=device)
    return logits, rows, state, bias


# --- the definition against it ---------------------------------------------------------------------------------------


@CASES
@given(case=cases())
def test_every_row_is_what_one_row_alone_would_be(case: dict[str, Any], device: torch.device) -> None:
    tokens, experts, k = case["shape"]
    spec, states = case["spec"], case["states"] or [REPLAY] * tokens
    logits, rows, state, bias = tensors(case, device)
    out = reference.replay_topk(logits, rows, spec, state=state, bias=bias)
    assert out.experts.shape == out.weights.shape == out.native.shape == (tokens, k)
    counts, load, margins = dict.fromkeys(COUNTERS, 0), [0] * experts, []
    for t, (row, ids, code) in enumerate(zip(case["logits"], case["rows"], states, strict=True)):
        fate = naive_fate(ids, experts, code)
        own = naive_choice(row, k, spec, case["bias"])
        chosen = {REPLAYED: ids, PADDED: [(t * k + j) % experts for j in range(k)]}.get(fate, own)
        values = [0.0] * k if fate == PADDED else naive_weights(row, chosen, spec)
        assert int(out.fate[t]) == fate
        assert out.experts[t].tolist() == chosen
        wanted = torch.tensor(values, dtype=torch.float64)
        assert torch.allclose(out.weights[t].cpu(), wanted, 1e-12, 1e-14, equal_nan=True)
        if fate != PADDED:
            assert out.native[t].tolist() == own
        counts[COUNTERS[fate]] += 1
        counts["missing"] += code == REPLAY and min(ids) < 0
        for expert in chosen if fate != PADDED else ():
            load[expert] += 1
        if fate == REPLAYED:
            counts["flipped"] += set(ids) != set(own)
            counts["overlap"] += len(set(ids) & set(own))
            margins.append(naive_margin(row, ids, spec, case["bias"]) if set(ids) != set(own) else 0.0)
    assert dict(zip(COUNTERS, reference.route_counts(out, rows).tolist(), strict=True)) == counts
    assert reference.route_load(out, experts).tolist() == load
    margin = reference.route_margin(out, logits, rows, spec, bias).item()
    assert margin == pytest.approx(math.fsum(margins), rel=1e-12, abs=1e-14)
    stats = RouteStats.zeros(device, experts)
    for times in (1, 2):  # the op adds to the counts, and gives what the definition gives
        weights, chosen_ids = replay_topk(logits, rows, spec, state=state, bias=bias, stats=stats)
        assert torch.equal(weights.nan_to_num(), out.weights.nan_to_num())
        assert torch.equal(chosen_ids, out.experts)
        assert stats.counts() == {name: times * count for name, count in counts.items()}
        assert stats.margin.item() == times * margin
        assert stats.load is not None
        assert stats.load.tolist() == [times * n for n in load]
    assert sum(stats.counts()[name] for name in COUNTERS[:5]) == 2 * tokens
    stats.reset()
    assert not any(stats.counts().values())


@CASES
@given(case=cases(), seed=st.integers(0, 2**16))
def test_backward_is_the_gradient(case: dict[str, Any], seed: int, device: torch.device) -> None:
    """The formula, autograd through the definition, and the op agree; untouched experts get exactly nothing."""
    logits, rows, state, bias = tensors(case, device)
    spec, generator = case["spec"], torch.Generator().manual_seed(seed)
    logits = torch.where(logits.isfinite(), logits, 0.5)
    leaf = logits.clone().requires_grad_()
    out = reference.replay_topk(leaf, rows, spec, state=state, bias=bias)
    grad = torch.randn(out.weights.shape, generator=generator, dtype=torch.float64).to(device)
    (wanted,) = torch.autograd.grad(out.weights, leaf, grad)
    formula = reference.replay_topk_backward(logits, out.experts, spec, grad, state=state)
    weights, _ = replay_topk(leaf, rows, spec, state=state, bias=bias)
    (through,) = torch.autograd.grad(weights, leaf, grad)
    assert torch.equal(formula, wanted)
    assert torch.equal(through, wanted)
    if state is not None:
        assert not wanted[state == PAD].any()
    if spec.score in ("sigmoid", "softmax_topk"):
        touched = torch.zeros_like(logits, dtype=torch.bool).scatter(1, out.experts, True)
        assert not wanted[~touched].any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk", "sparsemixer"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(score: Any, renormalize: bool, device: torch.device) -> None:
    jitter = 0.3 if score == "sparsemixer" else 0.0
    spec = RouterSpec(score=score, renormalize=renormalize, eps=1e-3, scale=1.7, groups=3, topk_groups=2, jitter=jitter)
    logits = torch.randn(5, 12, dtype=torch.float64, device=device).requires_grad_()
    rows = torch.tensor([[3, 0, 11], [7, 7, 1], [2, 12, 1], [-1, 4, 5], [9, 1, 2]], device=device)
    state = torch.tensor([REPLAY, REPLAY, REPLAY, REPLAY, PAD], dtype=torch.uint8, device=device)
    bias = torch.randn(12, dtype=torch.float64, device=device).mul(0.1).requires_grad_()

    def weights(x: Tensor) -> Tensor:
        return replay_topk(x, rows, spec, state=state, bias=bias)[0]

    assert torch.autograd.gradcheck(weights, (logits,))
    torch.autograd.backward(weights(logits).sum())
    assert bias.grad is None, "a bias only selects"


def test_a_bias_selects_and_does_not_weigh(device: torch.device) -> None:
    spec = RouterSpec(score="sigmoid")
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, device=device)
    bias = torch.tensor([-5.0, 0.0, 0.0, 9.0], dtype=torch.float64, device=device)
    out = reference.replay_topk(logits, torch.tensor([[-1, -1]], device=device), spec, bias=bias)
    assert out.experts.tolist() == [[3, 1]]
    assert torch.equal(out.weights, logits.sigmoid()[:, [3, 1]])


def test_groups(device: torch.device) -> None:
    """Closed groups are -inf, below negative scores; a group scores its best expert, its best two, or its best K."""
    free = torch.full((1, 3), -1, device=device)
    row = [5.0, -9.0, -9.0, -9.0, 3.0, 3.0, -9.0, -9.0, 2.0, 2.0, 2.0, 0.5]
    logits = torch.tensor([row], dtype=torch.float64, device=device)
    for score, wanted in (("max", [0, 1, 2]), ("top2", [4, 5, 6]), ("topk_share", [8, 9, 10])):
        spec = RouterSpec(score="softmax_topk", groups=3, topk_groups=1, group_score=score)  # type: ignore[arg-type]
        assert reference.replay_topk(logits, free, spec).experts.tolist() == [wanted]


def test_only_the_flag_renormalises_a_top_1(device: torch.device) -> None:
    logits = torch.tensor([[0.3, 1.2]], dtype=torch.float64, device=device)
    rows = torch.tensor([[0]], device=device)
    plain, flagged = (
        reference.replay_topk(logits, rows, RouterSpec(score="softmax", renormalize=flag)).weights
        for flag in (False, True)
    )
    assert torch.equal(plain, logits.softmax(1)[:, :1])
    assert flagged.tolist() == [[1.0]]


def test_saturated_scores_still_follow_the_logits(device: torch.device) -> None:
    """sigmoid(40) is sigmoid(50) in float32; so are softmaxes that underflow."""
    logits = torch.tensor([[40.0, 50.0, 45.0], [-300.0, 0.0, -200.0]], device=device)
    rows = torch.full((2, 2), -1, device=device)
    assert reference.replay_topk(logits, rows, RouterSpec(score="sigmoid")).experts.tolist() == [[1, 2], [1, 2]]
    assert reference.replay_topk(logits, rows, RouterSpec(score="softmax")).experts[1].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_ids_of_any_width_and_stride(dtype: torch.dtype, device: torch.device) -> None:
    """Ids 0 and 255 are real experts; rows[:, l] of a layer-major store is strided, and so may logits be."""
    spec = RouterSpec(score="softmax", renormalize=True)
    logits = torch.randn(7, 2, 256, dtype=torch.float64, device=device)[:, 1]
    ids = torch.stack([torch.randperm(256)[:4] for _ in range(7)])
    ids[0] = torch.tensor([255, 0, 254, 1])
    store = torch.zeros(3, 7, 4, dtype=dtype)
    store[1] = ids.to(dtype)
    rows = store.to(device).transpose(0, 1)[:, 1]
    weights, experts = replay_topk(logits, rows, spec)
    assert torch.equal(experts.cpu(), ids)
    assert torch.allclose(weights, logits.gather(1, ids.to(device)).softmax(1), atol=1e-15)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (9, 2, 16), (13, 4, 6), (40, 8, 128), (5, 3, 3)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk", "sparsemixer"])
def test_padding_takes_distinct_experts_everywhere_and_weighs_nothing(
    tokens: int, k: int, experts: int, score: Any, device: torch.device
) -> None:
    spec = RouterSpec(score=score, renormalize=True)
    logits = torch.full((tokens, experts), NAN, dtype=torch.float64, device=device).requires_grad_()
    rows = torch.full((tokens, k), 200, device=device)
    state = torch.full((tokens,), PAD, dtype=torch.uint8, device=device)
    stats = RouteStats.zeros(device)
    weights, chosen = replay_topk(logits, rows, spec, state=state, stats=stats)
    torch.autograd.backward(weights.sum())
    assert all(len(set(row)) == k for row in chosen.tolist())
    load = chosen.flatten().bincount(minlength=experts)
    assert int(load.max() - load.min()) <= 1
    assert not weights.any()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert stats.counts() == {**dict.fromkeys(COUNTERS, 0), "pad": tokens}
    defined = reference.replay_topk(logits, rows, spec, state=state)
    assert not defined.weights.any()
    assert not torch.autograd.grad(defined.weights.sum(), logits)[0].any()


def test_padding_changes_no_other_row(device: torch.device) -> None:
    spec = RouterSpec(score="softmax", renormalize=True)
    logits = torch.randn(6, 8, device=device, dtype=torch.float64)
    rows = torch.tensor([[0, 5]] * 6, device=device)
    state = torch.tensor([REPLAY, PAD, FREE, REPLAY, PAD, FREE], dtype=torch.uint8, device=device)
    spoilt = torch.where((state == PAD)[:, None], INF, logits)
    real = state != PAD
    for clean, dirty in zip(
        replay_topk(logits, rows, spec, state=state), replay_topk(spoilt, rows, spec, state=state), strict=True
    ):
        assert torch.equal(clean[real], dirty[real])


# --- the routers themselves ------------------------------------------------------------------------------------------

LOGITS_DTYPE: dict[str, Any] = {"score_dtype": "logits", "weight_dtype": "logits"}
SIGMOID = {"score": "sigmoid", "renormalize": True, "eps": 1e-20, "scale": 1.8, **LOGITS_DTYPE}
DEEPSEEK = {"n_routed_experts": 16, "norm_topk_prob": True, "routed_scaling_factor": 1.8}
ROUTERS: list[tuple[str, str, dict[str, Any], RouterSpec]] = [
    (
        "glm4_moe_lite",
        "Glm4MoeLiteTopkRouter",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1},
        RouterSpec(**SIGMOID),
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {**DEEPSEEK, "n_group": 4, "topk_group": 2},
        RouterSpec(**SIGMOID, groups=4, topk_groups=2),
    ),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
        RouterSpec(score="softmax", groups=4, topk_groups=2, group_score="max"),
    ),
    (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 16, "norm_topk_prob": True},
        RouterSpec(score="softmax", renormalize=True, weight_dtype="logits"),
    ),
    (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 16, "norm_topk_prob": False},
        RouterSpec(score="softmax", weight_dtype="logits"),
    ),
    ("mixtral", "MixtralTopKRouter", {"num_local_experts": 16}, RouterSpec(score="softmax", renormalize=True)),
    ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 16}, RouterSpec(score="softmax_topk", **LOGITS_DTYPE)),
    (
        "phimoe",
        "PhimoeTopKRouter",
        {"num_local_experts": 16, "router_jitter_noise": 0.15},
        RouterSpec(score="sparsemixer", jitter=0.15, **LOGITS_DTYPE),
    ),
    ("minimax_m2", "MiniMaxM2TopKRouter", {"num_local_experts": 16}, RouterSpec(score="sigmoid", renormalize=True)),
]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize(("family", "kind", "fields", "spec"), ROUTERS)
def test_transformers_routers(
    family: str, kind: str, fields: dict[str, Any], spec: RouterSpec, dtype: torch.dtype, autocast: bool
) -> None:
    """Bit for bit: the module's own choice, its weights in their order, their dtype, and the logits' gradient."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compare_with_transformers(family, kind, fields, spec, dtype)


def compare_with_transformers(
    family: str, kind: str, fields: dict[str, Any], spec: RouterSpec, dtype: torch.dtype
) -> None:
    import importlib

    from transformers import AutoConfig

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = AutoConfig.for_model(family, hidden_size=32, num_experts_per_tok=4, **fields)
    router = getattr(module, kind)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in [*router.parameters(), *router.buffers()]:
        parameter.data.normal_(std=0.5, generator=generator)
    router = router.to(dtype)
    bias = getattr(router, "e_score_correction_bias", None)
    x = torch.randn(64, 32, generator=generator).to(dtype)
    extra: tuple[Tensor, ...] = ()
    if family == "minimax_m2":
        bias = torch.randn(16, generator=generator)
        extra = (bias,)
    logits, weights, experts = router(x, *extra)
    bias = None if bias is None else bias.float()
    free = torch.full(experts.shape, -1)
    own = reference.replay_topk(logits, free, spec, bias=bias)
    distinct = torch.tensor([len(set(row.tolist())) == 16 for row in logits])  # bfloat16 logits tie, torch.topk at will
    assert distinct.sum() > 20
    assert torch.equal(own.experts.sort(1).values[distinct], experts.sort(1).values[distinct])
    again = reference.replay_topk(logits, experts, spec, bias=bias)
    assert again.weights.dtype == weights.dtype
    assert torch.equal(again.weights, weights)
    grad = torch.randn(weights.shape, generator=generator).to(weights.dtype)
    wanted, got = (torch.autograd.grad(w, logits, grad, retain_graph=True)[0] for w in (weights, again.weights))
    assert torch.equal(got, wanted)
    assert wanted.any()
    if bias is not None:
        assert not torch.equal(reference.replay_topk(logits, free, spec).experts, own.experts)
