"""What every tensor operation of an exact forward pass may be: a table, and what runs in place of each operation.

A forward pass is exact if a row's numbers depend on that row alone: not on how many rows run with it, nor where it
stands among them. Copies, comparisons and single roundings (a + b, a * b) are so as they are. Sums, matmuls and the
functions that torch computes otherwise at the end of an array than within it run in pieces of a constant shape. What is
in no table is refused by its name.

Legend: R rows of a tile, N length of a row, K depth of a matmul, V its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels import tiles
from pacenote.kernels.invariant import invariant_linear
from pacenote.kernels.reference import COUNTERS
from pacenote.kernels.spec import PAD
from pacenote.replay.errors import UnsupportedModel

Kind = Literal["moved", "integers", "rounded once", "in pieces", "in row tiles", "matmul by rows", "one op"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("""
    alias arange as_strided cat clone constant_pad_nd copy detach diagonal embedding empty empty_like empty_strided
    expand fill flip full full_like gather index index_copy index_put index_select lift_fresh masked_fill
    masked_scatter masked_select new_empty new_empty_strided new_full new_ones new_zeros ones ones_like permute repeat
    repeat_interleave _reshape_alias resize roll scalar_tensor scatter select select_scatter slice slice_scatter split
    split_with_sizes squeeze stack t _to_copy transpose tril triu unbind unfold unsqueeze _unsafe_view view view_as
    view_as_complex view_as_real where zero zeros zeros_like
""")
"""Numbers change place or number format, no more."""
ROUNDED = _names("""
    abs add all amax amin aminmax any argmax argmin ceil clamp clamp_max clamp_min div eq equal floor ge gt hardtanh
    index_add isfinite isinf isnan is_nonzero le _local_scalar_dense lt max maximum min minimum mul ne neg relu round
    rsub sign sqrt sub trunc
""")
"""Extremes, comparisons, whole numbers, and one rounding of an exact result, for which IEEE 754 leaves no choice.

`index_add` adds what an expert gives to its tokens, each of which it has at most once; expert after expert.
"""
SUMS = _names("add div mul rsub sub")
"""Of these, with a factor or of complex numbers: several roundings, which some code fuses."""
FUNCTIONS = _names("""
    addcdiv addcmul cos elu erf exp exp2 expm1 gelu hardsigmoid hardswish leaky_relu lerp log log1p log2 logit mish
    polar pow reciprocal rsqrt selu sigmoid silu sin softplus tanh
""")
"""Approximations, element by element: torch has other code for what is left over behind whole registers."""
ROWS = _names("""
    _fused_rms_norm _log_softmax _softmax argsort cumsum linalg_vector_norm logsumexp mean native_layer_norm prod sort
    std sum topk var
