"""A whole training step, old logprobs to gradients, makes no tensor of logits beyond a chunk of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pacenote.kernels import logprob_chunks
from pacenote.kernels.policy import PolicyConfig
from pacenote.rollout.trajectory import Trajectory
from pacenote.trainer.batch import microbatches
from pacenote.trainer.hf import HfBackend
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.step import prepare, update
from tests.trainer.recorded import samples

CHUNK = 8


class Logits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows [rows, V] that any op makes, in any dtype and of any leading shape; views of the weight are not."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab, self.weight, self.rows = len(weight), weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == self.vocab:
                own = value.data_ptr() != self.weight
                self.rows = max(self.rows, value.numel() // self.vocab if own else 0)
        return out


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_no_logits_in_a_step(
    tiny_dir: Path, trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, ratio: Any
) -> None:
    backend = HfBackend(tiny_dir, OptimConfig(microbatch_tokens=90), device="cpu", temperature=0.9)
    weight = backend.model.get_output_embeddings().weight
    items = microbatches(samples(trajectories), backend.config, "cpu")
    most = max(int(item.batch.loss_mask.sum()) for item in items)
    assert most > 2 * CHUNK, "one chunk would hold all of them"
    with Logits(weight) as seen, torch.no_grad():
        backend.model(**items[0].batch.inputs)
    assert seen.rows == items[0].batch.num_tokens, "the net would catch logits"
    monkeypatch.setattr(logprob_chunks, "CHUNK_NUMBERS", CHUNK * len(weight))
    monkeypatch.setattr(logprob_chunks, "CHUNK_NUMBERS_GPU", CHUNK * len(weight))
    with Logits(weight) as seen:
        prepared, _ = prepare(backend, [items], "rollout")
        learnt = update(backend, prepared, PolicyConfig(entropy_coef=0.01, ratio=ratio))
    assert seen.rows == CHUNK
    assert learnt["grad_norm"] > 0
