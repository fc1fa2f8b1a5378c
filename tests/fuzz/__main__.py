"""Coverage-guided fuzzing of the parsers (atheris, libFuzzer): `make fuzz ARGS="--seconds 60"`.

    python -m tests.fuzz [--seconds S | --runs N] [--seed N] [--model DIR] [TARGET...]

Each target runs in a process of its own, since libFuzzer ends the one that it runs in. An input that makes a parser
raise what it does not document is written to --out, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

from tests.fuzz.mutate import mutate_json

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

BUILD = """
import pathlib, sys
from pacenote.trainer.model import build_tiny
build_tiny(pathlib.Path(sys.argv[1]), seed=0)
"""
LONGEST = 1 << 14  # bytes of an input


def main() -> int:
    """Fuzz; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", help="all if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, help="for each target, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0, help="0 draws one")
    parser.add_argument("--model", type=Path, help="directory of the tiny model; built if left out")
    parser.add_argument("--out", type=Path, default=Path(), help="where inputs go that are found out")
    parser.add_argument("--fault", action="store_true", help="break a parser, to see that it is found out")
    options = parser.parse_args()
    folder, parent = Path(tempfile.mkdtemp()), os.getpid()
    try:
        found = {target.name: target for target in _loaded(options.model, folder)}
        if options.fault:
            found["path"] = replace(found["path"], start=lambda: _broken)
        if unknown := sorted(set(options.targets) - set(found)):
            parser.error(f"expected targets of {', '.join(found)}, got {', '.join(unknown)}")
        options.out.mkdir(parents=True, exist_ok=True)
        sound = [_fuzzed(found[name], folder / name, options) for name in options.targets or found]
    finally:
        if os.getpid() == parent:  # a child that found something out comes by here, too
            shutil.rmtree(folder)
    print(f"{len(sound)} targets, {sound.count(False)} found out")
    return int(not all(sound))


def _loaded(model: Path | None, folder: Path) -> list[Target]:
    """The targets, with what they reach of pacenote instrumented: it is imported here for the first time."""
    if model is None:
        model = folder / "model"
        subprocess.run([sys.executable, "-c", BUILD, str(model)], check=True, capture_output=True)
    with atheris.instrument_imports(include=["pacenote.rollout", "pacenote.replay"]):
        from tests.fuzz.targets import targets
    return targets(str(model))


def _fuzzed(target: Target, corpus: Path, options: argparse.Namespace) -> bool:
    """Run one target in a child; False if it found something out."""
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    limit = f"-max_total_time={options.seconds}" if options.runs is None else f"-runs={options.runs}"
    words = [
        target.name, str(corpus), limit, f"-seed={options.seed}", f"-max_len={LONGEST}", "-timeout=10", "-verbosity=0",
        "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={options.out}/{target.name}-",
    ]  # fmt: skip
    log = corpus.with_suffix(".log")
    sys.stdout.flush()
    child = os.fork()
    if not child:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        atheris.Setup(words, target.start(), custom_mutator=_mutator(target))
        atheris.Fuzz()  # which ends the process
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text(errors="replace")
    runs = re.search(r"number_of_executed_units: (\d+)", said)
    print(
        f"{target.name}: {runs[1] if runs else 'no'} runs, {'sound' if code == 0 else f'exit code {code}'}", flush=True
    )
    if code:
        print(said[-LONGEST:], flush=True)
    return code == 0


def _broken(path: bytes) -> None:
    """No seed has what it stumbles over."""
    if b"%" in path:
        raise KeyError(path)


def _mutator(target: Target) -> object:
    """Changes JSON as JSON most of the time, else bytes."""

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if target.json is None or rng.random() < 0.2:
            return bytes(atheris.Mutate(data, longest))
        start = target.json
        end = start + int.from_bytes(data[:start], "little") if start else len(data)
        changed = mutate_json(data[start:end], rng, lambda text: bytes(atheris.Mutate(text, 256)))
        if changed is None:
            return bytes(atheris.Mutate(data, longest))
        whole = (len(changed).to_bytes(start, "little") if start else b"") + changed + data[end:]
        return whole if len(whole) <= longest else bytes(atheris.Mutate(data, longest))

    return mutated


if __name__ == "__main__":
    sys.exit(main())
