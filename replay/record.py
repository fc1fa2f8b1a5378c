"""RoutingRecord: which experts each input token of a sequence went through, and where that is known from.

Legend: R rows, L MoE layers, K experts a token, E experts a layer. A sequence of N tokens has N-1 rows: row i is the
routing of token i as an input, and the last token was never one. Dense layers have no column.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacenote.kernels.spec import CACHED, DECODE, MISSING, PREFILL, RECOMPUTED
from pacenote.replay.errors import RecordError
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.validation import RecordReport, examine

__all__ = [
    "CACHED",
    "DECODE",
    "MISSING",
    "PREFILL",
    "RECOMPUTED",
    "RecordReport",
    "RoutingRecord",
    "expert_dtype",
    "runs",
]

_PROVENANCE = (MISSING, PREFILL, DECODE, CACHED, RECOMPUTED)


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The dtype that stores expert ids: uint8 for at most 256 experts, else uint16. Never decided by the data.

    Raises:
        RecordError: `num_experts` is not in 1..65536.
    """
    if not 1 <= num_experts <= 65536:
        raise RecordError(f"expected between 1 and 65536 experts, got {num_experts}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingRecord:
    """Routing of the R input tokens of one sequence. The arrays are read-only views of what was passed.

    Attributes:
        experts: [R, L, K] uint8 if num_experts <= 256, else uint16. Content of a MISSING row means nothing.
        provenance: [R] uint8, one of MISSING, PREFILL, DECODE, CACHED, RECOMPUTED.
        version: [R] int32, the weight version that routed the row; -1 if unknown.
        layers: global ids of the L MoE layers, ascending.
        num_experts: E.

    Raises:
        RecordError: shapes, dtypes, layers or provenance codes do not fit together.
    """

    experts: NDArray[Any]
    provenance: NDArray[np.uint8]
    version: NDArray[np.int32]
    layers: tuple[int, ...]
    num_experts: int

    def __post_init__(self) -> None:
        layers = tuple(int(layer) for layer in self.layers)
        if list(layers) != sorted(set(layers)) or (layers and layers[0] < 0):
            raise RecordError(f"expected ascending global layer ids, got {layers}")
        object.__setattr__(self, "layers", layers)
        experts = _frozen(self.experts, expert_dtype(self.num_experts), "experts")
        if experts.ndim != 3 or experts.shape[1] != len(layers):
            raise RecordError(f"expected experts of shape [rows, {len(layers)} layers, K], got {list(experts.shape)}")
        if experts.shape[2] > self.num_experts:
            raise RecordError(f"expected at most {self.num_experts} experts a token, got {experts.shape[2]}")
        rows = len(experts)
        provenance = _frozen(self.provenance, np.dtype(np.uint8), "provenance")
        version = _frozen(self.version, np.dtype(np.int32), "version")
        if provenance.shape != (rows,) or version.shape != (rows,):
            raise RecordError(
                f"expected provenance and version of shape [{rows}], one each row of experts, "
                f"got {list(provenance.shape)} and {list(version.shape)}"
            )
        if rows and int(provenance.max()) not in _PROVENANCE:
            raise RecordError(f"expected provenance codes {_PROVENANCE}, got {int(provenance.max())}")
        for name, array in (("experts", experts), ("provenance", provenance), ("version", version)):
            object.__setattr__(self, name, array)

    @classmethod
    def empty(cls, geometry: RoutingGeometry, rows: int = 0) -> RoutingRecord:
        """A record of `rows` MISSING rows (experts 0, version -1) for a model of this geometry."""
        return cls(
            experts=np.zeros((rows, len(geometry.layers), geometry.top_k), dtype=expert_dtype(geometry.num_experts)),
            provenance=np.full(rows, MISSING, dtype=np.uint8),
            version=np.full(rows, -1, dtype=np.int32),
            layers=geometry.layers,
            num_experts=geometry.num_experts,
        )

    @classmethod
    def of(
        cls,
        experts: ArrayLike,
        geometry: RoutingGeometry,
        *,
        provenance: int | NDArray[Any],
        version: int | NDArray[Any],
    ) -> RoutingRecord:
        """A record from expert ids [R, L, K] of any integer dtype, checked against the geometry, then narrowed.

        Args:
            experts: ids, each in 0..E-1.
            provenance: one code for all rows, or [R].
            version: one weight version for all rows, or [R].

        Raises:
            RecordError: wrong shape, or an id out of range (checked before narrowing, so nothing wraps).
        """
        ids = np.asarray(experts)
        shape = (len(geometry.layers), geometry.top_k)
        if ids.ndim != 3 or ids.shape[1:] != shape or ids.dtype.kind not in "iu":
            raise RecordError(
                f"expected integer experts of shape [rows, {shape[0]} layers, {shape[1]}], "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if ids.size and not (ids.min() >= 0 and ids.max() < geometry.num_experts):
            bad = (ids < 0) | (ids >= geometry.num_experts)
            row, layer, slot = (int(i) for i in np.argwhere(bad)[0])
            raise RecordError(
                f"expected expert ids in 0..{geometry.num_experts - 1}, got {int(ids[row, layer, slot])} "
                f"at row {row}, layer {geometry.layers[layer]} ({int(bad.sum())} such ids)"
            )
        return cls(
            experts=ids.astype(expert_dtype(geometry.num_experts)),
            provenance=_filled(provenance, len(ids), np.dtype(np.uint8), "provenance"),
            version=_filled(version, len(ids), np.dtype(np.int32), "version"),
            layers=geometry.layers,
            num_experts=geometry.num_experts,
        )

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return len(self.experts)

    @property
    def top_k(self) -> int:
        """K, experts a token."""
        return int(self.experts.shape[2])

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.experts)

    def __eq__(self, other: object) -> bool:
        """Equal layers, expert count, dtype and arrays; rows that are MISSING compare without their content."""
        if not isinstance(other, RoutingRecord):
            return NotImplemented
        return (
            self.layers == other.layers
            and self.num_experts == other.num_experts
            and self.experts.shape == other.experts.shape
            and np.array_equal(self.provenance, other.provenance)
            and np.array_equal(self.version, other.version)
            and np.array_equal(self.experts[self.provenance != MISSING], other.experts[other.provenance != MISSING])
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    def slice(self, start: int, stop: int) -> RoutingRecord:
        """Rows start..stop-1, without a copy.

        Raises:
            RecordError: not 0 <= start <= stop <= R. Negative and over-long bounds are refused, not clamped.
        """
        if not 0 <= start <= stop <= self.rows:
            raise RecordError(f"expected 0 <= start <= stop <= {self.rows} rows, got {start}..{stop}")
        return self._with(self.experts[start:stop], self.provenance[start:stop], self.version[start:stop])

    def truncate(self, rows: int) -> RoutingRecord:
        """The first `rows` rows; the record itself if it has no more than that.

        Raises:
            RecordError: `rows` is negative.
        """
        if rows < 0:
            raise RecordError(f"expected rows >= 0 to truncate to, got {rows}")
        return self if rows >= self.rows else self.slice(0, rows)

    def append(self, other: RoutingRecord, *, start: int | None = None, prove: int = 0) -> RoutingRecord:
        """This record followed by `other`, whose first row is row `start` of the sequence (default: R).

        Where the two overlap, a row that only one side has is taken from that side; a row that both have under the
        same weight version must agree; under different versions the row held here stays.

        Args:
            other: the new rows.
            start: the row of the sequence that is their first.
            prove: rows that must have been compared, so that both are shown to be of one prefix.

        Raises:
            RecordError: other layers, K or E; a gap (start > R); rows that contradict each other; fewer than `prove`
                rows that both sides know under one version.
        """
        self._same_shape(other)
        start = self.rows if start is None else start
        overlap = self.rows - start
        if start < 0 or overlap < 0:
            raise RecordError(f"expected rows that start within 0..{self.rows}, got start {start}: rows are missing")
        if not overlap and not prove:
            return RoutingRecord.concatenate([self, other])
        overlap = min(overlap, other.rows)
        mine, theirs = self.slice(start, start + overlap), other.slice(0, overlap)
        known = (mine.provenance != MISSING) & (theirs.provenance != MISSING) & (mine.version == theirs.version)
        if known.sum() < prove:
            raise RecordError(
                f"expected at least {prove} rows that both records know under one weight version, got "
                f"{int(known.sum())} in {overlap} overlapping rows: ask the engine from an earlier "
                "routed_experts_start_len"
            )
        clash = known & (mine.experts != theirs.experts).any(axis=(1, 2))
        if clash.any():
            raise RecordError(
                f"expected the rows that both records hold to be equal, row {start + int(np.argmax(clash))} differs "
                f"({int(clash.sum())} of {overlap} do): the new rows belong to another prefix"
            )
        fill = mine.provenance == MISSING
        merged = self._with(
            np.where(fill[:, None, None], theirs.experts, mine.experts),
            np.where(fill, theirs.provenance, mine.provenance),
            np.where(fill, theirs.version, mine.version),
        )
        tail = self.slice(start + overlap, self.rows)
        return RoutingRecord.concatenate([self.slice(0, start), merged, tail, other.slice(overlap, other.rows)])

    @staticmethod
    def concatenate(records: Sequence[RoutingRecord]) -> RoutingRecord:
        """The records one after the other.

        Raises:
            RecordError: no records, or records of different layers, K or E.
        """
        if not records:
            raise RecordError("expected at least one record to concatenate, got none: use RoutingRecord.empty")
        first = records[0]
        for other in records[1:]:
            first._same_shape(other)
        return first._with(
            np.concatenate([record.experts for record in records]),
            np.concatenate([record.provenance for record in records]),
            np.concatenate([record.version for record in records]),
        )

    def validate(self) -> RecordReport:
        """Count what is suspicious in the rows that are not MISSING. Never raises; a report is not a verdict."""
        return examine(self.experts, self.provenance, layers=self.layers, num_experts=self.num_experts)

    def version_spans(self) -> tuple[tuple[int, int, int], ...]:
        """Runs (weight version, start, stop) of rows of one version; they cover 0..R in order."""
        return runs(self.version)

    def _with(self, experts: NDArray[Any], provenance: NDArray[Any], version: NDArray[Any]) -> RoutingRecord:
        return RoutingRecord(
            experts=experts,
            provenance=provenance,
            version=version,
            layers=self.layers,
            num_experts=self.num_experts,
        )

    def _same_shape(self, other: RoutingRecord) -> None:
        mine = (self.layers, self.top_k, self.num_experts)
        theirs = (other.layers, other.top_k, other.num_experts)
        if mine != theirs:
            raise RecordError(f"expected records of one model (layers, K, E) = {mine}, got {theirs}")


def runs(values: NDArray[Any]) -> tuple[tuple[int, int, int], ...]:
    """Runs (value, start, stop) of equal values of an integer array [R]; they cover 0..R in order."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)] if len(values) else [0]
    return tuple((int(values[start]), start, stop) for start, stop in itertools.pairwise(edges))


def _frozen(array: ArrayLike, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """A read-only view; the caller's own array stays writable."""
    view = np.asarray(array).view()
    if view.dtype != dtype:
        raise RecordError(f"expected {name} as {dtype}, got {view.dtype}")
    view.flags.writeable = False
    return view


def _filled(value: int | NDArray[Any], rows: int, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    given = np.asarray(value)
    info = np.iinfo(dtype)
    if given.dtype.kind not in "iu" or given.shape not in ((), (rows,)):
        raise RecordError(f"expected {name} as one integer or [{rows}] integers, got {given.dtype} {list(given.shape)}")
    if given.size and not (info.min <= int(given.min()) and int(given.max()) <= info.max):
        raise RecordError(f"expected {name} within {dtype}, got {int(given.min())}..{int(given.max())}")
    return np.broadcast_to(given, (rows,)).astype(dtype)
