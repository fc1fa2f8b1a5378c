"""What a benchmark measures: some work at one shape, the least it can cost, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from benchmarks.machine import Ceilings

Inputs = TypeVar("Inputs")
OURS = "pacenote"
"""The implementation that is measured against the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least that has to be done: bytes moved in device memory, operations, bytes brought from the host."""

    bytes: int
    flop: int = 0
    upload: int = 0

    def seconds(self, rates: Ceilings) -> float:
        """How long that takes at best; each unit works beside the others."""
        return max(self.bytes / rates.bytes_per_s, self.flop / rates.flop_per_s, self.upload / rates.upload_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation(Generic[Inputs]):
    """Somebody who does the work.

    Attributes:
        bind: from inputs to the call that is timed; what it prepares before is not.
        note: what a reader of its row has to know.
        on_host: the work starts in host memory.
    """

    bind: Callable[[Inputs], Callable[[], Any]]
    note: str = ""
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """Why somebody who might do the work is not measured."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(Generic[Inputs]):
    """Work at one shape.

    Attributes:
        model: of `models.MODELS`.
        tokens: T.
        work: what is done.
        shape: what else a row says of the inputs.
        floor: of one call.
        make: inputs from a seed.
        check: raises AssertionError if inputs do not give such a result.
        implementations: by name, OURS first.
        errors: what a row says of a result's errors.
    """

    model: str
    tokens: int
    work: str
    shape: Mapping[str, int | str]
    floor: Floor
    make: Callable[[int], Inputs]
    check: Callable[[Inputs, Any], None]
    implementations: Mapping[str, Implementation[Inputs] | Absent]
    errors: Callable[[Inputs, Any], Mapping[str, float]] = lambda inputs, result: {}
