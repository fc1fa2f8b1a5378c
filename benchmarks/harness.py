"""The way of every benchmark: inputs, a check, timings, rows; and its command line.

A benchmark says which cases there are. Every implementation's result is checked before it is timed; one that fails is
a row that says so, as is one that is absent.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, timing
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.machine import Ceilings
from benchmarks.models import MODELS
from benchmarks.sensors import Reading, Sensors, columns
from benchmarks.table import Table

GPU_TOKENS, CPU_TOKENS = (8192, 32768, 131072), (64, 256)
GPU_REPEATS, CPU_REPEATS = 50, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where cases are measured, and whether torch.compile is among the implementations."""

    device: torch.device
    compiled: bool = False

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any] | Absent:
        """The function compiled for one shape, or why it is not."""
        if not self.compiled:
            return Absent("compiled on a GPU only, at one size: compiling takes longer than measuring")
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)


Cases = Callable[[str, int, Setting], Iterator[Case[Any]]]
"""From a model of MODELS and T to what is measured."""


class Bench:
    """Measures cases on a device.

    Attributes:
        device: the device.
        facts: what a file of rows says of the machine.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self._repeats, self._sensors = repeats, Sensors(device)
        self._rates = machine.ceilings(device)
        self.facts = machine.facts(device, self._sensors, self._rates)

    def rows(self, case: Case[Any]) -> Iterator[dict[str, Any]]:
        """One row an implementation: its timing, or why there is none under `absent` or `failed`."""
        inputs: list[Any] = []
        for name, implementation in case.implementations.items():
            row = {"model": case.model, "tokens": case.tokens, "work": case.work, "implementation": name, **case.shape}
            if isinstance(implementation, Absent):
                yield {**row, "absent": implementation.reason}
                continue
            try:
                inputs = inputs or [case.make(i) for i in range(timing.rotation(case.floor.bytes, self.device))]
                yield {**row, **self._measured(case, implementation, inputs)}
            except Exception as error:  # whatever it is, the others are measured
                traceback.print_exc()
                yield {**row, "failed": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}

    def _measured(self, case: Case[Any], implementation: Implementation[Any], inputs: Sequence[Any]) -> dict[str, Any]:
        """Check and time; the columns of the row."""
        calls = [implementation.bind(one) for one in inputs]
        verify = partial(case.check, inputs[0])
        verify(result := calls[0]())
        errors = case.errors(inputs[0], result)
        del result
        before, during = self._sensors.read(), list[Reading]()
        timed = timing.time_calls(
            calls,
            self.device,
            repeats=self._repeats,
            on_host=implementation.on_host,
            watch=partial(self._sensors.watch, during),
            verify=verify,
        )
        columns_of = against(case.floor, timed.median_us, self._rates)
        return {**asdict(timed), **columns_of, **errors, **columns(before, during), "note": implementation.note}


def against(floor: Floor, median_us: float, rates: Ceilings | None) -> dict[str, Any]:
    """How a time stands to the floor. Without rates, on a CPU, only what the floor counts."""
    counts = {f"floor_{name}": value for name, value in asdict(floor).items()}
    if rates is None:
        return counts
    best = floor.seconds(rates) * 1e6
    return {
        **counts,
        "floor_us": best,
        "over_floor": median_us / best,
        "gb_per_s": floor.bytes / median_us / 1e3,
        "tflop_per_s": floor.flop / median_us / 1e6,
    }


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    head = f"{row['model']:>14} T={row['tokens']:<7} {row['work']:<20} {row['implementation']:<15}"
    if "median_us" not in row:
        return f"{head} {'FAILED: ' + row['failed'] if 'failed' in row else row['absent']}"
    floor = f"  {row['over_floor']:.1f} x floor {row['floor_us']:.1f} us" if "floor_us" in row else ""
    return f"{head} {row['median_us']:>10.1f} us [{row['p10_us']:.1f}, {row['p90_us']:.1f}]{floor}"


def main(name: str, about: str, cases: Cases, words: Sequence[str] | None = None) -> int:
    """Measure and write, as the command line says; 1 if an implementation of ours failed.

    Args:
        name: of the benchmark.
        about: its first line.
        cases: what is measured.
        words: of the command line; None: this process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default: {GPU_TOKENS} on a GPU, else {CPU_TOKENS}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, help=f"default: {GPU_REPEATS} on a GPU, else {CPU_REPEATS}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    asked = parser.parse_args(words)
    began, device = time.monotonic(), machine.pick_device()
    on_gpu = device.type == "cuda"
    sizes = asked.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    bench = Bench(device, asked.repeats or (GPU_REPEATS if on_gpu else CPU_REPEATS))
    if "note" in bench.facts:
        print(f"No GPU here. {bench.facts['note']}.", flush=True)
    table = Table(name, bench.facts, asked.out)
    said = set()
    for tokens in sizes:  # every model at one size, then the next: a run that is cut short has all of them
        setting = Setting(device=device, compiled=on_gpu and not asked.no_compile and tokens == sizes[len(sizes) // 2])
        for model in asked.models:
            for case in cases(model, tokens, setting):
                if time.monotonic() - began > asked.seconds:
                    table.left_out.append(f"{case.model} T={case.tokens} {case.work}")
                    continue
                for row in bench.rows(case):
                    table.add(row)
                    if (why := (row["implementation"], row.get("absent"))) not in said or "absent" not in row:
                        print(line(row), flush=True)
                    said.add(why)
    if table.left_out:
        print(f"left out after {asked.seconds:.0f} s: {', '.join(table.left_out)}")
    print("written:", *table.close())
    return int(any("failed" in row and row["implementation"] == OURS for row in table.rows))
