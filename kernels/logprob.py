"""Logprob and entropy of targets, in chunks, so that no array [T, V] lives across them. Definition: reference.logprob.

The backward pass computes a chunk's logits again from hidden states; what is kept are four numbers a token. The log of
the partition sum is not one of them: z minus one rounded number would be off by an ulp of the largest logit, so the
largest logit and log sum exp(z - largest) are kept apart. `logprob_chunks` has the way of a chunk.

Legend: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pacenote.kernels import check, launch, logprob_liger, logprob_ops
from pacenote.kernels.logprob_chunks import Linear, chunk_size, flattened
from pacenote.kernels.logprob_head import Head, Mode
from pacenote.kernels.logprob_rows import Rows
from pacenote.kernels.logprob_vocabulary import Vocabulary
from pacenote.kernels.reference import wide

__all__ = ["linear_logprob", "logprob_from_logits"]


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
    mode: Mode = "chunked",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (nats) of each target under softmax((hidden weight^T + bias) / temperature).

    Args:
        hidden: [..., D] floating; its leading shape is that of `targets`, or [1, T] against [T].
        weight: [V, D] of the same dtype. With a group: this rank's rows, as many on every rank, in the ranks' order.
        targets: [...] int64 or int32; ids of the whole vocabulary.
        temperature: a number above 0, or such numbers [...].
        bias: [V].
        ignore_index: targets of this value give 0, and exactly no gradient.
        vocab_bound: real vocabulary; the entries from here on are padding and have no probability.
        mask: [...] bool; where it is not set the result is 0 with exactly no gradient, and no logits are computed.
            Waits for the device once, to learn how many are set.
        chunk: tokens whose logits exist at once.
        mode: "chunked": products by the vendor's library, a kernel for the rows. "invariant": a token's result and
            the gradient of its hidden state are the same bits whatever the other tokens are and however many, at the
            cost of slower products. "liger": liger-kernel's fused kernel, if it is installed; see `logprob_liger`.
        group: ranks that hold a part of the vocabulary each. All of them call with the same hidden states, targets,
            mask, options and needs of gradients. They exchange four numbers a token, and add up the gradient of the
            hidden states: it is the whole one on each rank, so what produced them must not reduce it again
            (megatron-core: gather sequence-parallel hidden states with tensor_parallel_output_grad=False).

    Returns:
        logprob and entropy, shaped as targets, float32 (float64 for float64 hidden states). On an accelerator a target
        out of range, or a temperature tensor not above 0, gives NaN rather than a wait; on the CPU it raises.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature or target out of range, an option that the
            mode has not got.
        ImportError: mode "liger" without liger-kernel.
    """
    liger = mode == "liger"
    head = Head.of(weight, bias, vocab_bound, "chunked" if liger else mode, group, hidden.device)
    flat = flattened(hidden, weight, targets)
    rows = Rows.of(targets, temperature, ignore_index, head.vocabulary.whole, hidden, mask=mask)
    if liger:
        out = logprob_liger.linear_logprob(
            flat, head.real[0], rows, temperature=temperature, bias=bias, grouped=group is not None
        )
    else:
        size = chunk_size(chunk, len(weight), hidden.device)
        out = Linear.apply(flat, weight, bias, rows, head, size)  # type: ignore[no-untyped-call]
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
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_logprob`, from logits [..., V] that exist already.

    The kernel reads them as they are and writes their gradient in their dtype; without it float32 copies exist for one
    chunk at a time. With a group they are this rank's columns.

    Returns:
        logprob and entropy, shaped as targets [...], float32 (float64 for float64 logits).

    Raises:
        ValueError: as `linear_logprob`.
    """
    vocabulary = Vocabulary.of(vocab_bound, logits.shape[-1] if logits.ndim else 0, group)
    fits = logits.ndim > 0 and logits.shape[:-1] in (targets.shape, (1, *targets.shape))
    if not fits or logits.dtype not in check.FLOATS:
        raise ValueError(
            f"expected floating logits {[*targets.shape, 'V']} for these targets, "
            f"got {list(logits.shape)} of {check.short(logits.dtype)}"
        )
    rows = Rows.of(targets, temperature, ignore_index, vocabulary.whole, logits, mask=mask)
    flat = logits.reshape(targets.shape.numel(), logits.shape[-1])
    size = chunk_size(chunk, flat.shape[1], logits.device)
    if launch.takes_triton(logits) and rows.picked is None and flat.stride(1) == 1:
        size = max(1, len(flat))  # nothing is copied, so all at once
    out = _Given.apply(flat, rows, vocabulary, size)  # type: ignore[no-untyped-call]
    return rows.place(out[0]), rows.place(out[1])


class _Given(torch.autograd.Function):
    """Logprob and entropy of logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, vocabulary: Vocabulary, size: int) -> tuple[Tensor, Tensor]:
        """logits [T, V] -> logprob [n], entropy [n]."""
        score = torch.empty((len(rows.targets), 4), dtype=wide(logits[:0]).dtype, device=logits.device)
        for part in rows.chunks(size):
            own = rows.take(logits, part)[:, : vocabulary.here]
            stats = logprob_ops.stats(own, None, rows.heat_of(part), vocabulary.targets(rows, part))
            score[part] = vocabulary.score(stats[None], rows, part)
        ctx.rows, ctx.vocabulary, ctx.size = rows, vocabulary, size
        ctx.save_for_backward(logits, score)
        ctx.set_materialize_grads(False)
        return score[:, 0].clone(), score[:, 1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None) -> Any:
        """Gradient of the logits [T, V]."""
        (logits, score), rows, vocabulary = ctx.saved_tensors, ctx.rows, ctx.vocabulary
        dlogprob = torch.zeros_like(score[:, 0]) if dlogprob is None else dlogprob
        grad = logits.new_zeros(logits.shape)
        for part in rows.chunks(ctx.size):
            own = rows.take(logits, part)[:, : vocabulary.here]
            out = grad[part, : vocabulary.here] if rows.picked is None else torch.empty_like(own)
            logprob_ops.slope(
                own, None, rows.heat_of(part), vocabulary.targets(rows, part), rows.state[part], score[part],
                dlogprob[part], None if dentropy is None else dentropy[part], out,
            )  # fmt: skip
            if rows.picked is not None:
                rows.put(out, part, grad[:, : vocabulary.here])
        return grad, None, None, None
