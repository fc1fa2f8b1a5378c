"""Where a kernel runs, and in which blocks. No autotuning: a few fixed choices, so that results repeat."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheel for this platform: everything takes the reference
    triton = None

HAS_TRITON = triton is not None
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether Triton kernels run in its interpreter, on the CPU. Triton decides this once, when it is imported."""


def takes_triton(x: Tensor) -> bool:
    """Whether an op on a tensor [...] launches its kernel: on CUDA and ROCm, and in the interpreter on the CPU.

    float64 takes the reference: it is for oracles and gradient checks.
    """
    return HAS_TRITON and x.dtype != torch.float64 and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Launch on the device of a tensor [...], which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@dataclass(frozen=True, slots=True)
class Blocks:
    """rows a program works on, and its warps."""

    rows: int
    warps: int


def row_blocks(lanes: int) -> Blocks:
    """Blocks for a kernel that holds `lanes` numbers a row in registers: about 1024 numbers a program of four warps.

    The interpreter pays for programs, not for numbers: there a program takes many rows.
    """
    return Blocks(rows=64 if INTERPRETED else max(1, min(16, 1024 // lanes)), warps=4)


def copy_rows(words: int) -> int:
    """Rows of a block that a program of four warps turns round in shared memory: about 2048 words, at least 8 rows.

    That is at most 16 KiB, and few enough addresses and masks for the registers. In the interpreter: see `row_blocks`.
    """
    return 256 if INTERPRETED else max(8, min(128, 2048 // words))


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1; Triton's block shapes are such."""
    return 1 << (n - 1).bit_length()
