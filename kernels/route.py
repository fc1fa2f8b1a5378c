"""Routing replay: recorded experts, weights from the trainer's own logits. `reference.replay_topk` is the definition.

CPU tensors take the reference; CUDA and ROCm take the kernels of `route_triton`, and so does the CPU in Triton's
interpreter; all through one custom op, so that eager, autograd and torch.compile see the same. sparsemixer takes the
reference everywhere: plain torch that does not wait either.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import check, launch, reference
from pacenote.kernels.reference import COUNTERS
from pacenote.kernels.spec import FREE, MAX_EXPERTS, MAX_TOP_K, PAD, REPLAY, RouterSpec

__all__ = ["FREE", "PAD", "REPLAY", "RouteStats", "RouterSpec", "replay_topk"]


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What routing counted, on the device, added to in place, no waiting. Made by `zeros`.

    Each row counts once, in one of replayed, free, duplicate, out_of_range, pad. `flipped`: replayed rows whose
    recorded set is not the native one. `overlap`: sum over replayed rows of the experts that both sets hold.
    `missing`: the free rows that were to be replayed and have a negative id.

    Attributes:
        counters: [8] int64 in the order of reference.COUNTERS.
        margin: [1] float64, by how much the native choice beats the recorded one, summed over flipped rows:
            reference.route_margin. In units of logits where they select, else of scores plus bias.
        load: [E] int64, tokens per expert: (token, slot) pairs without those of padding; None is not counted.
    """

    counters: Tensor
    margin: Tensor
    load: Tensor | None = None

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu", num_experts: int | None = None) -> RouteStats:
        """Counters [8], the margin [1], and the load [E] if `num_experts` is given, at zero."""
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        # Not 0-d: torch.compile takes a 0-d float64 on the CPU for a number, and what is added to it is lost.
        margin = torch.zeros(1, dtype=torch.float64, device=device)
        load = None if num_experts is None else torch.zeros(num_experts, dtype=torch.int64, device=device)
        return cls(counters, margin, load)

    def reset(self) -> None:
        """Set everything to zero."""
        self.counters.zero_()
        self.margin.zero_()
        if self.load is not None:
            self.load.zero_()

    def counts(self) -> dict[str, int]:
        """The counters by name; waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    def mean_margin(self) -> float:
        """The margin of a flipped row, NaN if there is none; waits for the device."""
        flipped = self.counts()["flipped"]
        return self.margin.item() / flipped if flipped else float("nan")


def replay_topk(
    logits: Tensor,
    rows: Tensor,
    spec: RouterSpec,
    *,
    state: Tensor | None = None,
    bias: Tensor | None = None,
    stats: RouteStats | None = None,
) -> tuple[Tensor, Tensor]:
    """Route with the recorded experts where they are valid, with the router's own top-k where they are not.

    Floors in bytes, and what is read when: docs/kernels.md. No arithmetic to speak of.

    Args:
        logits: [T, E] floating, rows may be strided.
        rows: [T, K] uint8, uint16, int32 or int64; a negative id marks a missing row.
        spec: the router's arithmetic.
        state: [T] uint8 of FREE, REPLAY, PAD; None replays every row.
        bias: [E] floating, float64 only with such logits; for selection only.
        stats: counts to add to.

    Returns:
        weights [T, K] in the spec's weight dtype, experts [T, K] int64. Gradients flow from the weights to the logits.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check(logits, rows, spec, state, bias)
    fields = _fields(spec)
    if stats is None:
        weights, experts, *_ = _forward(logits, rows, state, bias, False, False, *fields)
        return weights, experts
    _check_stats(stats, logits)
    loads = stats.load is not None
    weights, experts, counts, margin, load = _forward(logits, rows, state, bias, True, loads, *fields)
    stats.counters.add_(counts)
    stats.margin.add_(margin.detach())  # being a float, it would take the graph along
    if stats.load is not None:
        stats.load.add_(load)
    return weights, experts


def _check(logits: Tensor, rows: Tensor, spec: RouterSpec, state: Tensor | None, bias: Tensor | None) -> None:
    check.tensor(logits, "logits", (None, None), check.FLOATS, logits.device)
    tokens, experts = logits.shape
    check.tensor(rows, "rows", (tokens, None), check.IDS, logits.device)
    k = rows.shape[1]
    if not 1 <= k <= min(experts, MAX_TOP_K) or experts > MAX_EXPERTS:
        raise ValueError(f"expected 1 <= K <= min(E, {MAX_TOP_K}) and E <= {MAX_EXPERTS}, got K={k}, E={experts}")
    if experts % spec.groups or experts // spec.groups * spec.topk_groups < k:
        raise ValueError(
            f"expected groups that divide E={experts} and hold K={k} experts when open, "
            f"got groups={spec.groups}, topk_groups={spec.topk_groups}"
        )
    if rows.dtype == torch.uint8 and experts > 256:
        raise ValueError(f"expected rows of {experts} experts as uint16, int32 or int64, got uint8")
    if state is not None:
        check.tensor(state, "state", (tokens,), (torch.uint8,), logits.device)
    if bias is not None:
        # A float64 bias would make the selection of float32 scores a float64 one, which no router does.
        floats = [kind for kind in check.FLOATS if kind != torch.float64 or logits.dtype == torch.float64]
        check.tensor(bias, "bias", (experts,), floats, logits.device)


