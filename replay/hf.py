"""attach(model): record and replay the routers of a transformers mixture-of-experts model, by forward hooks only.

Each router module returns (router_logits [T, E], weights [T, K], experts [T, K]); a hook replaces the last two, in the
dtype that the module gives. No class is patched and no forward is retyped, so `detach` leaves the model as it was.
A router that draws experts at random in training (sparsemixer) routes as in evaluation inside a scope or a recording.

Legend: B sequences, S positions, T = B x S tokens, D hidden size, E experts, K experts a token, L MoE layers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pacenote.kernels.reference import selection
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.spec import FREE, RouterSpec
from pacenote.replay.audit import Audit
from pacenote.replay.counters import LayerCounters
from pacenote.replay.errors import ReplayError, ScopeError, UnsupportedModel
from pacenote.replay.recording import GenerationRecording, Recording
from pacenote.replay.scope import Forward, Scope, as_rows
from pacenote.replay.spec import RoutingGeometry, geometry_from_config, router_spec

_BIASES = ("e_score_correction_bias", "expert_bias")
_CHECK_ROWS = 64
R = TypeVar("R", Recording, GenerationRecording)


def attach(model: nn.Module) -> Replay:
    """Hook the routers of a transformers model (a causal language model, or its base model).

    Every router runs once, as in evaluation, on random hidden states; weights and choice must be those of the family's
    spec. Nothing else of the model runs, no parameter, buffer or random state changes. Attach before FSDP2's
    `fully_shard`: a sharded router does not run alone, and is refused.

    Raises:
        UnsupportedModel: an unknown family, routers that are not where the config says, or that compute something
            other than their spec: the text names the layer and the difference.
        ReplayError: the model is attached already.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UnsupportedModel(
            f"expected a transformers model with a config, got {type(model).__name__}: pass the model it wraps"
        )
    fields = config.to_dict()
    geometry, spec = geometry_from_config(fields), router_spec(fields)
    base, routers = _find_routers(model, geometry)
    if any(isinstance(hook, _RouterHook) for router in routers for hook in router.module._forward_hooks.values()):
        raise ReplayError("expected a model without replay hooks, this one has them: detach() the other Replay first")
    for router in routers:
        _self_check(router, spec, geometry, next(base.parameters()).dtype)
    return Replay(base, routers, geometry, spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Router:
    """A router module, its global layer id, and the module and name of its selection bias, if it has one."""

    layer: int
    module: nn.Module
    parent: nn.Module
    bias_at: tuple[nn.Module, str] | None

    @property
    def bias(self) -> Tensor | None:
        """The selection bias [E] in float32: the routers add it to float32 scores, whatever it is stored in."""
        return None if self.bias_at is None else getattr(*self.bias_at).detach().float().reshape(-1)

    @property
    def device(self) -> torch.device:
        """Where the router's weight is now."""
        return next(self.module.parameters()).device


class Replay:
    """Replay and recording of one model. Made by `attach`.

    Attributes:
        geometry: where the model routes.
        spec: how its routers weigh experts.
    """

    def __init__(self, base: nn.Module, routers: list[_Router], geometry: RoutingGeometry, spec: RouterSpec) -> None:
        """Hook the base model and its routers, given in the order of the geometry's layers."""
        self.geometry, self.spec = geometry, spec
        self._base, self._routers = base, routers
        self._scope: Scope | None = None
        self._recording: Recording | GenerationRecording | None = None
        self._forward = Forward(geometry.layers)
        self._closed_graph = False
        self._counters = LayerCounters(geometry.layers)
        self._stats: list[RouteStats] = []
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            base.register_forward_hook(self._end),
        ]
        # Before transformers' own output-capturing hooks, so that they see what is replayed.
        self._handles += [
            router.module.register_forward_hook(_RouterHook(self, index), prepend=True)
            for index, router in enumerate(routers)
        ]

    @property
    def layers(self) -> tuple[int, ...]:
        """Global ids of the MoE layers, in the order of the rows' layer axis."""
        return self.geometry.layers

    @contextmanager
    def rows(self, rows: Any, state: Any = None) -> Iterator[Replay]:
        """Replay these rows in every forward pass of the block, and in its backward pass.

        A checkpointed layer recomputes with the rows of the scope that is open: run backward before leaving, and never
        in a later scope. Free rows are routed as in evaluation, also by a router that draws at random in training.

        Args:
            rows: tensor or array [T, L, K] for an input [1, T], [B, S, L, K] for [B, S]; uint8, uint16, int32 or int64;
                an id below 0 leaves its row to the router. Or kernels.pack.Routes, or a RoutingRecord of T rows.
            state: [T] or [B, S] uint8 codes FREE, REPLAY, PAD; None: replay. Routes and records have their own.

        Raises:
            ScopeError: rows that do not fit model or input; a nested scope; a block in which no forward pass ran.
        """
        self._check_attached()
        if self._scope is not None:
            raise ScopeError("expected one scope of rows at a time, got a nested one: leave the outer one first")
        scope = Scope(as_rows(rows, state, self.geometry), {router.device for router in self._routers})
        # Made before any forward pass: a compiled one must not make them.
        self._stats = [self._counters.of(index, router.device) for index, router in enumerate(self._routers)]
        self._scope = scope
        try:
            yield self
        finally:
            self._scope = None
            self._forward.running = False
        if not scope.forwards:
            raise ScopeError("expected a forward pass inside the scope, got none: these rows were not replayed")

    def record(self) -> AbstractContextManager[Recording]:
        """Keep the experts of the last forward pass of the block; `.rows()` gives them as [B, S, L, K] int32.

        Inside `rows` it keeps the replayed ones. Costs nothing until `.rows()` is called. A router that draws at random
        in training routes as in evaluation meanwhile, so that what is recorded can be replayed; then run backward
        before leaving where layers are checkpointed.

        Raises:
            ScopeError: a recording inside a recording.
        """
        return self._record(Recording(len(self._routers)))

    def record_generation(self) -> AbstractContextManager[GenerationRecording]:
        """Keep the experts of every position that `generate` reads; `.rows(tokens)` gives them as [B, N-1, L, K] int32.

        One generation a block, with a dynamic cache or none, no beam search.

        Raises:
            ScopeError: a recording inside a recording; a pass whose place in the sequence cannot be told.
        """
        return self._record(GenerationRecording(len(self._routers)))

    @contextmanager
    def _record(self, recording: R) -> Iterator[R]:
        self._check_attached()
        if self._recording is not None:
            raise ScopeError("expected one recording at a time, got a nested one")
        self._recording = recording
        try:
            yield recording
        finally:
            self._recording = None

    def audit(self, reset: bool = False) -> Audit:
        """Counts by layer since attach or the last reset. The only call that waits for the device."""
        return self._counters.audit(reset=reset)

    def detach(self) -> None:
        """Remove every hook. A second call does nothing.

        Raises:
            ScopeError: a scope or a recording is open.
        """
        if self._scope is not None or self._recording is not None:
            raise ScopeError("expected no open scope or recording at detach(), leave it first")
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_attached(self) -> None:
        if not self._handles:
            raise ScopeError("expected an attached model, this Replay was detached: call attach(model) again")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the base model: the input's shape must be that of the rows."""
        scope, recording = self._scope, self._recording
        self._forward.begin()
        if torch.is_grad_enabled():
            self._closed_graph = scope is not None or (recording is not None and self._draws)
        if scope is None and recording is None:
            return
        ids, shape = _input(args, kwargs)
        cached = _cached(kwargs)
        if scope is not None:
            scope.begin(shape, cached)
        if recording is not None:
            recording.begin(shape, ids, cached)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the base model: every router must have run."""
        self._forward.end(check=self._scope is not None or self._recording is not None)

    def _route(self, index: int, output: Any) -> Any:
        """A router's output, replayed; None leaves it as it is."""
        scope, recording = self._scope, self._recording
        inside = self._forward.running
        if scope is None and recording is None:
            if self._closed_graph and not inside and torch.is_grad_enabled() and self._checkpoints(index):
                raise ScopeError(
                    "expected backward inside the scope: a checkpointed layer is recomputed after its scope closed, "
                    "which would differentiate another routing; keep rows(...), or record(), open over backward"
                )
            return None
        if inside:
            self._forward.read(index)
        if scope is not None:
            stats = self._stats[index] if inside else None
            output = self._replayed(index, output, *scope.take(index, output[0]), stats)
        elif self._draws and self._routers[index].module.training:
            free = torch.full_like(output[2][:, 0], FREE, dtype=torch.uint8)
            output = self._replayed(index, output, output[2], free, None)
        if recording is not None and inside:
            recording.put(index, output[2])
        return output

    def _replayed(
        self, index: int, output: Any, rows: Tensor, state: Tensor | None, stats: RouteStats | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A router's output with the weights and experts of rows [T, K] in their state [T]."""
        logits, weights, _ = output
        bias = self._routers[index].bias
        replayed, experts = replay_topk(logits, rows, self.spec, state=state, bias=bias, stats=stats)
        return logits, replayed.to(weights.dtype), experts

    @property
    def _draws(self) -> bool:
        """Whether the routers draw experts at random in training."""
        return self.spec.score == "sparsemixer"

    def _checkpoints(self, index: int) -> bool:
        layer = self._base.get_submodule(f"layers.{self._routers[index].layer}")
        return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


class _RouterHook:
    """The forward hook of one router; its type marks a model as attached."""

    __slots__ = ("index", "replay")

    def __init__(self, replay: Replay, index: int) -> None:
        self.replay, self.index = replay, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.replay._route(self.index, output)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple[int, int]]:
    """The base model's input ids [B, S], or None where it got embeddings [B, S, D]; and (B, S)."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if ids is None else ids
    if not isinstance(given, Tensor) or given.ndim < 2:
        raise ScopeError(f"expected input_ids [B, S] or inputs_embeds [B, S, D], got {type(given).__name__}")
    return (given if given is ids else None), (int(given.shape[0]), int(given.shape[1]))


def _cached(kwargs: dict[str, Any]) -> int | None:
    """How many positions the pass's key-value cache holds; None if it cannot say without waiting."""
    given = (kwargs.get(name) for name in ("cache", "past_key_values"))  # the newer name first
    cache = next((cache for cache in given if cache is not None), None)
    length = 0 if cache is None else getattr(cache, "get_seq_length", lambda: None)()
    return length if isinstance(length, int) else None


