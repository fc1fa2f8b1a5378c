"""The report's plots, as SVG text; matplotlib draws them without a display."""

from __future__ import annotations

import io
import math
import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREY = "#2563a8", "#d9642c", "#8a8f98"
PHASES = {
    "sync": "#7c5ca8", "rollout": BLUE, "eval": "#4f9d69", "pack": "#c8ccd2", "measure": GREY, "update": ORANGE,
}  # fmt: skip
"""Parts of a step that follow each other, and their colours."""
Rows = list[dict[str, Any]]


def _draw(title: str, paint: Any) -> str:
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    paint(axes)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        corner = (1.0, 0.99)  # above the axes, so that no line runs behind it
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=corner, ncols=6, handlelength=1.2)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text[text.index("<svg") :], count=1)


def _series(rows: Rows, name: str) -> list[float]:
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _line(axes: Axes, rows: Rows, name: str, label: str | None, color: str) -> None:
    known = [row for row in rows if row.get(name) is not None]  # some are not measured at every step
    marker = "o" if len(known) < len(rows) else None
    steps, values = [row["step"] for row in known], _series(known, name)
    axes.plot(steps, values, label=label, color=color, linewidth=1.6, marker=marker, markersize=3)


def reward(rows: Rows) -> str:
    """Mean reward with one standard deviation over the step's episodes."""

    def paint(axes: Axes) -> None:
        steps, mean, std = [r["step"] for r in rows], _series(rows, "reward"), _series(rows, "reward_std")
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± one standard deviation")
        _line(axes, rows, "reward", "mean", BLUE)
        if any(row.get("eval_reward") is not None for row in rows):
            _line(axes, rows, "eval_reward", "held-out prompts", ORANGE)

    return _draw("Reward", paint)


def _pair(rows: Rows, trained: str, native: str, title: str) -> str:
    def paint(axes: Axes) -> None:
        _line(axes, rows, native, "trainer's own routing", ORANGE)
        _line(axes, rows, trained, "as trained", BLUE)
        if any(value > 0 for value in _series(rows, native)):
            axes.set_yscale("log")

    return _draw(title, paint)


def delta_logp(rows: Rows) -> str:
    """Mean |Δlogp| between engine and trainer, as trained and with the trainer's own routing."""
    return _pair(rows, "abs_delta_logp", "abs_delta_logp_native", "Mismatch: mean |Δlogp|")


def k3(rows: Rows) -> str:
    """k3 KL, as trained and with the trainer's own routing."""
    return _pair(rows, "k3_kl", "k3_kl_native", "Mismatch: k3 KL")


def flips(rows: Rows, layers: list[int]) -> str:
    """Share of tokens routed differently, a line a layer."""

    def paint(axes: Axes) -> None:
        have = [row for row in rows if row.get("flipped_by_layer")]
        for place, layer in enumerate(layers):
            shade = 0.25 + 0.75 * (place + 1) / max(1, len(layers))
            values = [row["flipped_by_layer"][place] for row in have]
            named = len(layers) <= 8 or place in (0, len(layers) - 1)  # more names than the legend has room for
            label = str(layer) if named else None
            axes.plot([r["step"] for r in have], values, color=BLUE, alpha=shade, linewidth=1.4, label=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)

    return _draw("Tokens routed differently, by layer", paint)


def by_group(rows: Rows, kind: str, column: str, title: str) -> str:
    """A column of `gap_by`, a line for each group of a kind; a log axis, unless it is a share."""
    share = column == "flipped_tokens"

    def paint(axes: Axes) -> None:
        heights: list[float] = []
        groups = {name: None for row in rows for name in (row.get("gap_by") or {}).get(kind, {})}
        for place, name in enumerate(groups):
            points = [(row["step"], ((row.get("gap_by") or {}).get(kind) or {}).get(name) or {}) for row in rows]
            drawn = [(step, part[column]) for step, part in points if part.get(column) is not None]
            if drawn:
                color = (BLUE, ORANGE, GREY, "#3b8f5a", "#8b5fbf")[place % 5]
                steps, values = zip(*drawn, strict=True)
                axes.plot(steps, values, label=name, color=color, linewidth=1.4)
                heights.extend(values)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=0)
        elif any(value > 0 for value in heights):
            axes.set_yscale("log")

    return _draw(title, paint)


def lengths(rows: Rows) -> str:
    """Trained tokens an episode."""

    def paint(axes: Axes) -> None:
        _line(axes, rows, "length_max", "longest", GREY)
        _line(axes, rows, "length_mean", "mean", BLUE)
        axes.set_ylim(0, 1.15 * max([1, *(row["length_max"] for row in rows)]))

    return _draw("Generated tokens an episode", paint)


def seconds(rows: Rows) -> str:
    """Where a step's time goes."""

    def paint(axes: Axes) -> None:
        steps = [row["step"] for row in rows]
        names = [name for name in PHASES if any(f"seconds_{name}" in row for row in rows)]
        parts = [[row.get(f"seconds_{name}", 0.0) for row in rows] for name in names]
        axes.stackplot(steps, *parts, labels=names, colors=[PHASES[name] for name in names], alpha=0.8)

    return _draw("Seconds a step", paint)