def _check_stats(stats: RouteStats, logits: Tensor) -> None:
    check.tensor(stats.counters, "stats.counters", (len(COUNTERS),), (torch.int64,), logits.device)
    check.tensor(stats.margin, "stats.margin", (1,), (torch.float64,), logits.device)
    if stats.load is not None:
        check.tensor(stats.load, "stats.load", (logits.shape[1],), (torch.int64,), logits.device)


_SPEC = (
    "str score, bool renormalize, float eps, float scale, SymInt groups, SymInt topk_groups, str group_score, "
    "str score_dtype, str weight_dtype, float jitter"
)


def _fields(spec: RouterSpec) -> tuple[Any, ...]:
    """A spec as an op's arguments: ops take plain values."""
    return (
        spec.score,
        spec.renormalize,
        spec.eps,
        spec.scale,
        spec.groups,
        spec.topk_groups,
        spec.group_score,
        spec.score_dtype,
        spec.weight_dtype,
        spec.jitter,
    )


def _spec(fields: tuple[Any, ...]) -> RouterSpec:
    """The spec back from `_fields`."""
    names = (
        "score",
        "renormalize",
        "eps",
        "scale",
        "groups",
        "topk_groups",
        "group_score",
        "score_dtype",
        "weight_dtype",
        "jitter",
    )
    return RouterSpec(**dict(zip(names, fields, strict=True)))


def _takes_triton(logits: Tensor, spec: RouterSpec) -> bool:
    """Whether the kernels route: they have every score but sparsemixer, one softmax a chosen expert."""
    return spec.score != "sparsemixer" and launch.takes_triton(logits)


def _op(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"pacenote::{name}", mutates_args=(), schema=schema)


# An op that changes an argument cannot have a gradient formula, so what it counts is a result and the caller adds it.
@_op(
    "replay_topk",
    f"(Tensor logits, Tensor rows, Tensor? state, Tensor? bias, bool count, bool load, {_SPEC}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor, rows: Tensor, state: Tensor | None, bias: Tensor | None, count: bool, load: bool, *fields: Any
) -> tuple[Tensor, ...]:
    """weights [T, K], experts [T, K] int64, counts [8] int64, margin [1] float64, load [E] int64.

    Counts and margin are [0] without `count`; so is the load, which also needs `load`.
    """
    spec = _spec(fields)
    if _takes_triton(logits, spec):
        from pacenote.kernels import route_triton

        return route_triton.forward(logits, rows, state, bias, spec, count=count, load=load)
    out = reference.replay_topk(logits, rows, spec, state=state, bias=bias)
    return (
        out.weights,
        out.experts,
        reference.route_counts(out, rows) if count else logits.new_empty(0, dtype=torch.int64),
        reference.route_margin(out, logits, rows, spec, bias)[None] if count else logits.new_empty(0).double(),
        reference.route_load(out, logits.shape[1]) if count and load else logits.new_empty(0, dtype=torch.int64),
    )


@_forward.register_fake  # type: ignore[untyped-decorator]
def _(
    logits: Tensor, rows: Tensor, state: Tensor | None, bias: Tensor | None, count: bool, load: bool, *fields: Any
) -> tuple[Tensor, ...]:
    return (
        logits.new_empty(rows.shape, dtype=reference.weight_dtype(logits.dtype, _spec(fields))),
        logits.new_empty(rows.shape, dtype=torch.int64),
        logits.new_empty(len(COUNTERS) if count else 0, dtype=torch.int64),
        logits.new_empty(1 if count else 0, dtype=torch.float64),
        logits.new_empty(logits.shape[1] if count and load else 0, dtype=torch.int64),
    )


# The kernel alone: the definition's gradient is autograd's own, which does not run inside an op.
@_op("replay_topk_backward", f"(Tensor logits, Tensor experts, Tensor? state, Tensor grad, {_SPEC}) -> Tensor")
def _backward(logits: Tensor, experts: Tensor, state: Tensor | None, grad: Tensor, *fields: Any) -> Tensor:
    """Gradient [T, E] of the logits from that of the weights [T, K]."""
    from pacenote.kernels import route_triton

    return route_triton.backward(logits, experts, state, grad, _spec(fields))


@_backward.register_fake  # type: ignore[untyped-decorator]
def _(logits: Tensor, experts: Tensor, state: Tensor | None, grad: Tensor, *fields: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, state, _, _, _, *fields = inputs
    ctx.save_for_backward(logits, output[1], state)
    ctx.fields = tuple(fields)
    # Else each of the four results without a gradient costs a launch that fills zeros for nobody.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts, state = ctx.saved_tensors
    spec = _spec(ctx.fields)
    if grad is None:  # only the margin was differentiated, which is a count
        dlogits = None
    elif _takes_triton(logits, spec):
        dlogits = _backward(logits, experts, state, grad, *ctx.fields)
    else:
        dlogits = reference.replay_topk_backward(logits, experts, spec, grad, state=state)
    return dlogits, *(None,) * (5 + len(ctx.fields))


_forward.register_autograd(_differentiate, setup_context=_setup)
