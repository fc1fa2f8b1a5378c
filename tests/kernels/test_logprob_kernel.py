"""Logprobs and entropies as kernels: every check of `logprob_checks`, the ops by themselves, what may exist."""

from __future__ import annotations

import pytest
import torch

from pacenote.kernels import logprob_ops
from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.logprob_chunks import LogprobChunks
from tests.kernels.logprob_checks import CHECKS, ids, normal

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # the interpreter's, of a row of NaN
]
OPS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, device: torch.device) -> None:
    CHECKS[name](device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = normal(4, 9, dtype=dtype, device=device), ids(4, 9, device)
    state = torch.ones(4, dtype=torch.uint8, device=device)
    for bias, heat in ((None, None), (normal(9, device=device), torch.full((), 0.5, device=device))):
        torch.library.opcheck(torch.ops.pacenote.logprob_stats.default, (logits, bias, heat, targets), test_utils=OPS)
        stats = logprob_ops.stats(logits, bias, heat, targets)
        for given in (None, state):
            torch.library.opcheck(torch.ops.pacenote.logprob_score.default, (stats[None], given), test_utils=OPS)
        score = logprob_ops.score(stats[None], state)
        for dentropy in (None, normal(4, device=device)):
            args = (
                logits,
                bias,
                heat,
                targets,
                state,
                score,
                normal(4, device=device),
                dentropy,
                torch.zeros_like(logits),
            )
            torch.library.opcheck(torch.ops.pacenote.logprob_slope.default, args, test_utils=OPS)


def test_refuses(device: torch.device) -> None:
    hidden, weight, targets = normal(4, 3, device=device), normal(5, 3, device=device), ids(4, 5, device)
    with pytest.raises(ValueError, match="expected mode 'chunked', 'invariant' or 'liger', got 'other'"):
        linear_logprob(hidden, weight, targets, mode="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected mode .*got 'liger'"):
        LogprobChunks.of(hidden, weight, targets, mode="liger")
    with pytest.raises(ValueError, match=r"expected picked \[any\] of int64, got \[4\] of bool"):
        LogprobChunks.of(hidden, weight, targets, picked=targets > 0)
