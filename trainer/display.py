"""What a person watches while the run goes on: a live table on a terminal, one line a step elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pacenote.trainer.config import RunConfig
from pacenote.trainer.rundir import RunDir

ROWS = 12  # steps that stay on screen
COLUMNS = (
    ("step", "step", "d"),
    ("reward", "reward", ".3f"),
    ("|Δlogp|", "abs_delta_logp", ".4f"),
    ("native", "abs_delta_logp_native", ".4f"),
    ("k3 KL", "k3_kl", ".1e"),
    ("flipped", "flipped", ".2%"),
    ("missing", "rows_missing", "d"),
    ("entropy", "entropy", ".2f"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("seconds", "seconds", ".1f"),
)


class Display:
    """Shows each step's row; the last line says where to look."""

    def __init__(self, config: RunConfig, run: RunDir, console: Console | None = None) -> None:
        """Nothing is shown before the context is entered."""
        self.config, self.run = config, run
        self.console = console or Console(highlight=False)
        self.rows: list[dict[str, Any]] = []
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.progress.add_task(f"{config.recipe}, replay {config.replay}", total=config.steps)
        self.live = Live(self._picture(), console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Display:
        """Say what starts."""
        if self.console.is_terminal:
            self.live.start()
        else:
            config = self.config
            self._print(f"pacenote {config.recipe}: {config.steps} steps, replay {config.replay}, {self.run.root}")
            self._print("  ".join(f"{title:>9}" for title, _, _ in COLUMNS))
        return self

    def show(self, row: dict[str, Any]) -> None:
        """Show one step's metrics."""
        self.rows.append(row)
        self.progress.update(self.task, completed=row["step"] + 1)
        if self.console.is_terminal:
            self.live.update(self._picture())
        else:
            self._print("  ".join(f"{cell:>9}" for cell in cells(row)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        if self.console.is_terminal:
            self.live.update(self._picture())
            self.live.stop()

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for title, _, _ in COLUMNS:
            table.add_column(title, justify="right")
        for row in self.rows[-ROWS:]:
            table.add_row(*cells(row))
        return Group(table, self.progress)


def cells(row: dict[str, Any]) -> list[str]:
    """The row's numbers as text; "-" where there is none."""
    values = [(row.get(name), form) for _, name, form in COLUMNS]
    return ["-" if value is None or math.isnan(value) else format(value, form) for value, form in values]
