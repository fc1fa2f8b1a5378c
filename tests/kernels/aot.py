"""Compile kernels ahead of time, without a GPU: the real launchers, on CPU tensors, under a driver that names a target.

Nothing is launched; signatures, specialisations and options are those of a run. In a process of its own, because Triton
decides once, when it is imported, whether it interprets. From the repository's root, with src on PYTHONPATH:

    python -m tests.kernels.aot sm_90 gfx942 --workload route    # one JSON line a compiled kernel; by default all of it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.kernels.aot_workloads import WORKLOADS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel takes: registers a thread, bytes of stack a thread, bytes of shared memory a block."""

    target: str
    arch: str
    workload: str
    kernel: str
    variant: str
    registers: int
    stack: int
    spills: int
    shared: int
    doubles: int
    seconds: float


class NamedTarget:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, name: str) -> None:
        self.target, self.device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> Any:
        """The target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Another number for each target: compiled kernels are kept by device."""
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        """No stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors of the workload are."""
        return torch.device("cpu")


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack, spills and float64 instructions, read from the binary or from AMD's metadata."""
    if "cubin" in kernel.asm:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        doubles = len(re.findall(r"\.f64\b", kernel.asm["ptx"]))
        return {"registers": usage["REG"], "stack": usage["STACK"], "spills": usage["LOCAL"], "doubles": doubles}
    text = kernel.asm["amdgcn"]
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, flags=re.MULTILINE)}
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
        "doubles": len(re.findall(r"_f64\b", text)),
    }


def compiled(name: str, workloads: Sequence[str]) -> Iterator[Compiled]:
    """Compile every variant of the workloads for a target."""
    triton.runtime.driver.set_active(NamedTarget(name))
    launch, caught = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        caught.append(launch(self, *args, **{**kwargs, "warmup": True}))

    with mock.patch.object(JITFunction, "run", compile_only):
        for workload, variant, call in ((w, variant, call) for w in workloads for variant, call in WORKLOADS[w]()):
            start = time.perf_counter()
            call()
            seconds = (time.perf_counter() - start) / len(caught)
            for kernel in caught:
                yield Compiled(
                    target=name,
                    arch=str(kernel.metadata.target.arch),
                    workload=workload,
                    kernel=kernel.metadata.name,
                    variant=variant,
                    shared=kernel.metadata.shared,
                    seconds=round(seconds, 2),
                    **resources(kernel),
                )
            caught.clear()


def main() -> None:
    """Compile what is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("aot: expected TRITON_INTERPRET unset: the interpreter compiles nothing")
    for target in options.targets or TARGETS:
        for row in compiled(target, options.workload):
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