""")
"""Over the last axis."""
MATMULS = _names("mm addmm bmm baddbmm")


class ExactForward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, this thread's tensor operations run in their exact form, and others raise.

    Args:
        weights: the model's parameters and buffers: a matmul must have one on its right.
        seen: collects the operations that run, by name.
    """

    def __init__(self, weights: Iterable[Tensor], seen: dict[str, Kind]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._copies: list[Tensor] = []  # of weights; kept, so that no other tensor comes to stand where they stood
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation in its exact form; one that is made of others is taken apart first, as autograd does."""
        kwargs = kwargs or {}
        name, composite = _describe(func)
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        kind, run = self._find(name, func, args, kwargs)
        self._seen.setdefault(name, kind)
        out = run(func, args, kwargs)
        if kind == "moved" and name != "embedding" and args and self._is_weight(args[0]) and isinstance(out, Tensor):
            self._remember(out)
        return out

    def _find(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Kind, Callable[..., Any]]:
        """What an operation is, and what runs for it.

        Raises:
            UnsupportedModel: it stands in no table.
        """
        if name in MOVES:
            return "moved", _as_is
        if name in _OURS:
            return "one op", _OURS[name]
        several = kwargs.get("alpha", 1) != 1 or any(isinstance(x, Tensor) and x.is_complex() for x in args)
        if name in ROUNDED and not several:
            return "rounded once", _as_is
        if not any(x.is_floating_point() or x.is_complex() for x in _tensors([*args, *kwargs.values()])):
            return "integers", _as_is
        if name in FUNCTIONS or (name in SUMS and several):
            return "in pieces", _pointwise
        if name in ROWS:
            return "in row tiles", _rowwise
        if name in MATMULS:
            return "matmul by rows", self._matmul
        raise _refusal(func, args, kwargs)

    def _is_weight(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._weights

    def _remember(self, copy: Tensor) -> None:
        pointer = copy.untyped_storage().data_ptr()
        if pointer not in self._weights:
            self._weights.add(pointer)
            self._copies.append(copy)

    def _matmul(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """[..., K] times a weight [K, V] on its right, by rows; or of depth 1, which is no sum."""
        *added, left, right = args
        product: Tensor
        if any(kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            raise _refusal(func, args, kwargs)
        if left.shape[-1] == 1:
            product = left * right
        else:
            weight = right if right.ndim == 2 else right[0]
            shared = right.ndim == 2 or len(right) == 1 or right.stride(0) == 0
            if not (shared and self._is_weight(right)):
                raise UnsupportedModel(
                    f"expected every matmul of an exact forward pass to have a weight on its right, got {func} of "
                    f"{list(left.shape)} and {list(right.shape)}: the order of its sums depends on the batch"
                )
            with torch.no_grad():  # autograd has its place above, and saw the operation itself
                rows = invariant_linear(left.reshape(-1, left.shape[-1]), weight.t())
            product = rows.reshape(*left.shape[:-1], weight.shape[1])
        return product + added[0] if added else product


def _as_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _pointwise(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A pointwise operation in pieces; written over its first tensor where the operation's name ends so."""
    places = [place for place, x in enumerate(args) if isinstance(x, Tensor)]
    plain = getattr(torch.ops.aten, _describe(func)[0])

    def call(*pieces: Tensor) -> Tensor:
        given = list(args)
        for place, piece in zip(places, pieces, strict=True):
            given[place] = piece
        out: Tensor = plain(*given, **kwargs)
        return out

    out = tiles.by_elements(call, *(args[place] for place in places))
    return args[0].copy_(out) if func._schema.name.endswith("_") else out


def _rowwise(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of the last axis of [..., N], in tiles [R, N]."""
    arguments = [argument for argument in func._schema.arguments if not argument.kwarg_only]
    given: list[Any] = [*args, *(argument.default_value for argument in arguments[len(args) :])]
    x, *rest = given
    names = [argument.name for argument in arguments]
    if "dim" in names:
        place = names.index("dim") - 1
        axes = rest[place] if isinstance(rest[place], Sequence) else [rest[place]]
        fits = len(axes) == 1 and axes[0] in (-1, x.ndim - 1)
        rest[place] = [1] if isinstance(rest[place], Sequence) else 1
    else:
        fits = "normalized_shape" in names and len(rest[0]) == 1
    if not fits or x.ndim == 0:
        raise _refusal(func, args, kwargs)
    single = len(func._schema.returns) == 1

    def call(tile: Tensor) -> tuple[Tensor, ...]:
        out = func(tile, *rest, **kwargs)
        return (out,) if single else tuple(out)

    outs = tiles.by_rows(call, x)
    return outs[0] if single else outs


def _route(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """`replay_topk` in tiles of rows; what fills up the last one is padding, and comes off its counts."""
    logits, rows, state, *rest = args
    state = torch.ones_like(rows[:, 0], dtype=torch.uint8) if state is None else state
    short = -len(logits) % tiles.LANES
    padded = [tiles.pad_rows(x, tiles.LANES) for x in (logits, rows, state)]
    padded[2][len(logits) :] = PAD
    starts = range(0, max(1, len(padded[0])), tiles.LANES)
    parts = [func(*(x[start : start + tiles.LANES] for x in padded), *rest, **kwargs) for start in starts]
    weights, experts, counts, margins, loads = (torch.stack(outs) for outs in zip(*parts, strict=True))
    counts = counts.sum(0)
    if counts.numel():
        counts[COUNTERS.index("pad")] -= short
    kept = (x.flatten(0, 1)[: len(logits)] for x in (weights, experts))
    return *kept, counts, margins.sum(0), loads.sum(0)


_OURS: dict[str, Callable[..., Any]] = {
    "pacenote::replay_topk": _route,
    "pacenote::invariant_attention": _as_is,
    "pacenote::invariant_linear": _as_is,
}


@cache
def _describe(func: Any) -> tuple[str, bool]:
    """An operation's name, without what says that it works in place, and whether it is made of others."""
    space, _, name = func._schema.name.partition("::")
    composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return name.rstrip("_") if space == "aten" else f"{space}::{name}", composite


def _refusal(func: Any, args: Any, kwargs: Any) -> UnsupportedModel:
    shapes = ", ".join(str(list(x.shape)) for x in _tensors([*args, *kwargs.values()]))
    return UnsupportedModel(
        f"expected operations that are known not to mix tokens, got {func} of {shapes}: "
        "it has no form whose rows do not depend on the batch, so this model has no exact mode"
    )


def _tensors(value: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    for item in value:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)
