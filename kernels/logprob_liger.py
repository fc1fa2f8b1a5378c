"""liger-kernel's fused scaled cross entropy as a back end of `linear_logprob`: on Hopper its CuTe kernel.

It has per-token losses and entropies, gradients of both, one temperature for all tokens. It has no bias, no temperature
a token, no float64; its process group must be that of its NVSHMEM team, so parts of a vocabulary are left to `chunked`.
Its arithmetic is its own: in its fallback, which is not Hopper's kernel, logits are rounded to the dtype of the weight.

Legend: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels.logprob_rows import IGNORED, SCORED, Rows

MODULE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
IGNORE_INDEX = -100


def linear_logprob(
    hidden: Tensor, weight: Tensor, rows: Rows, *, temperature: float | Tensor, bias: Tensor | None, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy [n] float32, with gradients to both.

    Args:
        hidden: [T, D].
        weight: [V, D], real vocabulary only.
        rows: the n of T tokens.
        temperature: a number.
        bias: must be None.
        grouped: must be False.

    Raises:
        ValueError: it has not got what is asked for.
        ImportError: there is no liger-kernel, or one that is too old.
    """
    for asked, what in (
        (bias is not None, "a bias"),
        (isinstance(temperature, Tensor), "a temperature a token"),
        (grouped, "parts of a vocabulary"),
        (hidden.dtype == torch.float64, "float64"),
    ):
        if asked:
            raise ValueError(f"expected what liger-kernel computes, got {what}: use mode='chunked'")
    function = fused()
    # Ignored rows must not reach the weight as 0 * NaN, nor wrong targets the library, which reads there.
    scored = rows.state == SCORED
    x = hidden if rows.picked is None else hidden.index_select(0, rows.picked)
    x = torch.where(rows.state[:, None] == IGNORED, 0.0, x).contiguous()
    targets = torch.where(scored, rows.targets, IGNORE_INDEX)
    if not len(x):
        empty = x.float().sum(dim=1)
        return empty, empty
    loss, entropy = function.apply(x, weight.contiguous(), targets, float(temperature), IGNORE_INDEX, 1, True)
    wrong = torch.where((rows.state == IGNORED) | scored, 0.0, float("nan"))
    return torch.where(scored, -loss, wrong), torch.where(scored, entropy, wrong)


def fused() -> Any:
    """The library's autograd function.

    Raises:
        ImportError: it is not installed, or too old to have it.
    """
    try:
        return importlib.import_module(MODULE).LigerFusedLinearScaledCrossEntropyFunction
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"expected liger-kernel 0.8.5 or newer for mode='liger', got {error}: install pacenote[bench], or use "
            f"mode='chunked'"
        ) from error
