"""Libraries that do the same work, where they are installed."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch

from benchmarks.case import Absent


@cache
def find(module: str, package: str) -> ModuleType | Absent:
    """A module of a package (as pip names it), or why it cannot be had."""
    try:
        with warnings.catch_warnings():  # megatron-core warns of everything that it could do without and has not
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        return Absent(f"{package} is not installed" if module.startswith(missing) else f"{package} needs {missing}")
    except Exception as error:  # of libraries that a machine may have in any state
        return Absent(f"{package} cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def megatron(module: str = "moe_utils") -> ModuleType | Absent:
    """A module of megatron-core's mixture of experts."""
    return find(f"megatron.core.transformer.moe.{module}", "megatron-core")


def liger(module: str, device: torch.device) -> ModuleType | Absent:
    """A module of liger-kernel's ops, which run on a GPU only."""
    found = find(f"liger_kernel.ops.{module}", "liger-kernel")
    return Absent("liger-kernel needs a GPU") if isinstance(found, ModuleType) and device.type == "cpu" else found
