"""The parsers, fuzzed for a moment; `make fuzz` goes on for longer."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.mutate import mutate_json

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris, which has no wheel everywhere")
def test_parsers_raise_what_they_document(tiny_dir: Path, tmp_path: Path, long: bool) -> None:
    much = ["--seconds", "600"] if long else ["--runs", "2000", "--seed", "1"]
    command = [sys.executable, "-m", "tests.fuzz", "--model", str(tiny_dir), "--out", str(tmp_path), *much]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    result = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == f"{len(lines) - 1} targets, 0 found out"
    assert len(lines) > 10
    assert long or all(": 2000 runs, sound" in line for line in lines[:-1])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=2), inner),
    ),
    st.integers(0, 2**32),
)
def test_json_stays_json(value: object, seed: int) -> None:
    import json

    raw = json.dumps(value).encode()
    changed = mutate_json(raw, random.Random(seed), lambda text: text[::-1])
    assert changed is None or json.loads(changed.decode(errors="surrogatepass")) is not value
    assert mutate_json(b"[", random.Random(seed), lambda text: text) is None