def _find_routers(model: nn.Module, geometry: RoutingGeometry) -> tuple[nn.Module, list[_Router]]:
    """The module that owns the decoder layers, and a router for each MoE layer of the geometry."""
    found: dict[str, dict[int, list[str]]] = {}
    for name, module in model.named_modules():
        place = re.fullmatch(r"(?:(.*)\.)?layers\.(\d+)\.(.+)", name)
        if place and type(module).__name__.lower().endswith("router") and hasattr(module, "top_k"):
            found.setdefault(place[1] or "", {}).setdefault(int(place[2]), []).append(name)
    if len(found) != 1:
        raise UnsupportedModel(f"expected routers in one stack of decoder layers, got {sorted(found) or 'none'}")
    [(owner, by_layer)] = found.items()
    single = {layer: names[0] for layer, names in by_layer.items() if len(names) == 1}
    if tuple(sorted(single)) != geometry.layers or len(single) != len(by_layer):
        raise UnsupportedModel(
            f"expected one router in each of the layers {geometry.layers} of the config, "
            f"got { {layer: len(names) for layer, names in sorted(by_layer.items())} }"
        )
    return model.get_submodule(owner), [_router(model, layer, single[layer]) for layer in geometry.layers]


def _router(model: nn.Module, layer: int, name: str) -> _Router:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    owners = [(owner, name) for owner in (module, parent, *module.children()) for name in _BIASES]
    found = [(owner, name) for owner, name in owners if isinstance(getattr(owner, name, None), Tensor)]
    return _Router(layer=layer, module=module, parent=parent, bias_at=found[0] if found else None)


