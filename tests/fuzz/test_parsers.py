"""The parsers, fuzzed for a moment; `make fuzz` goes on for longer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import mutate_json

ROOT = Path(__file__).parents[2]


atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris, which has no wheel everywhere")


def fuzz(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--model", str(model), "--out", str(out), *options]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    return subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False)


@atheris
def test_a_parser_that_raises_something_else_is_found_out(tiny_dir: Path, tmp_path: Path) -> None:
    result = fuzz(tiny_dir, tmp_path, "--fault", "--runs", "20000", "--seed", "1", "path")
    assert result.returncode == 1, result.stdout
    assert "KeyError" in result.stdout
    assert result.stdout.endswith("1 targets, 1 found out\n")
    [found] = tmp_path.iterdir()
    assert b"%" in found.read_bytes()


@atheris
@pytest.mark.timeout(8000)
def test_parsers_raise_what_they_document(tiny_dir: Path, tmp_path: Path, long: bool) -> None:
    result = fuzz(tiny_dir, tmp_path, *(["--seconds", "600"] if long else ["--runs", "2000", "--seed", "1"]))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == f"{len(lines) - 1} targets, 0 found out"
    assert len(lines) > 10
    assert long or all(": 2000 runs, sound" in line for line in lines[:-1])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=2), inner),
    ),
    st.integers(0, 2**32),
)
def test_json_stays_json(value: object, seed: int) -> None:
    raw = json.dumps(value).encode()
    changed = mutate_json(raw, random.Random(seed), lambda text: text[::-1])
    if changed is not None:
        json.loads(changed.decode(errors="surrogatepass"))  # which raises if it is none
    assert mutate_json(b"[", random.Random(seed), lambda text: text) is None


def test_most_changes_change_something() -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": "abc"}], "n": 1}).encode()
    made = {mutate_json(raw, random.Random(seed), lambda text: text[::-1]) for seed in range(200)}
    assert len(made - {raw, None}) > 100
