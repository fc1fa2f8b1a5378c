"""What is suspicious in a routing record, counted by layer. A report is not a verdict.

Legend: R rows, L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacenote.kernels.spec import MISSING

_COLUMNS = ("out_of_range", "duplicate", "zero", "zero_tail_by_layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What `RoutingRecord.validate` found. Arrays are [L] int64, rows counted by layer; MISSING rows are left out.

    Attributes:
        layers: global layer ids.
        rows: R.
        missing: rows whose provenance is MISSING.
        out_of_range: rows with an id >= E (they are routed freely).
        duplicate: rows that name an expert twice (they are routed freely).
        zero: rows that are all expert 0; valid for K = 1, for K > 1 a sign of zero padding.
        zero_tail_by_layer: rows at the end that are all expert 0 in the layer.
        all_zero: rows that are zero in every layer: what an engine sends for tokens it has no routes of.
        zero_tail: rows at the end that are zero in every layer.
    """

    layers: tuple[int, ...]
    rows: int
    missing: int
    out_of_range: NDArray[np.int64]
    duplicate: NDArray[np.int64]
    zero: NDArray[np.int64]
    zero_tail_by_layer: NDArray[np.int64]
    all_zero: int
    zero_tail: int

    @property
    def ok(self) -> bool:
        """True if every known row can be replayed in every layer."""
        return not (self.out_of_range.any() or self.duplicate.any())

    def table(self) -> str:
        """A text table: a sentence, then a line a layer that has something to say."""
        head = (
            f"{self.rows} rows of {len(self.layers)} layers: {self.missing} missing, {self.all_zero} zero in every "
            f"layer, {self.zero_tail} of them at the end; "
            f"{'every known row can be replayed' if self.ok else 'some rows cannot be replayed'}"
        )
        lines = [("layer", "out of range", "duplicate", "zero", "zero tail")]
        for index, layer in enumerate(self.layers):
            counts = [int(getattr(self, name)[index]) for name in _COLUMNS]
            if any(counts):
                lines.append((str(layer), *map(str, counts)))  # type: ignore[arg-type]
        if len(lines) == 1:
            return head
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        body = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join((head, *body))


def examine(
    experts: NDArray[Any], provenance: NDArray[np.uint8], *, layers: tuple[int, ...], num_experts: int
) -> RecordReport:
    """The report of experts [R, L, K] and provenance [R]. Content never raises."""
    missing = provenance == MISSING
    known = experts[~missing]
    ordered = np.sort(known, axis=2)
    zero = ~experts.any(axis=2) & ~missing[:, None]
    all_zero = zero.all(axis=1) & ~missing
    return RecordReport(
        layers=layers,
        rows=len(experts),
        missing=int(missing.sum()),
        out_of_range=_by_layer((known >= num_experts).any(axis=2)),
        duplicate=_by_layer((ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)),
        zero=_by_layer(zero),
        zero_tail_by_layer=np.array([_tail(column) for column in zero.T], dtype=np.int64),
        all_zero=int(all_zero.sum()),
        zero_tail=_tail(all_zero),
    )


def _by_layer(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = flags.sum(axis=0, dtype=np.int64)
    return counts


def _tail(flags: NDArray[np.bool_]) -> int:
    """How many flags at the end are set."""
    unset = np.flatnonzero(~flags)
    return len(flags) - (int(unset[-1]) + 1 if len(unset) else 0)
