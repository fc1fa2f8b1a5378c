"""Broken kernels, each with the check that must catch it. Run from the repository's root:

    TRITON_INTERPRET=1 python -m tests.kernels.mutants route

Prints a JSON line a mutant: its name, the check, and what the check said.

A mutant is the source of a kernel with a text replaced. `mutants_NAME.py` lists those of a kernel:

- MODULES: its source modules in import order; the op looks up the last one in `pacenote.kernels` at every call.
- CHECKS: the kernel's checks by name, functions of a device.
- MUTANTS: what is replaced, and the check that fails with it.
- INTERPRETED: False where there is no kernel to interpret, but what calls some; TRITON_INTERPRET is 0 then.

The first line of each kernel is the kernel as it is, under all the checks that its mutants name.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import pacenote.kernels
from pacenote.kernels import launch
from tests.kernels import interpreter

KERNELS = tuple(sorted(path.stem.removeprefix("mutants_") for path in Path(__file__).parent.glob("mutants_*.py")))
"""Names of the kernels that have mutants."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One replacement in the kernel's source, or two, and the check that fails with it."""

    name: str
    text: str
    instead: str
    check: str
    also: tuple[str, str] | None = None


def sources(modules: Sequence[ModuleType], mutant: Mutant) -> list[str]:
    """The modules' sources, changed.

    Raises:
        AssertionError: none of them has the text.
    """
    texts = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in modules]
    for text, instead in filter(None, ((mutant.text, mutant.instead), mutant.also)):
        assert any(text in source for source in texts), f"{mutant.name}: the kernel has no {text!r}"
        texts = [source.replace(text, instead) for source in texts]
    return texts


def put(module: ModuleType) -> None:
    """Make a module the one that everybody imports by its name, from modules above it and from the package."""
    sys.modules[module.__name__] = module
    setattr(pacenote.kernels, module.__name__.rpartition(".")[2], module)


@contextmanager
def broken(modules: Sequence[ModuleType], mutant: Mutant) -> Iterator[None]:
    """For the length of a `with`, a kernel is its mutant."""
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
        try:
            for module, source in zip(modules, sources(modules, mutant), strict=True):
                path = Path(folder) / Path(module.__file__ or "").name
                path.write_text(source, encoding="utf-8")
                spec = importlib.util.spec_from_file_location(module.__name__, path)
                assert spec is not None
                assert spec.loader is not None
                changed = importlib.util.module_from_spec(spec)
                put(changed)
                spec.loader.exec_module(changed)
            yield
        finally:
            for module in modules:
                put(module)


def verdict(check: Callable[[torch.device], None]) -> str:
    """What a check says: an empty string, or its error."""
    try:
        check(torch.device("cpu"))
    except Exception as error:  # a mutant may fail in any way
        return f"{type(error).__name__}: {error}"[:200] or "failed"
    return ""


def trial(kernel: str, every: int = 1) -> Iterator[dict[str, str]]:
    """Try a kernel as it is, then its mutants: each; or every second, third and so on,
    and the kernel as it is under no check: the tests have them all."""
    found = importlib.import_module(f"tests.kernels.mutants_{kernel}")
    named = sorted({mutant.check for mutant in found.MUTANTS}) if every == 1 else []
    said = "; ".join(filter(None, (verdict(found.CHECKS[check]) for check in named)))
    yield {"kernel": kernel, "name": "", "check": "all", "said": said}
    for mutant in found.MUTANTS[::every]:
        with broken(found.MODULES, mutant):
            said = verdict(found.CHECKS[mutant.check])
        yield {"kernel": kernel, "name": mutant.name, "check": mutant.check, "said": said}


def main() -> None:
    """Try the kernels that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.mutants")
    parser.add_argument("kernels", nargs="*", help="all if none is named")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try only every N-th mutant")
    asked = parser.parse_args()
    if launch.INTERPRETED:
        interpreter.install()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    for kernel in asked.kernels or KERNELS:
        for row in trial(kernel, asked.every):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
