"""Time over tokens from a benchmark's JSON: a column of panels a model, a row of panels a kind of work.

python -m benchmarks.plot benchmarks/results/route-DEVICE-DATE.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
MARKERS = "os^Dv<>P"


def draw(path: Path) -> Path | None:
    """Draw the rows of a JSON file as a PNG beside it; None, and a word about it, without matplotlib or timings."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if "median_us" in row]
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    if not rows:
        print("no plot: nothing was timed")
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models, works, names = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "work", "implementation")
    )
    size = (1.4 + 3.1 * len(models), 1.5 + 2.5 * len(works))
    figure, panels = plt.subplots(
        len(works), len(models), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for work, line in zip(works, panels, strict=True):
        for model, panel in zip(models, line, strict=True):
            here = [row for row in rows if (row["work"], row["model"]) == (work, model)]
            _panel(panel, here, names)
            if work == works[0]:
                panel.set_title(model)
            if work == works[-1]:
                panel.set_xlabel("tokens")
        line[0].set_ylabel(f"{work}\nmicroseconds")
    legends = [panel.get_legend_handles_labels() for panel in panels.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
    figure.suptitle(_title(data))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def _panel(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Each implementation as a line with its 10th and 90th percentile, the floor as a dashed one."""
    from matplotlib.ticker import LogLocator

    for i, name in enumerate(names):
        mine = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["tokens"])
        if mine:
            x, y = [row["tokens"] for row in mine], [row["median_us"] for row in mine]
            spread = [(row["median_us"] - row["p10_us"], row["p90_us"] - row["median_us"]) for row in mine]
            error = [[max(0.0, value) for value in side] for side in zip(*spread, strict=True)]  # but for rounding
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            panel.errorbar(x, y, error, label=name, markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2, **style)
    floor = sorted({(row["tokens"], row["floor_us"]) for row in rows if "floor_us" in row})
    if floor:
        panel.plot(*zip(*floor, strict=True), "k--", linewidth=1.2, label="floor")
    tokens = sorted({row["tokens"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(tokens, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in tokens])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))  # within one decade the usual one may mark nothing
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(True, which="major", linewidth=0.4, alpha=0.6)


def _title(data: dict[str, Any]) -> str:
    machine = data["machine"]
    note = f"\n{machine['note']}" if "note" in machine else ""
    return f"{data['benchmark']} on {machine['device']}, torch {machine['torch']}, {machine['date'][:10]}{note}"


def main() -> int:
    """Draw the files that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    drawn = [draw(path) for path in parser.parse_args().files]
    print("written:", *filter(None, drawn))
    return int(not all(drawn))


if __name__ == "__main__":
    sys.exit(main())
