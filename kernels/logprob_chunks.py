"""The way of every logprob: chunk after chunk of tokens, whose logits live until the next chunk begins.

    chunks = LogprobChunks.of(hidden, weight, targets)
    for chunk in chunks:
        loss, dlogprob, dentropy = f(chunk.index, chunk.logprob, chunk.entropy)    # [C] each
        chunk.backward(dlogprob, dentropy)
    dhidden, dweight, dbias = chunks.gradients()

A loss that is a sum over tokens has its gradient after the forward pass: 6 T V D operations, where an autograd graph
that keeps no logits computes them again and takes 8 T V D.

Legend: T tokens, n of them that need logits, C of a chunk, D model, V vocabulary (of this rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pacenote.kernels import check, logprob_ops
from pacenote.kernels.logprob_head import Head, Mode
from pacenote.kernels.logprob_rows import Rows
from pacenote.kernels.reference import wide

CHUNK_NUMBERS, CHUNK_NUMBERS_GPU = 2**25, 2**27
"""Logits of a chunk by default: 128 MiB in float32, and 512 MiB on an accelerator, whose matrix units want 512 tokens
or more to a product: below some 300 the time to read the weight is the longer one (bytes and operations of an H100)."""


class LogprobChunks:
    """Chunks of tokens with their logprobs and entropies, whose gradients add up here. Iterated once."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        size: int,
        *,
        want: tuple[bool, bool, bool] = (True, True, True),
        score: Tensor | None = None,
    ) -> None:
        """From parts that are checked already; see `of`.

        Args:
            hidden: [T, D].
            rows: the n tokens.
            head: the head.
            size: tokens of a chunk.
            want: whether hidden states, weight and bias need gradients.
            score: [n, 4] if it is known from before: no logits are computed but for gradients.
        """
        self.rows, self._hidden, self._head, self._size, self._score = rows, hidden, head, size, score
        kind = wide(hidden[:0]).dtype
        want_hidden, want_weight, want_bias = want
        self._grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        self._grad_weight = head.weight.new_zeros(head.weight.shape, dtype=kind) if want_weight else None
        self._grad_bias = (
            head.bias.new_zeros(len(head.bias), dtype=kind) if want_bias and head.bias is not None else None
        )

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        vocab_bound: int | None = None,
        mask: Tensor | None = None,
        picked: Tensor | None = None,
        chunk: int | None = None,
        mode: Mode = "chunked",
        group: dist.ProcessGroup | None = None,
        want: tuple[bool, bool, bool] = (True, True, True),
    ) -> LogprobChunks:
        """Arguments as `linear_logprob`, hidden [..., D]; `chunked` and `invariant` only. No graph is made of them.

        Args:
            hidden: [..., D].
            weight: [V, D].
            targets: [...].
            temperature: a number, or [...].
            bias: [V].
            ignore_index: target of ignored tokens.
            vocab_bound: real vocabulary.
            mask: [...] bool; waits for the device once.
            picked: [n] int64, the places of the tokens whose mask is set, if they are known already: nothing waits.
            chunk: tokens of a chunk.
            mode: as `linear_logprob`.
            group: as `linear_logprob`.
            want: whether hidden states, weight and bias need gradients.

        Raises:
            ValueError: as `linear_logprob`.
        """
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        head = Head.of(weight, bias, vocab_bound, mode, group, hidden.device)
        flat = flattened(hidden.detach(), weight, targets)
        rows = Rows.of(targets, temperature, ignore_index, head.vocabulary.whole, hidden, mask=mask, picked=picked)
        return cls(flat, rows, head, chunk_size(chunk, len(weight), hidden.device), want=want)

    def __iter__(self) -> Iterator[LogprobChunk]:
        for part in self.rows.chunks(self._size):
            chunk = LogprobChunk(self, part)
            yield chunk
            chunk.close()

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states [T, D], weight [V, D] and bias [V] in their dtypes, None where not wanted.

        A chunk without a `backward` has no part in them.
        """
        weight, bias = self._grad_weight, self._grad_bias
        return (
            self._grad_hidden,
            None if weight is None else weight.to(self._head.weight.dtype),
            None if bias is None or self._head.bias is None else bias.to(self._head.bias.dtype),
        )


class LogprobChunk:
    """A chunk while its logits live.

    Attributes:
        part: which of the n tokens, a slice.
        index: their places among the T: [C] int64, or the same slice where all tokens are taken.
        score: [C, 4], as `reference.logprob_score`.
    """

    def __init__(self, chunks: LogprobChunks, part: slice) -> None:
        self._chunks, self.part = chunks, part
        rows, head = chunks.rows, chunks._head
        self.index: Tensor | slice = part if rows.picked is None else rows.picked[part]
        self._x = torch.where(
            rows.live(part)[:, None], rows.take(chunks._hidden, part), 0.0
        )  # 0 * NaN must not reach the weight
        self._logits: Tensor | None = None
        self._open = True
        with _no_autocast(self._x.device.type):
            if chunks._score is not None:
                self.score = chunks._score[part]
            else:
                self._logits = None if head.invariant else head.logits(self._x)
                self.score = head.score(self._x, rows, part, self._logits)

    @property
    def logprob(self) -> Tensor:
        """[C] float32 (float64 of such)."""
        return self.score[:, 0]

    @property
    def entropy(self) -> Tensor:
        """[C] float32 (float64 of such), nats."""
        return self.score[:, 1]

    def backward(self, dlogprob: Tensor, dentropy: Tensor | None = None) -> None:
        """Add the gradients of a loss, given its own by logprob [C] and entropy [C]; None: 0. Once a chunk.

        Logits are narrowed to the dtype of the weight for their products, as autograd of plain torch does, and turned
        into their gradient in place where that is float32.

        Raises:
            RuntimeError: the next chunk has begun, or it was called before.
        """
        if not self._open:
            raise RuntimeError("expected backward once, before the next chunk, got it later: the logits are gone")
        chunks, part = self._chunks, self.part
        head, rows = chunks._head, chunks.rows
        with _no_autocast(self._x.device.type):
            logits = head.logits(self._x) if self._logits is None else self._logits
            self.close()
            narrow = head.weight.dtype
            slope = logits if logits.dtype == narrow else torch.empty_like(logits, dtype=narrow)
            logprob_ops.slope(
                logits, head.real[1], rows.heat_of(part), head.vocabulary.targets(rows, part), rows.state[part],
                self.score, dlogprob, dentropy, slope,
            )  # fmt: skip
            del logits
            if chunks._grad_hidden is not None:
                rows.put(head.grad_hidden(slope), part, chunks._grad_hidden)
            if chunks._grad_weight is not None:
                head.add_grad_weight(chunks._grad_weight, slope, self._x)
            if chunks._grad_bias is not None:
                head.add_grad_bias(chunks._grad_bias, slope)

    def close(self) -> None:
        """Let the logits go; nothing is left of a chunk but its results."""
        self._logits, self._open = None, False


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Products in the dtypes that they are given in; not every device has an autocast to switch off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def chunk_size(chunk: int | None, vocab: int, device: torch.device) -> int:
    """Tokens of a chunk: as asked, or as many as CHUNK_NUMBERS allow, in whole tiles of 128 where that is not too few.

    Raises:
        ValueError: fewer than one.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected chunk >= 1 tokens, got {chunk}")
    most = max(1, (CHUNK_NUMBERS if device.type == "cpu" else CHUNK_NUMBERS_GPU) // max(1, vocab))
    return chunk or (most if most < 128 else most // 128 * 128)


def flattened(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [..., D] as [T, D], if it fits targets [...] and weight [V, D].

    Raises:
        ValueError: it does not.
    """
    dim = weight.shape[1]
    fits = hidden.shape[:-1] in (targets.shape, (1, *targets.shape))
    if not fits or hidden.ndim < 1 or hidden.shape[-1] != dim or hidden.dtype != weight.dtype:
        raise ValueError(
            f"expected hidden {[*targets.shape, dim]} of {check.short(weight.dtype)} for these targets and weight, "
            f"got {list(hidden.shape)} of {check.short(hidden.dtype)}"
        )
    return hidden.reshape(targets.shape.numel(), dim)


def scores(chunks: LogprobChunks) -> Tensor:
    """`reference.logprob_score` [T, 4] of all T tokens of the chunks, whose logits are let go one after another."""
    rows = chunks.rows
    kind = wide(chunks._hidden[:0]).dtype
    score = torch.empty((len(rows.targets), 4), dtype=kind, device=rows.targets.device)
    for chunk in chunks:
        score[chunk.part] = chunk.score
    return score


class Linear(torch.autograd.Function):
    """Logprob and entropy of hidden states; logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, head: Head, size: int
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, D], weight [V, D], bias [V] -> logprob [n], entropy [n]. The head's tensors are these."""
        score = scores(LogprobChunks(hidden, rows, head, size, want=(False, False, False)))
        ctx.rows, ctx.size, ctx.how = rows, size, (head.vocabulary, head.invariant)
        ctx.save_for_backward(hidden, weight, bias, score)
        ctx.set_materialize_grads(False)
        return score[:, 0].clone(), score[:, 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None) -> Any:
        """Gradients of hidden [T, D], weight [V, D], bias [V]; the latter two summed in float32, chunk after chunk."""
        hidden, weight, bias, score = ctx.saved_tensors
        dlogprob = torch.zeros_like(score[:, 0]) if dlogprob is None else dlogprob
        head = Head(weight, bias, *ctx.how)
        chunks = LogprobChunks(hidden, ctx.rows, head, ctx.size, want=ctx.needs_input_grad[:3], score=score)
        for chunk in chunks:
            chunk.backward(dlogprob[chunk.part], None if dentropy is None else dentropy[chunk.part])
        return *chunks.gradients(), None, None, None
