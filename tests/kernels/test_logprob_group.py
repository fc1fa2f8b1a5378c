"""A vocabulary in two processes gives what one process gives: results, and the gradients of every part."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pacenote.kernels.logprob_vocabulary import Vocabulary
from tests.kernels.logprob_ranks import CASES, SIZE, results
from tests.replay.spawn import spawn

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

Ranks = list[dict[str, list[Tensor]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return spawn("tests.kernels.logprob_ranks", SIZE, tmp_path_factory.mktemp("ranks"), CASES)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    whole, parts = results(case, None), [rank[name] for rank in ranks]
    rtol, atol = {torch.float64: (1e-11, 1e-12), torch.float32: (1e-5, 1e-5)}.get(case.dtype, (2e-2, 2e-2))
    shared = 2 if case.way == "logits" else 3
    for i in range(shared):  # results, and the gradient of the hidden states, whole on every rank
        assert torch.equal(parts[0][i], parts[1][i]), "ranks differ"
        torch.testing.assert_close(parts[0][i], whole[i], rtol=rtol, atol=atol)
    for i in range(shared, len(whole)):
        together = torch.cat([part[i] for part in parts], dim=1 if case.way == "logits" else 0)
        torch.testing.assert_close(together, whole[i], rtol=rtol, atol=atol)
        assert together.any()


@pytest.mark.parametrize("bound", [0, 25])
def test_bounds_of_no_vocabulary(bound: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= vocab_bound <= V = 24, got {bound}"):
        Vocabulary.of(bound, 24, None)