@torch.no_grad()
def _self_check(router: _Router, spec: RouterSpec, geometry: RoutingGeometry, dtype: torch.dtype) -> None:
    """Compare the module's weights and choice with the spec's, on random hidden states [64, D].

    Raises:
        UnsupportedModel: they differ by more than rounding, or the module returns something else.
    """
    if router.device.type == "meta":
        raise UnsupportedModel("expected loaded weights, got a router on the meta device: attach after loading")
    logits, weights, experts = _run_router(router, dtype, geometry)
    bias, where = router.bias, f"the router of layer {router.layer} ({type(router.module).__name__})"
    mine, _ = replay_topk(logits, experts, spec, bias=bias)
    error = float((mine.to(weights.dtype).float() - weights.float()).abs().max())
    # Weights are at most `scale`; one rounding step apart is what another kernel may give.
    bound = 4 * torch.finfo(weights.dtype).eps * max(1.0, abs(spec.scale))
    narrower = torch.finfo(mine.dtype).eps > torch.finfo(weights.dtype).eps
    if not error <= bound or narrower:
        raise UnsupportedModel(
            f"expected {where} to weigh experts as {spec}, its weights ({weights.dtype}) differ by {error:.3g} "
            f"from the spec's ({mine.dtype}); at most {bound:.1g} is rounding"
        )
    state = torch.full((len(logits),), FREE, dtype=torch.uint8, device=logits.device)
    _, chosen = replay_topk(logits, experts, spec, state=state, bias=bias)
    # Equal values of selection in another order of experts are a tie, which torch.topk breaks as it likes.
    values = selection(logits, spec, bias)
    differ = (_sorted_at(values, chosen) != _sorted_at(values, experts)).any(-1).float().mean()
    if differ > 0:
        raise UnsupportedModel(
            f"expected {where} to choose experts as {spec}, {float(differ):.0%} of its choices differ from the spec's"
        )


