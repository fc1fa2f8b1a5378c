"""Logprob and entropy of targets, in chunks, so that no array [T, V] lives across them. Definition: reference.logprob.

The backward pass recomputes a chunk's logits from hidden states; what is kept is the entropy [T]. The log of the
partition sum is not: z minus one rounded number would be off by an ulp of the largest logit, which log_softmax is not.
With z the logits over the temperature, p = softmax(z), y the target, H the entropy:

    d logprob / dz = onehot(y) - p        d H / dz = -p (log p + H)

Legend: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pacenote.kernels import check
from pacenote.kernels.reference import wide

CHUNK_NUMBERS = 2**25
"""Logits of a chunk by default: 128 MiB in float32."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    vocab_bound: int | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (nats) of each target under softmax((hidden weight^T + bias) / temperature).

    Args:
        hidden: [..., D] floating; its leading shape is that of `targets`, or [1, T] against [T].
        weight: [V, D] of the same dtype.
        targets: [...] int64 or int32.
        temperature: a number above 0, or such numbers [...].
        bias: [V].
        ignore_index: targets of this value give 0, and exactly no gradient.
        vocab_bound: real vocabulary; the entries from here on are padding and have no probability.
        mask: [...] bool; where it is not set the result is 0 with exactly no gradient, and no logits are computed.
            Waits for the device once, to learn how many are set.
        chunk: tokens whose logits exist at once.

    Returns:
        logprob and entropy, shaped as targets, float32 (float64 for float64 hidden states). On an accelerator a target
        out of range, or a temperature tensor not above 0, gives NaN rather than a wait; on the CPU it raises.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a temperature or target out of range.
    """
    check.tensor(weight, "weight", (None, None), check.FLOATS, hidden.device)
    bound = _bound(vocab_bound, weight.shape[0])
    dim = weight.shape[1]
    flat = hidden.reshape(-1, dim) if hidden.ndim and hidden.shape[-1] == dim else hidden
    fits = hidden.shape[:-1] in (targets.shape, (1, *targets.shape))
    if not fits or flat.ndim != 2 or hidden.shape[-1] != dim or hidden.dtype != weight.dtype:
        raise ValueError(
            f"expected hidden {[*targets.shape, dim]} of {check.short(weight.dtype)} for these targets and weight, "
            f"got {list(hidden.shape)} of {check.short(hidden.dtype)}"
        )
    if bias is not None:
        check.tensor(bias, "bias", (weight.shape[0],), check.FLOATS, hidden.device)
        bias = bias[:bound]
    rows = _Rows.of(targets, temperature, ignore_index, bound, mask, hidden)
    out = _Linear.apply(rows.take(flat), weight[:bound], bias, rows, _chunk(chunk, bound))  # type: ignore[no-untyped-call]
    return rows.place(out[0]), rows.place(out[1])


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_bound: int | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_logprob`, from logits [..., V] that exist already; float32 copies exist for one chunk at a time.

    Returns:
        logprob and entropy, shaped as targets [...], float32 (float64 for float64 logits).

    Raises:
        ValueError: as `linear_logprob`.
    """
    bound = _bound(vocab_bound, logits.shape[-1] if logits.ndim else 0)
    fits = logits.ndim > 0 and logits.shape[:-1] in (targets.shape, (1, *targets.shape))
    if not fits or logits.dtype not in check.FLOATS:
        raise ValueError(
            f"expected floating logits {[*targets.shape, 'V']} for these targets, "
            f"got {list(logits.shape)} of {check.short(logits.dtype)}"
        )
    rows = _Rows.of(targets, temperature, ignore_index, bound, mask, logits)
    flat = logits.reshape(-1, logits.shape[-1])[:, :bound]
    out = _Given.apply(rows.take(flat), rows, _chunk(chunk, bound))  # type: ignore[no-untyped-call]
    return rows.place(out[0]), rows.place(out[1])


