"""The ops behind `linear_logprob`: what a part of the vocabulary says of its tokens, their score, and the gradient.

`reference.logprob_stats`, `logprob_fold`, `logprob_score` and `logprob_slope` are the definitions. CPU tensors and
float64 take them; CUDA and ROCm take the kernels of `logprob_triton`, and so does the CPU in Triton's interpreter.

Legend: C tokens of a chunk, V vocabulary or this rank's part of it, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacenote.kernels import launch, reference

__all__ = ["fold", "scaled", "score", "slope", "stats"]


def scaled(logits: Tensor, bias: Tensor | None, heat: Tensor | None) -> Tensor:
    """(logits [C, V] + bias [V]) / heat ([C] or 0-d), in float32 (float64 of such)."""
    z = reference.wide(logits)
    z = z if bias is None else z + bias.to(z.dtype)
    return z if heat is None else z / (heat[:, None] if heat.ndim else heat)


def stats(logits: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    """`reference.logprob_stats` [C, 4] of logits [C, V], bias [V], heat [C] or 0-d, targets [C] int64."""
    found: Tensor = _stats(logits, bias, heat, targets)
    return found


def fold(parts: Tensor) -> Tensor:
    """`reference.logprob_fold`: stats [C, 4] of parts [P, C, 4]."""
    folded: Tensor = parts[0] if len(parts) == 1 else _score(parts, None)
    return folded


def score(parts: Tensor, state: Tensor) -> Tensor:
    """`reference.logprob_score` [C, 4] of parts [P, C, 4] added up, and state [C] uint8."""
    found: Tensor = _score(parts, state)
    return found


def slope(
    logits: Tensor,
    bias: Tensor | None,
    heat: Tensor | None,
    targets: Tensor,
    state: Tensor,
    score: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    """Write the gradient of logits [C, V], before bias and heat, to `out` [C, V], which may be the logits themselves.

    Args:
        logits: [C, V], unit stride along V.
        bias: [V] or None.
        heat: [C], 0-d or None.
        targets: [C] int64, negative where the target is elsewhere.
        state: [C] uint8.
        score: [C, 4], contiguous, of the whole vocabulary.
        dlogprob: [C].
        dentropy: [C] or None.
        out: [C, V] of any floating dtype, unit stride along V.
    """
    _slope(logits, bias, heat, targets, state, score, dlogprob, dentropy, out)


@torch.library.custom_op(
    "pacenote::logprob_stats",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, Tensor? heat, Tensor targets) -> Tensor",
)
def _stats(logits: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    """[C, 4]."""
    if launch.takes_triton(logits):
        from pacenote.kernels import logprob_triton

        return logprob_triton.stats(logits, bias, heat, targets)
    return reference.logprob_stats(scaled(logits, bias, heat), targets)


@_stats.register_fake
def _(logits: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0], 4), dtype=reference.wide(logits).dtype)


@torch.library.custom_op("pacenote::logprob_score", mutates_args=(), schema="(Tensor parts, Tensor? state) -> Tensor")
def _score(parts: Tensor, state: Tensor | None) -> Tensor:
    """[C, 4]: the score, or without a state the stats."""
    if launch.takes_triton(parts):
        from pacenote.kernels import logprob_triton

        return logprob_triton.score(parts, state)
    folded = reference.logprob_fold(parts)
    return folded if state is None else reference.logprob_score(folded, state)


@_score.register_fake
def _(parts: Tensor, state: Tensor | None) -> Tensor:
    return parts.new_empty(parts.shape[1:])


@torch.library.custom_op(
    "pacenote::logprob_slope",
    mutates_args=("out",),
    schema="(Tensor logits, Tensor? bias, Tensor? heat, Tensor targets, Tensor state, Tensor score, Tensor dlogprob,"
    " Tensor? dentropy, Tensor(a!) out) -> ()",
)
def _slope(
    logits: Tensor,
    bias: Tensor | None,
    heat: Tensor | None,
    targets: Tensor,
    state: Tensor,
    score: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    if launch.takes_triton(logits):
        from pacenote.kernels import logprob_triton

        return logprob_triton.slope(logits, bias, heat, targets, state, score, dlogprob, dentropy, out)
    z = scaled(logits, bias, heat)
    grad = reference.logprob_slope(z, targets, state, score, dlogprob, dentropy)
    out.copy_(scaled(grad, None, heat))
    return None


@_slope.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    heat: Tensor | None,
    targets: Tensor,
    state: Tensor,
    score: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    return None
