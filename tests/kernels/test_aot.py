"""Every kernel variant compiles for real GPUs, without spills, within their shared memory, and without float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pacenote.kernels import launch

if not launch.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
if launch.INTERPRETED:
    pytest.skip("runs once, in the run without TRITON_INTERPRET", allow_module_level=True)

from tests.kernels.aot_workloads import WORKLOADS

pytestmark = pytest.mark.aot
ROOT = Path(__file__).resolve().parents[2]

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory a block may have: CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA, LDS."""
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
"""Registers a thread may have: same table; CDNA3 counts vector and accumulation registers."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What comes out of a workload: the kernels' names, and whether they may compute in float64."""

    kernels: frozenset[str]
    doubles: bool = False


EXPECTED = {
    "invariant": Expected(frozenset({"_product_kernel"})),
    "logprob": Expected(frozenset({"_split_kernel", "_stats_kernel", "_score_kernel", "_slope_kernel"})),
    "pack": Expected(frozenset({"_pack_kernel"})),
    "permute": Expected(frozenset({"_count_kernel", "_place_kernel"})),
    "policy": Expected(frozenset({"_samples_kernel", "_tokens_kernel", "_fold_kernel", "_gradient_kernel"})),
    "route": Expected(frozenset({"_forward_kernel", "_backward_kernel"})),
    "segment": Expected(frozenset({"_sum_kernel", "_spread_kernel"})),
}


def compiled(target: str, workload: str, cache: Path) -> list[dict[str, Any]]:
    """One row a kernel compiled for a target, in a process of its own with an empty cache."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does, without its warning
    command = [sys.executable, "-m", "tests.kernels.aot", target, "--workload", workload]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_fits(workload: str, target: str, tmp_path: Path) -> None:
    rows, expected = compiled(target, workload, tmp_path), EXPECTED[workload]
    assert {row["kernel"] for row in rows} == expected.kernels
    assert {row["kernel"] for row in rows if row["variant"].endswith("-T1")} == expected.kernels
    assert {row["variant"] for row in rows} == {variant for variant, _ in WORKLOADS[workload]()}
    for row in rows:
        assert row["workload"] == workload, row
        assert target.endswith(row["arch"]), row
        assert row["stack"] == row["spills"] == 0, row
        assert expected.doubles or row["doubles"] == 0, row
        assert 0 < row["registers"] <= REGISTERS[target], row
        assert row["shared"] <= SHARED[target], row
