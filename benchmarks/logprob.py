"""Logprob and entropy of hidden states, and their gradients: against plain, compiled and chunked torch and libraries.

    python -m benchmarks.logprob --out benchmarks/results

`score` is the forward pass alone, `train` both, of a loss that weighs each token's logprob. `at once` gives gradients
while a chunk's logits live; `invariant` has rows that do not depend on each other. The floor of `train` is 6 T V D
operations: logits once, and two products for the gradients. Rows of torch, `liger-triton` and megatron-core have no
entropy; `plain` and what is made of it, and megatron-core, round logits to bfloat16. Errors are against float64, over
some of the rows. On a CPU the head is a small part of the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import harness, peers
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.models import MODELS, Model
from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.logprob_chunks import LogprobChunks, chunk_size

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From hidden states, weight and targets to logprob and, where there is one, entropy."""
Entry = Implementation[Any] | Absent
Wrap = Callable[[Score], Implementation[Any]]
"""From somebody's logprobs to the work that is measured."""
ROWS = 64
"""Rows that are held against float64."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """hidden [T, D], weight [V, D], targets [T], and the gradient [T] of the logprobs."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    slope: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """logprob [T], entropy [T] where there is one, gradients [T, D] and [V, D] where there are some."""

    logprob: Tensor
    entropy: Tensor | None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


def make(width: int, vocab: int, tokens: int, device: torch.device, seed: int) -> Inputs:
    """Logits of a spread of about 4, as of a model that knows something."""
    g = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, generator=g, device=device, dtype=torch.bfloat16) * (4 * width**-0.5)
    targets = torch.randint(vocab, (tokens,), generator=g, device=device)
    return Inputs(hidden, weight, targets, torch.randn(tokens, generator=g, device=device))


def errors(inputs: Inputs, result: Result) -> dict[str, float]:
    """Largest error against float64 of logprob and entropy, and of the hidden states' gradient relative to it."""
    rows = torch.arange(0, len(inputs.targets), max(1, len(inputs.targets) // ROWS), device=inputs.hidden.device)
    weight = inputs.weight.double()
    logp = (inputs.hidden[rows].double() @ weight.t()).log_softmax(1)
    p, targets = logp.exp(), inputs.targets[rows, None]
    found = {"logprob_error": (result.logprob[rows].double() - logp.gather(1, targets)[:, 0]).abs().max()}
    if result.entropy is not None:
        found["entropy_error"] = (result.entropy[rows].double() + (p * logp).sum(1)).abs().max()
    if result.dhidden is not None:
        exact = inputs.slope[rows, None].double() * (weight[targets[:, 0]] - p @ weight)
        found["dhidden_error"] = (result.dhidden[rows].double() - exact).abs().max() / exact.abs().max()
    return {name: float(value) for name, value in found.items()}


def check(inputs: Inputs, result: Result) -> None:
    """Within what logits of bfloat16 allow.

    Raises:
        AssertionError: it is not.
    """
    for name, error in errors(inputs, result).items():
        assert error < 0.2, f"{name} is {error}"


def score(function: Score) -> Implementation[Inputs]:
    """The forward pass."""

    def call(inputs: Inputs) -> Result:
        with torch.no_grad():
            return Result(*function(inputs.hidden, inputs.weight, inputs.targets))

    return Implementation(bind=lambda inputs: partial(call, inputs))


def train(function: Score, note: str = "") -> Implementation[Inputs]:
    """Both passes by autograd."""

    def call(inputs: Inputs) -> Result:
        leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]
        logprob, entropy = function(leaves[0], leaves[1], inputs.targets)
        grads = torch.autograd.grad(logprob, leaves, inputs.slope.to(logprob.dtype))
        return Result(logprob.detach(), None if entropy is None else entropy.detach(), *grads)

    return Implementation(bind=lambda inputs: partial(call, inputs), note=note)


def at_once(inputs: Inputs) -> Result:
    """Gradients with the forward pass."""
    chunks = LogprobChunks.of(inputs.hidden, inputs.weight, inputs.targets, want=(True, True, False))
    found = torch.empty(2, len(inputs.targets), device=inputs.hidden.device)
    for chunk in chunks:
        found[0, chunk.index], found[1, chunk.index] = chunk.logprob, chunk.entropy
        chunk.backward(inputs.slope[chunk.index])
    return Result(found[0], found[1], *chunks.gradients()[:2])


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    logp = (hidden @ weight.t()).float().log_softmax(1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch over chunks of our size, whose logits autograd computes again."""
    size = chunk_size(None, len(weight), hidden.device)
    parts = [
        checkpoint(plain, h, weight, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def fits(entry_bytes: int, inputs: int, device: torch.device, entry: Callable[[], Entry]) -> Entry:
    """An implementation that keeps `entry_bytes` for each of `inputs` logits, if the device has room for them."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if entry_bytes * inputs > 0.7 * there:
            return Absent(f"{entry_bytes * inputs / 2**30:.0f} GiB of logits and the like do not fit")
    return entry()


def compiled(setting: harness.Setting, wrap: Wrap) -> Entry:
    """`plain`, compiled."""
    found = setting.compile(plain)
    return found if isinstance(found, Absent) else wrap(found)


def torch_fused(wrap: Wrap) -> Entry:
    """torch's own op without logits."""
    if not hasattr(F, "linear_cross_entropy"):
        return Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None

    return wrap(call)


def liger(wrap: Wrap, device: torch.device) -> dict[str, Entry]:
    """Its kernel with entropies (CuTe on Hopper, else its own choice), and its Triton kernel of losses."""
    found: dict[str, Entry] = {}
    scaled, fused = (peers.liger(f"fused_linear_{name}", device) for name in ("scaled_cross_entropy", "cross_entropy"))

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(scaled, ModuleType)
        loss, entropy = scaled.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, targets, 1.0, -100, 1, True
        )
        return -loss, entropy

    def loss_alone(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        assert isinstance(fused, ModuleType)
        loss, *_ = fused.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "none"
        )
        return -loss, None

    found["liger"] = scaled if isinstance(scaled, Absent) else wrap(with_entropy)
    found["liger-triton"] = fused if isinstance(fused, Absent) else wrap(loss_alone)
    return found


def megatron(wrap: Wrap, device: torch.device) -> Entry:
    """The fused cross entropy of its vocabulary-parallel head, in a group of one process, on all logits in bfloat16."""
    module = peers.find("megatron.core.fusions.fused_cross_entropy", "megatron-core")
    if isinstance(module, Absent):
        return module
    if device.type == "cpu":
        return Absent("megatron-core's fused cross entropy needs a GPU")
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        logits = (hidden @ weight.t())[:, None]
        return -module.fused_vocab_parallel_cross_entropy(logits, targets[:, None], dist.group.WORLD)[:, 0], None

    return wrap(call)


def head(model: Model, device: torch.device) -> tuple[int, int]:
    """D and V: the model's own, or on a CPU so small a part that a run of the benchmark is short."""
    return (model.width, model.vocab) if device.type == "cuda" else (model.width // 32, model.vocab // 256)


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """The forward pass, and both."""
    device = setting.device
    width, vocab = head(MODELS[name], device)
    invariant = partial(linear_logprob, mode="invariant")
    for work, wrap, products in (("score", score, 1), ("train", train, 3)):
        once: dict[str, Entry] = {"at once": Implementation(bind=lambda inputs: partial(at_once, inputs))}
        implementations: dict[str, Entry] = {
            OURS: wrap(linear_logprob),
            **(once if work == "train" else {}),
            "invariant": wrap(invariant),
            "plain": fits(10 + 6 * (products > 1), tokens * vocab, device, partial(wrap, plain)),
            "compiled": fits(2 + 4 * (products > 1), tokens * vocab, device, partial(compiled, setting, wrap)),
            "chunked": wrap(chunked),
            "torch": torch_fused(wrap),
            **liger(wrap, device),
            "megatron": fits(10, tokens * vocab, device, partial(megatron, wrap, device)),
        }
        weights = vocab * width * 2 * (1 if work == "score" else 2)
        yield Case(
            model=name,
            tokens=tokens,
            work=work,
            shape={"width": width, "vocab": vocab, "chunk": chunk_size(None, vocab, device)},
            floor=Floor(bytes=weights + tokens * width * 2 * products, flop=2 * products * tokens * vocab * width),
            make=partial(make, width, vocab, tokens, device),
            check=check,
            errors=errors,
            implementations=implementations,
        )


def parts_of(result: Result) -> list[Tensor]:
    """The tensors of a result."""
    return [x for x in (result.logprob, result.entropy, result.dhidden, result.dweight) if x is not None]


def main() -> int:
    """Measure; 1 if an implementation of ours failed."""
    try:
        return harness.main("logprob", (__doc__ or "").splitlines()[0], cases)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
