"""Compile kernels ahead of time, without a GPU: the real launchers, on CPU tensors, under a driver that names a target.

Nothing is launched; signatures, specialisations and options are those of a run. In a process of its own, because Triton
decides once, when it is imported, whether it interprets:

    python tests/kernels/aot.py sm_90 gfx942     # one JSON line a compiled kernel; without names: every target
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pacenote.kernels import route_triton
from pacenote.kernels.spec import RouterSpec

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


def variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches whose constants and types cover each dtype and each flag of each kernel, and T = 1."""
    sigmoid = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=1.8)
    grouped = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=2.5, groups=8, topk_groups=4)
    uneven = RouterSpec(score="softmax", groups=3, topk_groups=2, group_score="topk_share")
    loud = RouterSpec(score="softmax", groups=4, topk_groups=1, group_score="max", score_dtype="logits")
    qwen = RouterSpec(score="softmax", renormalize=True, weight_dtype="logits")
    low = RouterSpec(score="softmax", score_dtype="logits", weight_dtype="logits")
    gpt = RouterSpec(score="softmax_topk", score_dtype="logits", weight_dtype="logits")
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    u8, u16, i32, i64 = torch.uint8, torch.uint16, torch.int32, torch.int64
    table: list[tuple[str, RouterSpec, torch.dtype, torch.dtype, int, int, bool, bool, bool]] = [
        # name, spec, logits, rows, E, K, state, bias, count
        ("glm", sigmoid, f32, u8, 64, 4, True, True, True),
        ("glm-plain", sigmoid, f32, u8, 64, 4, False, False, False),
        ("qwen", qwen, bf16, u8, 128, 8, True, False, True),
        ("deepseek", grouped, f32, u8, 256, 8, True, True, True),
        ("kimi", sigmoid, bf16, u16, 384, 8, True, True, False),
        ("gpt-oss", gpt, bf16, i32, 128, 4, False, False, True),
        ("gpt-oss-half", gpt, f16, i64, 32, 4, True, False, False),
        ("low", low, bf16, i32, 60, 4, True, True, True),
        ("uneven", uneven, f16, u16, 96, 10, True, False, True),
        ("loud", loud, f16, i64, 512, 10, False, True, True),
        ("largest", sigmoid, f32, u16, 1024, 32, True, True, True),
        ("largest-softmax", qwen, f32, i64, 1024, 32, True, False, True),
        ("top-1", low, f32, u8, 16, 1, False, False, True),
    ]
    for name, spec, logits, rows, experts, k, state, bias, count in table:
        for tokens in (1, 33) if name in ("glm", "deepseek") else (33,):
            call = partial(route, tokens, spec, logits, rows, experts, k, state, bias, count)
            yield f"{name}-T{tokens}", call


def route(
    tokens: int,
    spec: RouterSpec,
    logits_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    experts: int,
    k: int,
    with_state: bool,
    with_bias: bool,
    count: bool,
) -> None:
    """Launch both kernels; rows are one layer of three, so their stride is not their width."""
    logits = torch.zeros(tokens, experts, dtype=logits_dtype)
    rows = torch.zeros(tokens, 3, k, dtype=rows_dtype)[:, 1]
    state = torch.ones(tokens, dtype=torch.uint8) if with_state else None
    bias = torch.zeros(experts) if with_bias else None
    weights, chosen, _ = route_triton.forward(logits, rows, state, bias, spec, count=count)
    route_triton.backward(logits, chosen, state, weights, spec)


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


def compiled(name: str) -> Iterator[Compiled]:
    """Compile every variant for a target."""
    triton.runtime.driver.set_active(NamedTarget(name))
    launch, caught = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        caught.append(launch(self, *args, **{**kwargs, "warmup": True}))

    with mock.patch.object(JITFunction, "run", compile_only):
        for variant, call in variants():
            start = time.perf_counter()
            call()
            seconds = (time.perf_counter() - start) / len(caught)
            for kernel in caught:
                yield Compiled(
                    target=name,
                    arch=str(kernel.metadata.target.arch),
                    kernel=kernel.metadata.name,
                    variant=variant,
                    shared=kernel.metadata.shared,
                    seconds=round(seconds, 2),
                    **resources(kernel),
                )
            caught.clear()


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("aot: expected TRITON_INTERPRET unset: the interpreter compiles nothing")
    for target in sys.argv[1:] or TARGETS:
        for row in compiled(target):
            print(json.dumps(asdict(row)), flush=True)
