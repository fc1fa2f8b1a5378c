"""Routing replay against its definition: inputs with every kind of row, and the comparison that each test makes.

No pytest, so that a machine without it can run the checks as well. Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pacenote.kernels import reference
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE, PAD, REPLAY, RouterSpec

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, slots=True)
class Family:
    """A model's router: the spec, E, K, and whether a bias takes part in selection."""

    spec: RouterSpec
    experts: int
    k: int
    bias: bool = False


FAMILIES = {
    "glm-4.7-flash": Family(RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=1.8), 64, 4, True),
    "qwen3": Family(RouterSpec(score="softmax", renormalize=True, weight_dtype="logits"), 128, 8),
    "qwen3-plain": Family(RouterSpec(score="softmax"), 60, 4),
    "mixtral": Family(RouterSpec(score="softmax", renormalize=True), 8, 2),
    "minimax": Family(RouterSpec(score="sigmoid", renormalize=True), 48, 6, True),
    "deepseek-v3": Family(
        RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=2.5, groups=8, topk_groups=4), 256, 8, True
    ),
    "deepseek-v2": Family(RouterSpec(score="softmax", scale=16.0, groups=8, topk_groups=3, group_score="max"), 160, 6),
    "shared-groups": Family(RouterSpec(score="sigmoid", groups=3, topk_groups=2, group_score="topk_share"), 96, 10),
    "kimi-k2": Family(RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=2.827), 384, 8, True),
    "gpt-oss": Family(RouterSpec(score="softmax_topk", score_dtype="logits", weight_dtype="logits"), 32, 4),
    "chosen-renormalised": Family(RouterSpec(score="softmax_topk", renormalize=True, eps=0.25, scale=3.0), 24, 3),
    "narrow-softmax": Family(
        RouterSpec(score="softmax", renormalize=True, eps=1e-3, score_dtype="logits", weight_dtype="logits"),
        40,
        5,
        True,
    ),
    "narrow-sigmoid": Family(RouterSpec(score="sigmoid", scale=1.7, score_dtype="logits"), 64, 4, True),
    "phimoe": Family(RouterSpec(score="sparsemixer", jitter=0.01, score_dtype="logits", weight_dtype="logits"), 16, 2),
    "sparsemixer-of-3": Family(
        RouterSpec(score="sparsemixer", jitter=0.3, renormalize=True, eps=0.25, scale=1.8, groups=4, topk_groups=2),
        24,
        3,
        True,
    ),
    "top-1": Family(RouterSpec(score="softmax"), 16, 1),
    "top-1-renormalised": Family(RouterSpec(score="sigmoid", renormalize=True), 16, 1),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """logits [T, E], rows [T, K], state [T] or None, bias [E] or None."""

    logits: Tensor
    rows: Tensor
    spec: RouterSpec
    state: Tensor | None = None
    bias: Tensor | None = None

    def on(self, device: torch.device) -> Inputs:
        """The same on a device."""
        state, bias = (value if value is None else value.to(device) for value in (self.state, self.bias))
        return replace(self, logits=self.logits.to(device), rows=self.rows.to(device), state=state, bias=bias)