def _sorted_at(values: Tensor, experts: Tensor) -> Tensor:
    return values.gather(1, experts).sort(-1).values


def _run_router(router: _Router, dtype: torch.dtype, geometry: RoutingGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [64, E], weights [64, K] and experts [64, K] of the module alone, logits of moderate size."""
    module = router.module
    size = int(next(module.parameters()).shape[-1])
    generator = torch.Generator().manual_seed(router.layer)
    hidden = torch.randn(_CHECK_ROWS, size, generator=generator).to(router.device, dtype)
    names = list(inspect.signature(module.forward).parameters)[1:]
    extra = [getattr(router.parent, name) for name in names if hasattr(router.parent, name)]
    shapes = [(_CHECK_ROWS, geometry.num_experts), (_CHECK_ROWS, geometry.top_k), (_CHECK_ROWS, geometry.top_k)]
    for attempt in range(2):
        try:
            with _evaluating(module):
                output = _call(module, hidden, extra)
        except Exception as error:
            raise UnsupportedModel(
                f"expected the router of layer {router.layer} ({type(module).__name__}) to run alone on hidden states "
                f"[{_CHECK_ROWS}, {size}], got {type(error).__name__}: {error}; attach before the model is sharded"
            ) from error
        if not isinstance(output, tuple) or [tuple(getattr(part, "shape", ())) for part in output] != shapes:
            raise UnsupportedModel(
                f"expected the router of layer {router.layer} to return logits, weights and experts {shapes}, "
                f"got {[tuple(getattr(part, 'shape', ())) for part in output]}"
            )
        largest = float(output[0].abs().max())
        if largest <= 8 or attempt:
            break
        hidden = hidden * (8 / largest)  # large logits saturate the scores into ties
    logits, weights, experts = output
    return logits, weights, experts


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without what the module does in training only: noise, and experts drawn at random."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _call(module: nn.Module, hidden: Tensor, extra: list[Any]) -> Any:
    """The router of hidden states [T, D]; some routers flatten [B, S, D] themselves and take nothing else."""
    try:
        return module.forward(hidden, *extra)
    except ValueError:
        return module.forward(hidden[None], *extra)
