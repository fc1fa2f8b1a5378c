"""Rows of a benchmark as JSON, as CSV and as a plot, written by one hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.plot import draw

MACHINE = ("device", "driver", "torch", "triton", "commit", "sources", "date")
"""Facts of the machine that each row of the CSV repeats; the JSON has all of them once."""


class Table:
    """`<out>/<name>-<device>-<date>.json` and `.csv`, whole after every row, and `.png` at the end.

    Attributes:
        path: of the JSON.
        rows: one an implementation of a case.
        left_out: cases for which there was no time.
    """

    def __init__(self, name: str, facts: dict[str, Any], out: Path) -> None:
        device = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
        self.path = out / f"{name}-{device}-{facts['date'][:10]}.json"
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._name, self._facts = name, facts
        out.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row more."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write JSON and CSV; each appears whole or not at all."""
        head = {"benchmark": self._name, "machine": self._facts, "left_out": self.left_out}
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        _put(self.path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')
        facts = {name: self._facts.get(name) for name in MACHINE}
        columns = list(dict.fromkeys([*(name for row in self.rows for name in row), *MACHINE]))
        with _beside(self.path.with_suffix(".csv")).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**row, **facts} for row in self.rows)
        _beside(self.path.with_suffix(".csv")).replace(self.path.with_suffix(".csv"))

    def close(self) -> list[Path]:
        """Draw the plot; gives what was written."""
        self.write()
        drawn = draw(self.path)
        return [self.path, self.path.with_suffix(".csv"), *([drawn] if drawn else [])]


def _put(path: Path, text: str) -> None:
    _beside(path).write_text(text, encoding="utf-8")
    _beside(path).replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