def _bound(vocab_bound: int | None, vocab: int) -> int:
    bound = vocab if vocab_bound is None else vocab_bound
    if not 1 <= bound <= vocab:
        raise ValueError(f"expected 1 <= vocab_bound <= V = {vocab}, got {bound}")
    return bound


def _chunk(chunk: int | None, vocab: int) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected chunk >= 1 tokens, got {chunk}")
    return chunk or max(1, CHUNK_NUMBERS // vocab)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The tokens that need logits.

    Attributes:
        targets: [T] int64, within the vocabulary.
        live: [T] bool, False where the target is ignored: neither result nor gradient.
        valid: [T] bool, False where the target is out of range or the temperature not positive: the result is NaN.
        temperature: [T] or 0-d, in the dtype of the logits that are computed.
        picked: [T] int64, their places among all, or None for all of them.
        shape: of the result.
    """

    targets: Tensor
    live: Tensor
    valid: Tensor
    temperature: Tensor
    picked: Tensor | None
    shape: torch.Size

    @classmethod
    def of(
        cls,
        targets: Tensor,
        temperature: float | Tensor,
        ignore_index: int,
        bound: int,
        mask: Tensor | None,
        like: Tensor,
    ) -> _Rows:
        """Check targets, temperature and mask [...] against `like` [..., any]; pick the tokens whose mask is set."""
        device, kind = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
        check.tensor(targets, "targets", tuple(targets.shape), (torch.int64, torch.int32), device)
        flat = targets.reshape(-1).long()
        picked = None
        if mask is not None:
            check.tensor(mask, "mask", tuple(targets.shape), (torch.bool,), device)
            picked = mask.reshape(-1).nonzero()[:, 0]
            flat = flat[picked]
        if isinstance(temperature, Tensor):
            check.tensor(temperature, "temperature", tuple(targets.shape), check.FLOATS, device)
            heat = temperature.to(kind).reshape(-1)
            heat = heat if picked is None or not temperature.ndim else heat[picked]
        else:
            if not 0 < temperature < float("inf"):
                raise ValueError(f"expected a temperature above 0, got {temperature}")
            heat = torch.full((), float(temperature), dtype=kind, device=device)
        live = flat != ignore_index
        inside = (flat >= 0) & (flat < bound)
        if device.type == "cpu" and not bool((inside | ~live).all()):
            wrong = int(flat[~inside & live][0])
            raise ValueError(f"expected targets in [0, {bound}) or ignore_index={ignore_index}, got {wrong}")
        cold = ~(heat > 0) & live
        if device.type == "cpu" and bool(cold.any()):
            raise ValueError(f"expected temperatures above 0, got {float(heat.expand_as(cold)[cold][0])}")
        return cls(flat.clamp(0, bound - 1), live, inside & (heat > 0), heat, picked, targets.shape)

    def take(self, values: Tensor) -> Tensor:
        """Rows of [all, any] that need logits."""
        return values if self.picked is None else values[self.picked]

    def place(self, values: Tensor) -> Tensor:
        """[T] back among all, zeros elsewhere, in the shape of the targets."""
        if self.picked is None:
            return values.reshape(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy(0, self.picked, values).reshape(self.shape)

    def chunks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` tokens."""
        for start in range(0, len(self.targets), size):
            yield slice(start, min(start + size, len(self.targets)))

    def heat(self, part: slice) -> Tensor:
        """Temperature of a chunk, [C, 1] or 0-d."""
        return self.temperature[part, None] if self.temperature.ndim else self.temperature


def _score(z: Tensor, rows: _Rows, part: slice) -> tuple[Tensor, Tensor]:
    """logprob [C] and entropy [C] of a chunk's scaled logits z [C, V]; NaN where they are no distribution."""
    live, valid = rows.live[part], rows.valid[part]
    logp = z.log_softmax(dim=1)
    p = logp.exp()
    # p log p is 0 at p = 0, where the logarithm may be -inf
    entropy = -torch.where(p == 0, 0.0, p * logp).sum(dim=1)
    chosen = logp.gather(1, rows.targets[part, None])[:, 0]
    chosen, entropy = (torch.where(valid, x, float("nan")) for x in (chosen, entropy))
    return torch.where(live, chosen, 0.0), torch.where(live, entropy, 0.0)


def _slope(z: Tensor, rows: _Rows, part: slice, entropy: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """Gradient [C, V] of a chunk's unscaled logits, from its scaled ones; exactly 0 for ignored tokens."""
    chosen_grad, entropy_grad = (g[part, None].to(z.dtype) for g in grads)
    logp = z.log_softmax(dim=1)
    p = logp.exp()
    slope = torch.where(p == 0, 0.0, -p * (chosen_grad + entropy_grad * (logp + entropy[part, None])))
    slope.scatter_add_(1, rows.targets[part, None], chosen_grad)
    slope = torch.where(rows.valid[part, None], slope, float("nan"))
    return torch.where(rows.live[part, None], slope / rows.heat(part), 0.0)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [C, V] in float32 or float64 of hidden states [C, D]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)  # inputs as they are, sums and result in float32
    else:
        logits = wide(x) @ wide(weight).t()
    return logits if bias is None else logits + bias.to(logits.dtype)


class _Linear(torch.autograd.Function):
    """Chunked logprob and entropy of hidden states; logits are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, chunk: int) -> Any:
        """hidden [T, D], weight [V, D], bias [V] -> logprob [T], entropy [T]."""
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chosen, entropy = (torch.empty(len(hidden), dtype=kind, device=hidden.device) for _ in range(2))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in rows.chunks(chunk):
                x = torch.where(rows.live[part, None], hidden[part], 0.0)
                z = _project(x, weight, bias) / rows.heat(part)
                chosen[part], entropy[part] = _score(z, rows, part)
        ctx.rows, ctx.chunk = rows, chunk
        ctx.save_for_backward(hidden, weight, bias, entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chosen_grad: Tensor, entropy_grad: Tensor) -> Any:
        """Gradients of hidden [T, D], weight [V, D], bias [V]; the latter two summed in float32, chunk after chunk."""
        hidden, weight, bias, entropy = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=entropy.dtype) if want_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in ctx.rows.chunks(ctx.chunk):
                x = torch.where(ctx.rows.live[part, None], hidden[part], 0.0)  # 0 * NaN must not reach the weight
                z = _project(x, weight, bias) / ctx.rows.heat(part)
                slope = _slope(z, ctx.rows, part, entropy, (chosen_grad, entropy_grad))
                if grad_hidden is not None:
                    grad_hidden[part] = slope.to(weight.dtype) @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(slope.t(), x.to(slope.dtype))
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
        cast = [g if g is None else g.to(like.dtype) for g, like in ((grad_weight, weight), (grad_bias, bias))]
        return grad_hidden, *cast, None, None


class _Given(torch.autograd.Function):
    """Chunked logprob and entropy of logits that exist."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, chunk: int) -> Any:
        """logits [T, V] -> logprob [T], entropy [T]."""
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        chosen, entropy = (torch.empty(len(logits), dtype=kind, device=logits.device) for _ in range(2))
        for part in rows.chunks(chunk):
            chosen[part], entropy[part] = _score(wide(logits[part]) / rows.heat(part), rows, part)
        ctx.rows, ctx.chunk = rows, chunk
        ctx.save_for_backward(logits, entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chosen_grad: Tensor, entropy_grad: Tensor) -> Any:
        """Gradient [T, V] of the logits, in their dtype."""
        logits, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in ctx.rows.chunks(ctx.chunk):
            z = wide(logits[part]) / ctx.rows.heat(part)
            grad[part] = _slope(z, ctx.rows, part, entropy, (chosen_grad, entropy_grad)).to(grad.dtype)
        return grad, None, None
