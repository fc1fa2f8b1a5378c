"""The vocabulary as one process sees it: all of it, or the rows that this rank of a group holds.

Legend: C tokens of a chunk, V vocabulary (of this rank), P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pacenote.kernels import logprob_ops
from pacenote.kernels.logprob_rows import Rows


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which ids are here.

    Attributes:
        whole: number of real ids, on all ranks together.
        first: id of this rank's first row.
        here: number of this rank's rows that are real; behind them stands padding.
        group: the ranks that hold one part each, in their order; None: all is here.
    """

    whole: int
    first: int
    here: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, vocab_bound: int | None, rows: int, group: dist.ProcessGroup | None) -> Vocabulary:
        """From the number of rows of each rank, padding included, and the bound of the whole.

        Raises:
            ValueError: the bound is below 1 or above what there is.
        """
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        whole = rows * size if vocab_bound is None else vocab_bound
        if not 1 <= whole <= rows * size:
            raise ValueError(f"expected 1 <= vocab_bound <= V = {rows * size}, got {whole}")
        return cls(whole, rank * rows, min(max(whole - rank * rows, 0), rows), group)

    def targets(self, rows: Rows, part: slice) -> Tensor:
        """Targets [C] of a chunk as rows of this rank, -1 where another has it."""
        own = rows.targets[part] - self.first
        return own if self.group is None else torch.where((own >= 0) & (own < self.here), own, -1)

    def score(self, parts: Tensor, rows: Rows, part: slice) -> Tensor:
        """`reference.logprob_score` [C, 4] of a chunk from the stats of its parts here [P, C, 4].

        With a group, after one exchange of [C, 4] float32, added up in the order of the ranks: all get the same bits.
        """
        if self.group is not None:
            own = logprob_ops.fold(parts).contiguous()
            parts = own.new_empty((self.group.size(), *own.shape))
            dist.all_gather_into_tensor(parts.flatten(0, 1), own, group=self.group)
        return logprob_ops.score(parts, rows.state[part])
