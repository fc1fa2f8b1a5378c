"""A run's gap by groups of tokens: the steps' `gap_by` merged, each mean weighted by the tokens behind it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

COLUMNS = (
    "trained tokens", "mean |Δlogp| as trained", "own routing", "k3 KL as trained", "own routing",
    "tokens compared", "routed differently in any layer",
)  # fmt: skip
"""What `Group.cells` shows."""

_WEIGHTS = {
    "abs_delta_logp": "tokens",
    "abs_delta_logp_native": "tokens",
    "k3_kl": "tokens",
    "k3_kl_native": "tokens",
    "flipped_tokens": "compared",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One label's figures over a run; NaN where no token was measured.

    Attributes:
        kind: what the tokens are grouped by: role, turn, staleness or provenance.
        name: the label.
        tokens, compared: sums; `means` are the columns of `metrics.of_gap`'s groups, by name.
    """

    kind: str
    name: str
    tokens: int
    compared: int
    means: dict[str, float]

    def cells(self) -> list[str]:
        """The texts of a table's row, in the order of COLUMNS; empty where nothing was measured."""
        return [
            f"{self.tokens:,}",
            *(_number(self.means[name], ".4f") for name in ("abs_delta_logp", "abs_delta_logp_native")),
            *(_number(self.means[name], ".1e") for name in ("k3_kl", "k3_kl_native")),
            f"{self.compared:,}",
            _number(self.means["flipped_tokens"], ".2%"),
        ]


def over_run(rows: list[dict[str, Any]]) -> list[Group]:
    """The groups of all steps' rows of metrics.jsonl, in the order in which they first occur."""
    parts: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for kind, groups in (row.get("gap_by") or {}).items():
            for name, part in groups.items():
                parts[kind, name].append(part)
    order = {kind: place for place, kind in enumerate(dict.fromkeys(kind for kind, _ in parts))}
    return [
        Group(
            kind=kind,
            name=name,
            tokens=sum(part["tokens"] for part in found),
            compared=sum(part["compared"] for part in found),
            means={column: _mean(found, column, weight) for column, weight in _WEIGHTS.items()},
        )
        for (kind, name), found in sorted(parts.items(), key=lambda item: order[item[0][0]])
    ]


def _mean(parts: list[dict[str, Any]], column: str, weight: str) -> float:
    known = [(part[column], part[weight]) for part in parts if part[column] is not None and part[weight]]
    total = sum(count for _, count in known)
    return sum(value * count for value, count in known) / total if total else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
