"""A language model's head, or this rank's part of it: what its matrix products give logprobs and take for gradients.

Legend: T tokens, C tokens of a chunk, D model, V rows of the weight, V' of them
real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from pacenote.kernels import check, invariant, launch, logprob_ops
from pacenote.kernels.logprob_rows import Rows
from pacenote.kernels.logprob_vocabulary import Vocabulary
from pacenote.kernels.reference import logprob_stats, wide

Mode: TypeAlias = Literal["chunked", "invariant", "liger"]


@dataclass(frozen=True, slots=True)
class Head:
    """A head and how it is computed.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        vocabulary: which ids its rows are.
        invariant: a token's bits do not depend on the other tokens.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: Vocabulary
    invariant: bool

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        vocab_bound: int | None,
        mode: Mode,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> Head:
        """Check weight [V, D], bias [V] and mode.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, an unknown mode.
        """
        if mode not in ("chunked", "invariant"):
            raise ValueError(f"expected mode 'chunked', 'invariant' or 'liger', got {mode!r}")
        check.tensor(weight, "weight", (None, None), check.FLOATS, device)
        vocabulary = Vocabulary.of(vocab_bound, len(weight), group)
        if bias is not None:
            check.tensor(bias, "bias", (weight.shape[0],), check.FLOATS, device)
        return cls(weight, bias, vocabulary, mode == "invariant")

    @property
    def real(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the real vocabulary here, [V', D] and [V']."""
        here = self.vocabulary.here
        return self.weight[:here], None if self.bias is None else self.bias[:here]

    def logits(self, x: Tensor) -> Tensor:
        """[C, V'] in float32 (float64 of such) of hidden states [C, D], without bias."""
        weight, _ = self.real
        if self.invariant:
            return invariant.product(x, weight)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)  # inputs as they are, sums and result in float32
        return torch.mm(wide(x), wide(weight).t())

    def score(self, x: Tensor, rows: Rows, part: slice, logits: Tensor | None) -> Tensor:
        """`reference.logprob_score` [C, 4] of a chunk, of hidden states [C, D] or, where they exist, logits [C, V']."""
        (weight, bias), heat, targets = self.real, rows.heat_of(part), self.vocabulary.targets(rows, part)
        if logits is not None:
            parts = logprob_ops.stats(logits, bias, heat, targets)[None]
        elif launch.takes_triton(x):
            from pacenote.kernels import logprob_tiles_triton

            parts = logprob_tiles_triton.stats(x, weight, bias, heat, targets)
        else:
            parts = tiled_stats(x, weight, bias, heat, targets)[None]
        return self.vocabulary.score(parts, rows, part)

    def grad_hidden(self, slope: Tensor) -> Tensor:
        """Gradient [C, D] of hidden states from that of the logits [C, V'], of all ranks."""
        weight, _ = self.real
        kind = self.weight.dtype if self.vocabulary.group is None else wide(slope[:0]).dtype
        if self.invariant:
            grad = invariant.product(slope, weight.t(), dtype=kind)
        elif kind == slope.dtype:
            grad = torch.mm(slope, weight)
        elif slope.is_cuda:
            grad = torch.mm(slope, weight, out_dtype=kind)
        else:
            grad = torch.mm(slope.to(kind), weight.to(kind))
        if self.vocabulary.group is not None:
            dist.all_reduce(grad, group=self.vocabulary.group)
        return grad.to(self.weight.dtype)

    def add_grad_weight(self, total: Tensor, slope: Tensor, x: Tensor) -> None:
        """Add slope^T x, of slope [C, V'] and hidden states [C, D], to `total` [V, D] float32 (float64 of such)."""
        real = total[: self.vocabulary.here]
        if self.invariant:
            invariant.add_outer(real, slope, x)
        elif slope.is_cuda and slope.dtype in (torch.bfloat16, torch.float16):
            torch.addmm(real, slope.t(), x, out_dtype=torch.float32, out=real)
        else:
            real.addmm_(wide(slope).t(), wide(x))

    def add_grad_bias(self, total: Tensor, slope: Tensor) -> None:
        """Add the sum over the chunk of slope [C, V'] to `total` [V] float32 (float64 of such)."""
        if self.invariant:
            invariant.add_rows(total[: self.vocabulary.here], slope)
        else:
            total[: self.vocabulary.here] += slope.sum(dim=0, dtype=total.dtype)


def tiled_stats(x: Tensor, weight: Tensor, bias: Tensor | None, heat: Tensor | None, targets: Tensor) -> Tensor:
    """`reference.logprob_stats` [C, 4] of hidden states [C, D], in tiles of one number of rows: see `invariant`."""
    matrix, tile = wide(weight).t(), invariant.TILE
    out = x.new_empty((len(x), 4), dtype=matrix.dtype)
    for start in range(0, len(x), tile):
        part = slice(start, min(start + tile, len(x)))
        rest = tile - (part.stop - start)
        own = heat if heat is None or not heat.ndim else torch.cat([heat[part], heat.new_ones(rest)])
        z = logprob_ops.scaled(invariant.alone(invariant.padded(x[part]), matrix), bias, own)
        chosen = torch.cat([targets[part], targets.new_full((rest,), -1)])
        out[part] = logprob_stats(z, chosen)[: tile - rest]
    return out
