"""What a run's numbers say, in sentences: only what was measured, and a warning where a number means trouble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pacenote.trainer.rollouts import REFUSALS

EDGE = 5  # steps averaged at each end of the run, at most
RECENT = 10  # steps without a single flip that count as collapsed routing


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence and whether it is good to know or a warning."""

    kind: Literal["measured", "warning"]
    text: str


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Mean of a column over the rows that have it; NaN if none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else math.nan


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that were measured under the trainer's own routing, too."""
    return [row for row in rows if row.get("abs_delta_logp_native") is not None]


def ends(rows: list[dict[str, Any]], name: str) -> tuple[float, float, int]:
    """Means of a column over the first and over the last steps of a run, which do not overlap, and their number."""
    edge = min(EDGE, max(1, len(rows) // 2))
    return mean(rows[:edge], name), mean(rows[-edge:], name), edge


def total(rows: list[dict[str, Any]], name: str) -> int:
    """Sum of a counting column."""
    return int(sum(row.get(name) or 0 for row in rows))


def collapsed(rows: list[dict[str, Any]]) -> bool:
    """True if the engine and the trainer chose the same experts for every token of the last RECENT steps.

    Between two number formats some flips are expected; none at all means that the routers no longer depend on the
    token, or that both sides run the same arithmetic. Either way the comparison with and without replay says nothing.
    """
    recent = [row["flipped"] for row in rows[-RECENT:] if row.get("flipped") is not None]
    return bool(recent) and max(recent) == 0.0


def findings(rows: list[dict[str, Any]], replay: str, *, exact: bool = False) -> list[Finding]:
    """Sentences about a run.

    Args:
        rows: the rows of metrics.jsonl.
        replay: the run's replay mode.
        exact: engine and trainer were to agree to the last bit.
    """
    if not rows:
        return [Finding("warning", "No step was finished.")]
    found = [_reward(rows)]
    if exact:
        return [*found, _exact(rows), *_warnings(rows, replay, exact=True)]
    if replay != "off":
        found.append(_gap(rows, replay))
    else:
        found.append(
            Finding(
                "measured",
                f"Replay was off: mean |Δlogp| between engine and trainer was {mean(rows, 'abs_delta_logp'):.4f}.",
            )
        )
    flipped = mean(rows, "flipped")
    if not math.isnan(flipped):
        found.append(
            Finding("measured", f"{flipped:.2%} of (token, layer) pairs were routed differently by the trainer.")
        )
    found.extend(_warnings(rows, replay))
    return found


def _reward(rows: list[dict[str, Any]]) -> Finding:
    first, last, edge = ends(rows, "reward")
    if math.isnan(mean(rows, "reward")):
        return Finding("warning", f"Nothing countable was earned in {len(rows)} steps, so nothing was learnt.")
    return Finding(
        "measured",
        f"Mean reward went from {first:.3f} (first {edge} steps) to {last:.3f} (last {edge}), over {len(rows)} steps.",
    )


def _gap(rows: list[dict[str, Any]], replay: str) -> Finding:
    both = compared(rows)
    trained, native = mean(both or rows, "abs_delta_logp"), mean(both, "abs_delta_logp_native")
    k3, k3_native = mean(both or rows, "k3_kl"), mean(both, "k3_kl_native")
    if replay == "trainer":
        return Finding(
            "measured",
            "The trainer replayed its own routes, which keeps its updates consistent but does not close the gap to the"
            f" engine: mean |Δlogp| {trained:.4f}, k3 KL {k3:.1e}.",
        )
    if math.isnan(trained):
        return Finding(
            "measured", "No token was trained on, so nothing is known of the gap between engine and trainer."
        )
    if not both:
        return Finding(
            "measured",
            f"Mean |Δlogp| between engine and trainer was {trained:.4f} with replay, k3 KL {k3:.1e}; the trainer's own"
            " routing was not measured (--gap-every 0).",
        )
    return Finding(
        "measured",
        f"On the same tokens, mean |Δlogp| between engine and trainer was {native:.4f} with the trainer's own routing"
        f" and {trained:.4f} with replay ({_percent(trained, native)}); k3 KL {k3_native:.1e} and {k3:.1e}"
        f" ({_percent(k3, k3_native)}).",
    )


def _exact(rows: list[dict[str, Any]]) -> Finding:
    """Whether engine and trainer agreed, with the trainer's own routing too."""
    measured = [row for row in rows if row.get("tokens_trained")]
    apart = max((_worst(row, "max_delta_logp", "max_delta_logp_native") for row in measured), default=math.nan)
    flipped = max((_worst(row, "flipped") for row in measured), default=math.nan)
    if apart == flipped == 0.0:
        return Finding(
            "measured",
            f"Engine and trainer agreed to the last bit on all {total(rows, 'tokens_trained')} trained tokens, with"
            " replay and without it, and the trainer chose the same experts for every token.",
        )
    return Finding(
        "warning",
        f"The run was to be exact, but logprobs of engine and trainer differ by up to {apart:.2g} and {flipped:.2%} of"
        " (token, layer) pairs were routed differently: they do not share weights, number format, threads or machine.",
    )


def _worst(row: dict[str, Any], *names: str) -> float:
    """The largest of columns; infinite where one is null, which is what a number that was not finite became."""
    return max(math.inf if row.get(name) is None else row[name] for name in names)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "no gap to compare"


def _warnings(rows: list[dict[str, Any]], replay: str, *, exact: bool = False) -> list[Finding]:
    out = []
    if not exact and collapsed(rows):
        out.append(
            f"Routing has collapsed: no token changed an expert in the last {min(RECENT, len(rows))} steps,"
            " so the figures with and without replay compare equal things."
        )
    both = compared(rows)
    if replay == "rollout" and not exact and mean(both, "abs_delta_logp") >= mean(both, "abs_delta_logp_native"):
        out.append("Replay did not bring engine and trainer closer: check that routes and tokens are aligned.")
    if missing := total(rows, "rows_missing"):
        out.append(f"{missing} tokens had no row to replay and were routed freely.")
    if invalid := total(rows, "rows_invalid"):
        out.append(f"{invalid} rows (once a layer) had duplicate or out-of-range experts and were routed freely.")
    if skipped := total(rows, "skipped_not_finite") + total(rows, "skipped_spike"):
        out.append(
            f"{skipped} optimizer steps were skipped, since their loss or gradient was not finite or far too large."
        )
    if refused := {name: n for name in REFUSALS if (n := total(rows, f"groups_refused_{name}"))}:
        reasons = ", ".join(f"{n} {name}" for name, n in refused.items())
        out.append(f"{sum(refused.values())} groups were refused and others played in their place: {reasons}.")
    if failed := total(rows, "episodes_failed"):
        out.append(f"{failed} episodes failed in transport and were not trained on.")
    if unrewarded := total(rows, "episodes_unrewarded") - total(rows, "episodes_failed"):
        out.append(f"{unrewarded} episodes earned nothing countable and were not trained on.")
    return [Finding("warning", text) for text in out]
