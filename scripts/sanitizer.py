"""compute-sanitizer over the kernels' named checks: where it is, how it is called, what its complaints mean."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from stage import Outcome, Stage, python

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OURS = "regex=^_[a-z]"
"""Kernels of ours: names of C++ are mangled and begin with _Z."""
COMPLAINED = 9
"""Exit status of a sanitizer that complains."""


def find() -> Path | None:
    """compute-sanitizer: on the path, in CUDA's folder, or in a wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / part for home in homes if home for part in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer")
    places = [Path(found)] if found else [folder / "compute-sanitizer" for folder in folders]
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            places += sorted(path for path in Path(root).rglob("compute-sanitizer") if path.is_file())
    return next((path for path in places if path.is_file() and os.access(path, os.X_OK)), None)


def command(tool: Path, check: str, *words: str) -> list[str]:
    """A command of this python under one of the tools."""
    options = f"--tool {check} --error-exitcode {COMPLAINED} --show-backtrace device"
    special = {"memcheck": "--report-api-errors no --padding 1024", "racecheck": "--racecheck-detect-level error"}
    if check != "initcheck":  # which has to see what torch writes, to know what is written
        options += f" --kernel-name {OURS}"
    return [str(tool), *options.split(), *special.get(check, "").split(), *python(*words)]


def blamed(lines: Sequence[str]) -> set[str]:
    """Kernels of ours that a sanitizer's complaints name: Triton's names are those of Python functions, unmangled."""
    said = (line for line in lines if line.startswith("=========") and "Host Frame" not in line)
    return {name for line in said for name in re.findall(r"(?<![\w:])_[a-z]\w*_kernel\b", line)}


def clean(status: int, lines: Sequence[str]) -> str:
    """No complaint, and every check that ran held."""
    return kept(status, lines) or ("complaints that name no kernel" if status == COMPLAINED else "")


def kept(status: int, lines: Sequence[str]) -> str:
    """No complaint about a kernel of ours, whatever there is about others, and every check that ran held."""
    if ours := sorted(blamed(lines)):
        return f"complaints about {', '.join(ours)}"
    ran = re.search(r"(\d+) of \d+ checks ran on \S+, (\d+) held", "\n".join(lines))
    if ran is None:
        return f"the checks did not end, exit status {status}"
    return "no check ran" if ran[1] == "0" else "checks failed" if ran[1] != ran[2] else ""


def caught(status: int, lines: Sequence[str]) -> str:
    """The planted fault is among the complaints."""
    return "" if "_planted_kernel" in blamed(lines) else "the planted fault was not seen: the others prove nothing"


def stages() -> list[Stage | Outcome]:
    """A planted fault, then each tool over the named checks, as many as there is time for."""
    tool = find()
    if tool is None:
        why = "no compute-sanitizer on the path, in CUDA's folder, or in a wheel"
        return [Outcome(name="sanitizer", status="absent", why=why)]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in one large block hide what is out of bounds
    planted = Stage(
        name="planted fault",
        command=lambda _: command(tool, "memcheck", "scripts/planted.py"),
        most=40,
        least=15,
        judge=caught,
        environment=uncached,
    )

    def stage(check: str) -> Stage:
        return Stage(
            name=check,
            command=lambda seconds: command(tool, check, "scripts/checks.py", "--seconds", f"{seconds:.0f}"),
            most=45 if check == "memcheck" else 35,
            least=20,
            judge=kept if check == "initcheck" else clean,
            may_stop=True,
            environment=uncached,
        )

    return [planted, *map(stage, TOOLS)]
