"""A whole choice of TopKRouter in one launch of the route kernel, for the instances that a user opts in.

`TopKRouter.routing` (megatron-core 0.19) applies the z-loss, calls `topk_routing_with_score_function` for experts and
weights, and then attaches auxiliary losses and counts for expert biases. A fused router runs this very code with an
answer of ours to that one call: experts and weights from one kernel, laid out as the two dense maps that dispatchers
take. Everything around the call stays Megatron's own, and so does every pass outside of a scope.

Legend: T tokens at a router, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import ReplayError, UnsupportedModel
from pacenote.replay.megatron_router import Driver, Seat, example, name, rounding, uncount_padding
from pacenote.replay.megatron_step import Read

_CALL = "topk_routing_with_score_function"


class FusedSeat(Seat):
    """A seat that also stands in for its router's `routing`, as an attribute of this one instance."""

    def __init__(
        self, router: Any, driver: Driver, selection: RouterSpec, spec: RouterSpec, *, chunk: int, index: int
    ) -> None:
        """Nothing is put on the router yet: `take_seat` does."""
        super().__init__(router, driver, selection, chunk=chunk, index=index)
        self._spec = spec
        self._zeros: Tensor | None = None

    def take_seat(self) -> None:
        """Put this object, and its `routing`, on the router."""
        super().take_seat()
        self.router.routing = self.routing

    def leave_seat(self) -> None:
        """Give the router back what it had: the method of its class shows again."""
        super().leave_seat()
        del self.router.routing

    def routing(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Probs and map [T, E]: TopKRouter's method of that name, its own code, with `choose` for the one call."""
        own = type(self.router).routing
        # A name of one call: neither the class nor the module is changed for other routers.
        names = {**own.__globals__, _CALL: self.choose}
        mine = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        found: tuple[Tensor, Tensor] = mine(self.router, *args, **kwargs)
        return found

    def choose(self, logits: Tensor, topk: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Probs [T, E] in the logits' dtype and map [T, E] bool, 0 outside of K experts a token, for logits [T, E].

        Args:
            logits: [T, E].
            topk: K.
            options: as `topk_routing_with_score_function` takes them; a call that would not ask this seat is not ours.

        Raises:
            UnsupportedModel: logits of float64, or a call for weights [T, K] instead.
        """
        taken = self._driver.take(self, logits) if options.get("router_replay") is self else None
        if taken is None:
            found: tuple[Tensor, Tensor] = type(self.router).routing.__globals__[_CALL](logits, topk, **options)
            return found
        if logits.dtype == torch.float64 or options.get("dense_output"):
            raise UnsupportedModel(
                f"expected {name(self.router)} to ask for maps [T, E] of logits of float32 or narrower, got "
                f"{logits.dtype} and dense_output={options.get('dense_output', False)}: leave its layer out of `fused`"
            )
        read, stats = taken
        weights, experts = replay_topk(
            logits, read.experts, self._spec, state=read.state, bias=self._bias(logits, options), stats=stats
        )
        self._driver.chosen(self, experts)
        probs, routing_map = spread(weights, experts, logits.shape[1])
        if read.pads is not None:
            uncount_padding(self.router, routing_map, read.pads)
        return probs, routing_map

    def _bias(self, logits: Tensor, options: dict[str, Any]) -> Tensor | None:
        """[E] what is added to scores for selection; zeros, where it is scores that select and nothing is added.

        Without a bias the kernel compares logits, which may differ where the scores that Megatron compares are rounded
        to the same number.
        """
        if self._spec.score == "sigmoid" and options.get("expert_bias") is not None:
            bias: Tensor = options["expert_bias"]
            return bias
        if self._spec.score == "softmax_topk":
            return None
        if self._zeros is None or self._zeros.device != logits.device:
            self._zeros = torch.zeros(logits.shape[1], device=logits.device)
        return self._zeros


def spread(weights: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] of experts [T, K] int64 as probs [T, E] in their dtype, and a map [T, E] bool.

    Gradients flow from the probs to the weights.
    """
    shape = (len(weights), num_experts)
    probs = weights.new_zeros(shape).scatter_(1, experts, weights)
    return probs, experts.new_zeros(shape, dtype=torch.bool).scatter_(1, experts, True)


def fused_layers(fused: bool | Collection[int], layers: Sequence[int], config: Any) -> frozenset[int]:
    """Which of a rank's `layers` a user wants fused: all, none, or those of these global ids, here or on other ranks.

    Raises:
        ReplayError: an id that is no MoE layer of the model.
    """
    if isinstance(fused, bool):
        return frozenset(layers if fused else ())
    every, count = config.moe_layer_freq, config.num_layers
    sparse = every if isinstance(every, list) else [layer % every == 0 for layer in range(count)]
    strange = [layer for layer in fused if layer not in range(count) or not sparse[layer]]
    if strange:
        raise ReplayError(f"expected fused to be a bool or global ids of MoE layers, below {count}, got {strange}")
    return frozenset(fused).intersection(layers)


def check_fused(router: Any, spec: RouterSpec, selection: RouterSpec) -> None:
    """Route random logits [64, 1, E], rows half free and half recorded, as a seat does and as a fused one does.

    Raises:
        UnsupportedModel: a router whose routing() is not known to be the same when fused, with each reason.
    """
    reasons = list(_reasons(router))
    if reasons:
        raise UnsupportedModel(
            f"expected to fuse {name(router)} exactly, got {'; '.join(reasons)}. Leave the layer out of `fused`"
        )
    logits, rows, state = example(router)
    probe = _Probe(Read(experts=rows, state=state, pads=None, again=False))
    seat = FusedSeat(router, probe, selection, spec, chunk=0, index=0)
    before = router.router_replay
    try:
        router.router_replay = seat
        with torch.no_grad():
            (probs, used), (mine, chosen) = router.routing(logits), seat.routing(logits)
    finally:
        router.router_replay = before
    error = float((mine - probs).abs().max())
    if probe.asked != 2 or not torch.equal(chosen, used) or not error <= rounding(spec):
        raise UnsupportedModel(
            f"expected {name(router)} to route alike when fused, got {probe.asked - 1} choices in it, "
            f"{int((chosen != used).any(1).sum())} of {len(rows)} rows with other experts and weights that differ "
            f"by {error:.3g}. Leave the layer out of `fused`"
        )


def _reasons(router: Any) -> Iterator[str]:
    own = type(router).routing
    if "routing" in vars(router):
        yield "a routing() set on this instance, which the fused one would replace"
    elif not isinstance(own, FunctionType) or _CALL not in own.__code__.co_names or _CALL not in own.__globals__:
        yield f"a routing() of {type(router).__name__} that does not call {_CALL}"
    dtype = router.config.moe_router_dtype
    if dtype == "fp64" or (dtype is None and router.weight.dtype == torch.float64):
        yield f"float64 logits (moe_router_dtype={dtype}): Megatron weighs them in float32, the kernel takes none"


class _Probe:
    """Answers a seat during the check with the same rows, and counts how often it was asked."""

    def __init__(self, read: Read) -> None:
        self.asked, self._read = 0, read

    def take(self, seat: Seat, scores: Tensor) -> tuple[Read, RouteStats | None] | None:
        self.asked += 1
        return self._read, None

    def chosen(self, seat: Seat, experts: Tensor) -> None:
        pass
