"""Stands in for SGLang's package of compiled GPU kernels, which has no build for this machine.

SGLang imports names from it wherever it might use them, also in modules that a CPU server loads. Every name can be imported;
what is called says so, instead of giving a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)  # what Python itself asks a module for

    def missing(*args: object, **words: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU: this is the stand-in for SGLang on a CPU")

    return missing