def random(
    spec: RouterSpec,
    experts: int,
    k: int,
    *,
    tokens: int = 60,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    rows: torch.dtype = torch.int32,
    grid: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Random logits (multiples of `grid` if given: ties), rows of every fate, NaN logits in padding rows."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g)
    logits = (logits if grid is None else (logits / grid).round() * grid).to(dtype)
    offsets = torch.randn(experts, generator=g) if bias else None
    offsets = offsets if offsets is None or grid is None else (offsets / grid).round() * grid
    noisy = logits.float() + torch.randn(tokens, experts, generator=g)
    ids = reference.native_topk(noisy, k, spec, offsets)
    token = torch.arange(tokens)
    if k > 1:
        ids[token % 11 == 3, k - 1] = ids[token % 11 == 3, 0]
    if rows != torch.uint8 or experts < 256:
        ids[token % 11 == 5, k // 2] = experts
    if rows in (torch.int32, torch.int64):
        ids[token % 11 == 7, 0] = -1
    state = torch.full((tokens,), REPLAY, dtype=torch.uint8)
    state[token % 7 == 2] = FREE
    state[token % 13 == 6] = PAD
    logits[state == PAD] = NAN
    return Inputs(logits, ids.to(rows), spec, state, offsets)


def of_family(name: str, **kwargs: object) -> Inputs:
    """Random inputs [T, E] for a family."""
    family = FAMILIES[name]
    return random(family.spec, family.experts, family.k, bias=family.bias, **kwargs)  # type: ignore[arg-type]


def check(inputs: Inputs, device: torch.device, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Compare experts, weights, gradients and stats with the definition; gives weights [T, K] and experts [T, K].

    Where scores select, not logits, two experts or groups within a few roundings of each other may change places,
    unless `exact`.

    Raises:
        AssertionError: they differ.
    """
    given = inputs.on(device)
    spec, k = given.spec, given.rows.shape[1]
    leaf = given.logits.detach().requires_grad_()
    stats = RouteStats.zeros(device, given.logits.shape[1])
    weights, experts = replay_topk(leaf, given.rows, spec, state=given.state, bias=given.bias, stats=stats)
    definition = reference.replay_topk(given.logits, given.rows, spec, state=given.state, bias=given.bias)

    fate = definition.fate
    fixed = (fate == reference.REPLAYED) | (fate == reference.PADDED)
    assert torch.equal(experts[fixed], definition.experts[fixed]), "replayed and padding rows"
    compare_choice(given, experts[~fixed], definition.experts[~fixed], ~fixed, exact)

    pad = (fate == reference.PADDED)[:, None]
    clean = torch.where(pad, 0.0, given.logits)
    plain, gold = (torch.where(pad, 0.0, reference.chosen_weights(x, experts, spec)) for x in (clean, clean.double()))
    kind = reference.weight_dtype(given.logits.dtype, spec)
    assert (weights.dtype, experts.dtype) == (kind, torch.int64)
    arithmetic = given.logits.dtype if spec.score_dtype == "logits" else kind
    no_worse("weights", weights.detach(), plain.to(kind), gold, arithmetic)
    assert (weights.detach()[pad[:, 0]] == 0).all(), "weights of padding rows"

    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).to(device, kind)
    grad = torch.where(pad, NAN, grad)
    weights.backward(grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    compare_gradients(given, leaf.grad, experts, grad, gold)

    free = torch.where(pad[:, 0], PAD, FREE).to(torch.uint8)
    _, native = replay_topk(given.logits, given.rows, spec, state=free, bias=given.bias)
    compare_stats(given, replace(definition, experts=experts, native=native), stats, definition.native)
    assert k == experts.shape[1]
    return weights.detach(), experts


def compare_choice(inputs: Inputs, mine: Tensor, theirs: Tensor, which: Tensor, exact: bool) -> None:
    """Two choices [n, K] of the rows `which` [T]: the same, or right but for rounding where scores select.

    Right: the experts of some groups that may be open, best first; each is as good as the best there at its place.
    """
    ordered = mine.sort(dim=1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "experts chosen twice"
    spec, logits = inputs.spec, inputs.logits[which]
    if exact or reference.selects_by_logits(spec, inputs.bias):
        assert torch.equal(mine, theirs), "own choice"
        return
    select = reference.selection(logits.double(), spec, inputs.bias)
    step = rounding(inputs, select)
    select = select.nan_to_num(nan=2e300, posinf=1e300, neginf=-1e300)  # NaN is the largest
    if spec.groups > 1:
        select = within_groups(select, mine, spec, step)
    best = select.sort(dim=1, descending=True).values[:, : mine.shape[1]]
    assert ((select.gather(1, mine) - best).abs() <= step).all(), "own choice, beyond rounding"


def rounding(inputs: Inputs, select: Tensor) -> float:
    """How far two selections [n, any] may be that are equal but for rounding: four roundings of the largest."""
    arithmetic = inputs.logits.dtype if inputs.spec.score_dtype == "logits" else torch.float32
    finite = select[select.isfinite()].abs()
    return 4 * torch.finfo(arithmetic).eps * float(finite.max() if finite.numel() else 0.0)


def within_groups(select: Tensor, mine: Tensor, spec: RouterSpec, step: float) -> Tensor:
    """The selection [n, E], -inf outside the groups that are open if `mine` [n, K] is right.

    Open are the groups that are the best beyond rounding, and those that `mine` took of the ones that are not worse
    beyond rounding; if places are left, the ones that would have tempted least. Groups taken in excess stay closed, so
    that their experts are too bad.
    """
    size, opened = select.shape[1] // spec.groups, spec.topk_groups
    rank = reference.group_scores(select, mine.shape[1], spec)
    step *= reference.group_depth(mine.shape[1], select.shape[1], spec)
    best = rank.sort(dim=1, descending=True).values
    behind = best[:, opened : opened + 1] if opened < spec.groups else torch.full_like(best[:, :1], -INF)
    surely, maybe = rank > behind + step, rank >= best[:, opened - 1 : opened] - step
    used = torch.zeros_like(maybe).scatter(1, mine // size, True)
    tempting = select.reshape(-1, spec.groups, size).amax(dim=2)
    # Best first by class, then the least tempting of the last one.
    order = torch.where(surely, 3, torch.where(maybe & used, 2, torch.where(maybe, 1, 0)))
    least = tempting.sort(dim=1, stable=True).indices
    first = least.gather(1, order.gather(1, least).sort(dim=1, descending=True, stable=True).indices)[:, :opened]
    closed = torch.ones_like(maybe).scatter(1, first, False)
    return select.masked_fill(closed.repeat_interleave(size, dim=1), -INF)


def compare_stats(inputs: Inputs, out: reference.Routing, stats: RouteStats, native: Tensor) -> None:
    """Counts and load exactly, the margin up to rounding; `native` [T, K] is the definition's own choice."""
    counts = reference.route_counts(out, inputs.rows)
    assert stats.counters.tolist() == counts.tolist(), f"counts {stats.counters.tolist()}, expected {counts.tolist()}"
    assert stats.load is not None
    assert stats.load.tolist() == reference.route_load(out, inputs.logits.shape[1]).tolist(), "load"
    if inputs.spec.groups > 1 and not torch.equal(out.native, native):
        return  # of groups that tie but for rounding, others may be open than in the definition of the margin
    margin, expected = (
        stats.margin.item(),
        reference.route_margin(out, inputs.logits, inputs.rows, inputs.spec, inputs.bias).item(),
    )
    # Sums of up to 64 float32, none negative; where scores select, the terms are rounded as well.
    allowed = 64 * torch.finfo(torch.float32).eps * expected
    if not reference.selects_by_logits(inputs.spec, inputs.bias):
        select = reference.selection(inputs.logits, inputs.spec, inputs.bias)
        allowed += stats.counts()["flipped"] * rounding(inputs, select)
    assert abs(margin - expected) <= allowed, f"margin {margin:.9g}, expected {expected:.9g} +- {allowed:.3g}"


def compare_gradients(inputs: Inputs, mine: Tensor, experts: Tensor, grad: Tensor, weights: Tensor) -> None:
    """Gradients [T, E] for these experts and weights [T, K] and this gradient of the weights [T, K].

    A gradient is a sum of terms weight x gradient of the weight, which may cancel: one rounding is one of such a term.
    """
    logits, spec, state = inputs.logits, inputs.spec, inputs.state
    plain, gold = (
        reference.replay_topk_backward(x, experts, spec, g, state=state)
        for x, g in ((logits, grad), (logits.double(), grad.double()))
    )
    assert (mine.dtype, mine.shape) == (logits.dtype, logits.shape)
    if state is not None:
        assert (mine[state == PAD] == 0).all(), "gradient of padding rows"
    # Autograd of the definition makes 0 * NaN of a logit that is NaN and not chosen; the kernel never looks at it.
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    skipped = logits.isnan() & ~chosen
    plain, gold = (torch.where(skipped, mine.to(g.dtype), g) for g in (plain, gold))
    no_worse("gradient", mine, plain, gold, logits.dtype, terms=grad * weights)


def no_worse(
    name: str, mine: Tensor, plain: Tensor, gold: Tensor, arithmetic: torch.dtype, terms: Tensor | None = None
) -> None:
    """The error against float64 is at most twice that of plain torch at the same dtype, plus one rounding; [T, any].

    The rounding is one of the largest result, or of the largest of the `terms` [T, any] that add up to it. NaN stands
    where plain torch has it.
    """
    assert torch.equal(mine.isnan(), plain.isnan()), f"NaN in {name}"
    there = gold.isfinite() & plain.isfinite()
    mine, plain, gold = mine[there].double(), plain[there].double(), gold[there]
    if not there.any():
        return
    error, allowed = (mine - gold).abs().max(), 2 * (plain - gold).abs().max()
    largest = gold.abs().max()
    if terms is not None:
        largest = torch.maximum(largest, torch.where(terms.isfinite(), terms, 0.0).double().abs().max())
    allowed = allowed + torch.finfo(arithmetic).eps * largest
    assert error <= allowed, f"error of {name} {float(error):.3g}, at most {float(allowed):.3g}"
