"""Triton's interpreter, as strict as a GPU and stricter: what it would let pass, or get wrong in silence, is refused.

- Loads and stores outside the tensors of the launch raise, where a GPU corrupts memory and the interpreter crashes.
- A masked load without `other` raises: a GPU gives anything there, the interpreter 0.
- bfloat16 is rounded to nearest as on a GPU, and refused by arithmetic, comparisons, dots and reductions: the
  interpreter keeps its bits in a uint16 and would compute with those.
- In a dot a row's sum is the same wherever the row stands, as in a GPU's tile: BLAS sums some rows of a tile in another
  order, which ones is up to the processor.
- Atomic additions of floats are refused: their order, and so their result, does not repeat on a GPU.
- device_assert and overflow of int32 are checked, launch arguments that nobody knows are refused.
- NaN from inf - inf warns nobody, as on a GPU.
- A call within a kernel does not patch the language that its launch has patched: that took most of the time.

`install` does it once a process, before or after kernels are defined.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as ti
from numpy.typing import NDArray

OPTIONS = {
    "num_warps", "num_stages", "num_ctas", "maxnreg", "grid", "warmup", "debug", "launch_pdl", "enable_fp_fusion",
    "launch_cooperative_grid", "waves_per_eu", "matrix_instr_nonkdim", "kpack",
}  # fmt: skip
"""Launch options of the compilers; anything else that is not a kernel's own argument is a misspelling."""


class StrictBuilder(ti.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's operations, with the checks."""

    extents: NDArray[np.uint64] = np.zeros((0, 2), np.uint64)
    """First byte and the one after the last, [tensors, 2], of the tensors of the launch."""

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        """Casts; float32 to bfloat16 is torch's."""
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, np.float32)).bfloat16()
            return ti.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Casts that name a rounding mode; only to nearest is what torch does."""
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        """Arithmetic and comparison."""
        refuse_bf16((lhs, rhs), op.__name__)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: Any, op: Any) -> Any:
        """exp, abs and the like."""
        refuse_bf16((arg,), op.__name__)
        return super().unary_op(arg, op)

    def create_dot(self, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        """Matrix products, each element summed in the order of K."""
        refuse_bf16((a, b), "dot")
        if not all(handle.dtype.scalar.is_floating() and handle.dtype.primitive_bitwidth > 8 for handle in (a, b)):
            return super().create_dot(a, b, d, *rest)
        total = np.einsum("...mk,...kn->...mn", a.data, b.data, dtype=d.data.dtype)
        return ti.TensorHandle(total + d.data, d.dtype.scalar)

    def create_load(self, ptr: Any, *rest: Any) -> Any:
        """Loads without a mask: all of it is read."""
        mask = ti.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        return self.create_masked_load(ptr, mask, None, *rest)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        """Loads, within the launch's tensors."""
        if other is None and not mask.data.all():
            raise ValueError("expected other= on a masked load, got none: a GPU gives anything where the mask is unset")
        self.check_inside(ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        """Stores, within the launch's tensors."""
        self.check_inside(ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, rmw_op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        """Atomics, of integers only."""
        if val.dtype.scalar.is_floating():
            raise TypeError("expected atomics on integers only, got floats: the order of their sum does not repeat")
        self.check_inside(ptr, mask)
        return super().create_atomic_rmw(rmw_op, ptr, val, mask, *rest)

    def check_inside(self, ptrs: Any, mask: Any) -> None:
        """Every address that is touched belongs to a tensor of the launch.

        Raises:
            IndexError: one does not.
        """
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        touched = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
        touched = touched[np.broadcast_to(mask.data, touched.shape)]
        if not touched.size:
            return
        first, end = self.extents.T if len(self.extents) else (np.zeros(1, np.uint64), np.zeros(1, np.uint64))
        home = np.clip(np.searchsorted(first, touched, side="right") - 1, 0, None)
        outside = (touched < first[home]) | (touched + np.uint64(size) > end[home])
        if outside.any():
            raise IndexError(f"expected addresses inside the tensors of the launch, got {outside.sum()} outside")


def refuse_bf16(handles: Iterable[Any], what: str) -> None:
    """Raise if a value that is computed with is bfloat16.

    Raises:
        TypeError: one is.
    """
    if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
        raise TypeError(f"expected float32 in {what}, got bfloat16: upcast right after the load")


def extents(values: Iterable[Any]) -> NDArray[np.uint64]:
    """First byte and the one after the last, [tensors, 2], of the tensors among a launch's arguments."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            found.append((value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()))
    return np.array(sorted(found), np.uint64).reshape(-1, 2)


def install() -> None:
    """Make the interpreter of this process strict."""
    builder = ti.interpreter_builder
    if isinstance(builder, StrictBuilder):
        return
    builder.__class__ = StrictBuilder
    builder.options = dataclasses.replace(builder.options, debug=True)  # device_assert and overflow
    launch, reduce_check, patch_tensor = (
        ti.GridExecutor.__call__,
        ti.ReduceScanOpInterface.check_tensor,
        ti._patch_lang_tensor,
    )

    def strict_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        unknown = set(kwargs) - set(inspect.signature(self.fn).parameters) - OPTIONS
        if unknown:
            raise KeyError(f"expected arguments of the kernel or launch options, got {sorted(unknown)}")
        builder.extents = extents([*args, *kwargs.values()])
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def strict_reduce(self: Any, values: Any) -> None:
        reduce_check(self, values)
        refuse_bf16(values, "a reduction")

    def indexable(tensor: Any, *scope: Any) -> None:
        """`range` of a scalar: newer numpy makes no int of an array of shape [1], as Triton 3.6 expects."""
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    patch_and_call = ti.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = (value for value in self.fn.__globals__.values() if value is tl or value is tl.core)
        if any(tl.core.is_builtin(language.arange) for language in languages):
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    ti.InterpretedFunction.__call__ = call
    ti.GridExecutor.__call__ = strict_launch
    ti.ReduceScanOpInterface.check_tensor = strict_reduce
    ti._patch_lang_tensor = indexable
