"""One rank of a vocabulary in parts; see `test_logprob_group`. Run as `python -m tests.kernels.logprob_ranks`.

What it saves: for each case logprob and entropy, or the loss and its sums by sample, and the gradients of hidden
states, weight and bias.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels.logprob import linear_logprob, logprob_from_logits
from pacenote.kernels.logprob_chunks import LogprobChunks
from pacenote.kernels.logprob_head import Mode
from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.policy_hidden import policy_loss_from_hidden
from tests.kernels.hidden_checks import Batch

SIZE, TOKENS, DIM, VOCAB = 2, 11, 8, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How logprobs are computed; `way` is the function: "linear", "logits", "chunks", or "loss" of the policy."""

    way: str = "linear"
    dtype: torch.dtype = torch.float64
    mode: Mode = "chunked"
    bound: int | None = None
    biased: bool = False


CASES = {
    "plain": Case(),
    "bounded": Case(bound=17, biased=True),
    "one rank is padding": Case(bound=9, biased=True),
    "single": Case(dtype=torch.float32, biased=True),
    "half": Case(dtype=torch.bfloat16, bound=17),
    "invariant": Case(mode="invariant", dtype=torch.float32, bound=17),
    "logits": Case(way="logits", bound=17),
    "chunks": Case(way="chunks", biased=True, bound=17),
    "loss": Case(way="loss", biased=True, bound=17),
    "loss of half": Case(way="loss", dtype=torch.bfloat16),
}


def inputs(case: Case) -> list[Tensor]:
    """Hidden states (or logits), weight, bias, targets, temperatures, mask, and slopes of both results."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=g).to(case.dtype) for s in ((TOKENS, DIM), (VOCAB, DIM), (VOCAB,))
    )
    targets = torch.randint(case.bound or VOCAB, (TOKENS,), generator=g)
    targets[3] = -100
    heat, mask = torch.rand(TOKENS, generator=g) + 0.5, torch.rand(TOKENS, generator=g) < 0.8
    slopes = torch.randn(2, TOKENS, generator=g)
    if case.way == "logits":
        hidden = (hidden @ weight.t()).contiguous()
    return [hidden, weight, bias, targets, heat, mask, *slopes]


def results(case: Case, group: dist.ProcessGroup | None) -> list[Tensor]:
    """What is saved of a case; with a group of this rank's part."""
    hidden, weight, bias, targets, heat, mask, *slopes = inputs(case)
    own = slice(None) if group is None else slice(group.rank() * VOCAB // SIZE, (group.rank() + 1) * VOCAB // SIZE)
    options: dict[str, Any] = {"temperature": heat, "mask": mask, "vocab_bound": case.bound, "chunk": 4, "group": group}
    kind = torch.float64 if case.dtype == torch.float64 else torch.float32
    slopes = [s.to(kind) for s in slopes]
    if case.way == "logits":
        leaf = hidden[:, own].clone().requires_grad_()
        out = logprob_from_logits(leaf, targets, **options)
        return [x.detach() for x in (*out, *torch.autograd.grad(out, [leaf], slopes))]
    leaves = [x.clone() for x in (hidden, weight[own], *([bias[own]] if case.biased else []))]
    options |= {"mode": case.mode, "bias": leaves[2] if case.biased else None}
    if case.way == "chunks":
        run, found = LogprobChunks.of(leaves[0], leaves[1], targets, **options), torch.zeros(2, TOKENS, dtype=kind)
        for chunk in run:
            found[0, chunk.index], found[1, chunk.index] = chunk.logprob, chunk.entropy
            chunk.backward(slopes[0][chunk.index], slopes[1][chunk.index])
        return [*found, *(x for x in run.gradients() if x is not None)]
    leaves = [x.requires_grad_() for x in leaves]
    if case.way == "loss":
        ids = torch.arange(TOKENS) // 5
        batch = Batch(options.pop("mask"), -slopes[0].abs(), None, slopes[1], ids, 3, targets.clamp(min=0), TOKENS)
        config = PolicyConfig(entropy_coef=0.1, normalize="sequence")
        loss = policy_loss_from_hidden(leaves[0], leaves[1], batch, config, **options)
        loss.backward()
        return [loss.loss.detach(), loss.sums, *(x.grad for x in leaves if x.grad is not None)]
    out = linear_logprob(leaves[0], leaves[1], targets, **options)
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, slopes))]


def main() -> None:
    """Run the cases of the command line."""
    rank, directory, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if launch.INTERPRETED:
        from tests.kernels import interpreter

        interpreter.install()
    # Else gloo looks for the interface of the host's name, which a container may not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=SIZE)
    try:
        group = dist.group.WORLD
        assert group is not None
        torch.save({name: results(CASES[name], group) for name in names}, directory / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
