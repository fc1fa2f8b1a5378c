"""The kernels on a GPU: tests, compute-sanitizer, races, benchmarks; a summary as JSON. Standard library only.

    PYTHON=/path/to/python make gpu OUT=somewhere

For a machine that may have no network: the python that runs this needs a CUDA (or ROCm) torch, and is used as it is.
What it has not got is said and left out: pytest (then the named checks run), hypothesis, compute-sanitizer, matplotlib.
Every stage has a limit, none is skipped because another failed, and all of them take less than ten minutes.

Exit status: 0 if all that could run held, 1 if something failed or a test ran out of time, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import sanitizer
from stage import ROOT, Outcome, Stage, environment, exit_status, follow, python, say

SECONDS = 570
NOT_ON_A_GPU = ("test_aot", "test_mutants", "test_interpreter")
PROBE = """
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"expected a python with a CUDA torch and triton, got {error}")
if not torch.cuda.is_available():
    sys.exit(f"expected a GPU, torch {torch.__version__} sees none")
print(torch.cuda.get_device_name(), "| torch", torch.__version__, "| triton", triton.__version__)
"""


def has(module: str) -> bool:
    """Whether this python can import a module."""
    return importlib.util.find_spec(module) is not None


def tests() -> list[Stage | Outcome]:
    """The kernels' tests, and by themselves those that need a GPU: graphs, no waiting, sizes beyond 2^31."""
    if not has("pytest"):
        absent = Outcome(name="graphs", status="absent", why="pytest is not installed: no graph test runs")
        return [Stage(name="tests", command=lambda seconds: python("scripts/checks.py"), most=240, least=60), absent]
    folder = ROOT / "tests" / "kernels"
    skipped = {path.name for path in folder.glob("test_*.py") if path.name.startswith(NOT_ON_A_GPU)}
    if not has("hypothesis"):
        missing = {path.name for path in folder.glob("test_*.py") if "hypothesis import" in path.read_text("utf-8")}
        say(f"no hypothesis in this python: left out {', '.join(sorted(missing))}")
        skipped |= missing
    ignored = [f"--ignore=tests/kernels/{name}" for name in sorted(skipped)]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", *ignored]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if has("xdist") else []  # most of their time is compiling
    return [
        Stage(name="tests", command=lambda _: python(*words, "-m", "not gpu", *workers), most=240, least=60),
        Stage(name="graphs", command=lambda _: python(*words, "-m", "gpu"), most=60, least=20, judge=some_passed),
    ]


def some_passed(status: int, lines: Sequence[str]) -> str:
    """Tests were not skipped, all of them."""
    return exit_status(status, lines) or ("" if re.search(r"\b\d+ passed", "\n".join(lines[-3:])) else "no test ran")


def races() -> Stage:
    """Launches of a real size, repeated."""
    return Stage(
        name="races",
        command=lambda seconds: python("-m", "benchmarks.races", "--seconds", f"{seconds:.0f}"),
        most=60,
        least=30,
    )


def benchmark(name: str, out: Path, least: float) -> Stage:
    """A benchmark, which writes its rows as they come."""
    return Stage(
        name=name,
        command=lambda seconds: python("-m", f"benchmarks.{name}", "--out", str(out), "--seconds", f"{seconds:.0f}"),
        most=SECONDS,
        least=least,
        grace=25,  # a case that compiles takes so long
        may_stop=True,
    )


def stages(out: Path) -> list[Stage | Outcome]:
    """All of them, in order; an Outcome is one that cannot run here."""
    least = {"route": 75, "permute": 30, "pack": 50, "logprob": 90, "policy": 40, "step": 60}
    rows = [benchmark(name, out, seconds) for name, seconds in least.items()]
    return [*tests(), races(), *sanitizer.stages(), *rows]


def main(words: Sequence[str] | None = None) -> int:
    """Probe, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="names of stages; default: all")
    asked = parser.parse_args(words)
    out = asked.out.resolve()
    probe = subprocess.run(python("-c", PROBE), env=environment(), capture_output=True, text=True, check=False)
    if probe.returncode:
        say(f"{(probe.stderr.strip() or 'the probe of torch failed').splitlines()[-1]}; nothing was run")
        return 2
    machine, date = probe.stdout.strip(), datetime.now(UTC).isoformat(timespec="seconds")
    say(machine)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.partition(" | ")[0].lower()).strip("-")
    path = out / f"gpu-{slug}-{date[:10]}.json"

    def report(outcomes: list[Outcome]) -> None:
        """What is known after each stage: nothing is lost if the machine goes away."""
        out.mkdir(parents=True, exist_ok=True)
        summary = {"machine": machine, "date": date, "stages": [asdict(outcome) for outcome in outcomes]}
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    plan = [stage for stage in stages(out) if not asked.only or stage.name in asked.only]
    outcomes = follow(plan, SECONDS, report)
    for outcome in outcomes:
        say(f"{outcome.name:<14} {outcome.status:<8} {outcome.seconds:>5.0f} s  {outcome.why}")
    say(f"written: {path}")
    return int(any(outcome.fatal for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
