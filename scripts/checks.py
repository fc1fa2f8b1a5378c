"""The kernels' named checks, without pytest: CHECKS of every tests/kernels/*_checks.py, as functions of the device.

    PYTHONPATH=src:. python scripts/checks.py --seconds 60

For a python without pytest, and for compute-sanitizer, which pays for every launch. Exit status: 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "kernels"
BIG = ("far_rows",)
"""Checks that take gigabytes: left out when time is short."""


def checks() -> Iterator[tuple[str, Callable[[torch.device], None]]]:
    """Every check with its kernel's name before its own; the kernels take turns, so that none waits for the time."""
    kernels = []
    for path in sorted(FOLDER.glob("*_checks.py")):
        module, kernel = importlib.import_module(f"tests.kernels.{path.stem}"), path.stem.removesuffix("_checks")
        kernels.append([(f"{kernel}: {name}", check) for name, check in module.CHECKS.items()])
    yield from filter(None, chain.from_iterable(zip_longest(*kernels)))


def main() -> int:
    """Run them until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="begin no check after so long, and leave the big ones out")
    parser.add_argument("--only", default="", help="a part of the names")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = float("inf") if asked.seconds is None else time.monotonic() + asked.seconds
    wanted = [(name, check) for name, check in checks() if asked.only in name]
    if asked.seconds is not None:
        wanted = [(name, check) for name, check in wanted if not name.endswith(BIG)]
    ran, failed = 0, 0
    for name, check in wanted:
        start = time.monotonic()
        if start > end:
            break
        ran += 1
        try:
            check(device)
        except Exception:
            failed += 1
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - start:.2f} s", flush=True)
    print(f"{ran} of {len(wanted)} checks ran on {device}, {ran - failed} held")
    return int(failed > 0 or not wanted)


if __name__ == "__main__":
    sys.exit(main())
