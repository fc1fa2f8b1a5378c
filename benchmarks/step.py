"""The end of a training step: hidden states to loss, metrics, and the gradients of hidden states and head.

    python -m benchmarks.step --out benchmarks/results

`pacenote` is `policy_loss_from_hidden`, `two calls` what it is made of. The others take somebody's logprobs of all
tokens, as a trainer that does not tell its head what is trained, and give them the plain definition of the loss;
`liger-grpo` is liger-kernel's own loss, on samples padded to the longest. Half of each sample is a prompt, which is not
trained; the floor is 6 n V D operations of the n tokens that are. Errors are against float64, over some of the rows,
relative to the largest. Peaks count every tensor that a call makes, its results included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness, logprob, peers, policy
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.logprob import Score, fits, head
from benchmarks.models import MODELS
from pacenote.kernels import reference_policy as definition
from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.logprob_chunks import chunk_size
from pacenote.kernels.policy import PolicyConfig, PolicyOutput, policy_loss
from pacenote.kernels.policy_hidden import policy_loss_from_hidden
from pacenote.kernels.reference_policy import PolicyInputs
from tests.kernels.hidden_checks import Batch

WORKS = {
    "grpo": PolicyConfig(),
    "gspo": PolicyConfig(ratio="sequence", tis_cap=None),
}
Entry = Implementation["Inputs"] | Absent
ROWS = 64
"""Rows that are held against float64."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """hidden [T, D], weight [V, D], the batch, how many of its tokens are trained, and places [ROWS] of some."""

    hidden: Tensor
    weight: Tensor
    batch: Batch
    trained: int
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """loss 0-d, gradients [T, D] and [V, D], metrics [M] or fewer."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor
    metrics: Tensor


def make(config: PolicyConfig, width: int, vocab: int, tokens: int, device: torch.device, seed: int) -> Inputs:
    """Samples of uneven lengths; older logprobs near those of the weights, where they can be told cheaply."""
    loss = policy.make(config, tokens, device, seed)
    given = logprob.make(width, vocab, tokens, device, seed)
    ids = loss.batch.segment_ids.long()
    starts, ends = (torch.tensor(x, device=device) for x in zip(*loss.spans, strict=True))
    mask = torch.arange(tokens, device=device) >= ((starts + ends) // 2)[ids]
    score = linear_logprob(given.hidden, given.weight, given.targets)[0].detach()
    g = torch.Generator().manual_seed(seed + 1)
    old = score + torch.randn(tokens, generator=g).to(device) * 0.1
    trained = int(mask.sum())
    places = mask.nonzero()[:, 0]
    batch = Batch(
        loss_mask=mask,
        logprobs=old + torch.randn(tokens, generator=g).to(device) * 0.02,
        old_logprobs=old,
        advantages=loss.batch.advantages,
        segment_ids=loss.batch.segment_ids,
        num_samples=loss.batch.num_samples,
        targets=given.targets,
        num_trained=trained,
    )
    return Inputs(given.hidden, given.weight, batch, trained, places[:: max(1, len(places) // ROWS)])


def leaves(inputs: Inputs) -> list[Tensor]:
    """Hidden states and weight, to be differentiated."""
    return [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]


def result(out: PolicyOutput, of: list[Tensor]) -> Result:
    """Differentiate."""
    dhidden, dweight = torch.autograd.grad(out.loss, of)
    return Result(out.loss.detach(), dhidden, dweight, out.values)


def one_pass(config: PolicyConfig, inputs: Inputs) -> Result:
    """Ours, fused."""
    of = leaves(inputs)
    return result(policy_loss_from_hidden(of[0], of[1], inputs.batch, config), of)


def two_calls(config: PolicyConfig, inputs: Inputs) -> Result:
    """Ours, composed."""
    of, batch = leaves(inputs), inputs.batch
    logp, entropy = linear_logprob(of[0], of[1], batch.targets, mask=batch.loss_mask)
    return result(policy_loss(logp, batch, config, entropy=entropy), of)


def with_score(score: Score, config: PolicyConfig, inputs: Inputs) -> Result:
    """Somebody's logprobs of all tokens, and the definition's loss and formula of its gradient."""
    of, batch = leaves(inputs), inputs.batch
    logp, _ = score(of[0], of[1], batch.targets)
    loss, grad, metrics = policy.plain(config, arguments(batch, logp.detach().float()))
    dhidden, dweight = torch.autograd.grad(logp, of, grad.to(logp.dtype))
    return Result(loss, dhidden, dweight, metrics)


def arguments(batch: Batch, logp: Tensor) -> PolicyInputs:
    """Of the definition."""
    where = batch.loss_mask, batch.segment_ids, batch.num_samples
    return PolicyInputs(logp, batch.old_logprobs, batch.logprobs, batch.advantages, *where)


def liger(config: PolicyConfig) -> Entry:
    """Its chunked loss over samples of one length, a sample at a time; plain torch inside, on any device."""
    module = peers.find("liger_kernel.chunked_loss.grpo_loss", "liger-kernel")
    if isinstance(module, Absent):
        return module
    return Implementation(bind=lambda inputs: _liger(module, config, inputs), note="two metrics")


def _liger(module: ModuleType, config: PolicyConfig, inputs: Inputs) -> Callable[[], Result]:
    """Its call. Samples are padded before the clock starts: a trainer that uses it has them so."""
    batch = inputs.batch
    lengths = batch.segment_ids.long().bincount(minlength=batch.num_samples)
    assert batch.old_logprobs is not None

    def apart(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(torch.split(x, lengths.tolist())), batch_first=True)

    hidden, targets, mask, old, rollout = map(
        apart, (inputs.hidden, batch.targets, batch.loss_mask, batch.old_logprobs, batch.logprobs)
    )
    there = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    advantages = batch.advantages[lengths.cumsum(0) - 1]
    weights = None if config.tis_cap is None else (old - rollout).exp().clamp(max=config.tis_cap)
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=config.clip_low, epsilon_high=config.clip_high, loss_type="dapo", use_ref_model=False,
        compiled=False, importance_sampling_level=config.ratio,
    )  # fmt: skip

    def call() -> Result:
        of = [hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()]
        value, metrics = loss(of[0], of[1], targets, mask, advantages, old_per_token_logps=old, vllm_is_ratio=weights)
        dhidden, dweight = torch.autograd.grad(value, of)
        means = torch.stack([torch.as_tensor(m, device=value.device).float().mean() for m in metrics])
        return Result(value.detach(), dhidden[there], dweight, means)

    return call


def errors(config: PolicyConfig, inputs: Inputs, found: Result) -> dict[str, float]:
    """Of the gradient of hidden states, where a token has its own."""
    if config.by_sample:
        return {}
    rows, batch = inputs.rows, inputs.batch
    weight, targets = inputs.weight.double(), batch.targets[rows, None]
    logp = (inputs.hidden[rows].double() @ weight.t()).log_softmax(1)
    assert batch.old_logprobs is not None
    older = (batch.old_logprobs[rows].double(), batch.logprobs[rows].double(), batch.advantages[rows].double())
    where = batch.loss_mask[rows], batch.segment_ids[rows], batch.num_samples
    chosen = PolicyInputs(logp.gather(1, targets)[:, 0], *older, *where, denominator=float(inputs.trained))
    out = definition.policy_loss(chosen, replace(config, normalize="constant"))
    slope, _ = definition.policy_gradient(out.slopes, torch.ones_like(out.loss), where[0], where[1], 0.0)
    exact = slope[:, None] * (weight[targets[:, 0]] - logp.exp() @ weight)
    error = (found.dhidden[rows].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
    return {"dhidden_error": float(error)}


def check(config: PolicyConfig, inputs: Inputs, found: Result) -> None:
    """Near the two calls, as far as logits of bfloat16 allow: some move a ratio over a bound.

    Raises:
        AssertionError: it is not.
    """
    wanted = two_calls(config, inputs)
    for name in ("loss", "dhidden", "dweight"):
        mine, theirs = getattr(found, name).float(), getattr(wanted, name).float()
        apart = (mine - theirs).norm() / theirs.norm().clamp(min=1e-30)
        assert apart < 0.3, f"{name} is {float(apart)} away"


def compiled(setting: harness.Setting, wrap: Callable[[Score], Entry]) -> Entry:
    """`logprob.plain`, compiled."""
    found = setting.compile(logprob.plain)
    return found if isinstance(found, Absent) else wrap(found)


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """Each of WORKS."""
    device = setting.device
    width, vocab = head(MODELS[name], device)

    for work, config in WORKS.items():

        def wrap(score: Score, note: str = "", config: PolicyConfig = config) -> Implementation[Inputs]:
            return Implementation(bind=lambda inputs: partial(with_score, score, config, inputs), note=note)

        def call(function: Callable[..., Result], config: PolicyConfig = config) -> Implementation[Inputs]:
            return Implementation(bind=lambda inputs: partial(function, config, inputs))

        implementations: dict[str, Entry] = {
            OURS: call(one_pass),
            "two calls": call(two_calls),
            "plain": fits(16, tokens * vocab, device, partial(wrap, logprob.plain)),
            "compiled": fits(6, tokens * vocab, device, partial(compiled, setting, wrap)),
            "chunked": wrap(logprob.chunked),
            "torch": logprob.torch_fused(wrap),
            **logprob.liger(wrap, device),
            "liger-grpo": liger(config),
            "megatron": fits(10, tokens * vocab, device, partial(logprob.megatron, wrap, device)),
        }
        trained = tokens // 2
        yield Case(
            model=name,
            tokens=tokens,
            work=work,
            shape={"width": width, "vocab": vocab, "chunk": chunk_size(None, vocab, device)},
            floor=Floor(bytes=4 * vocab * width + 6 * trained * width, flop=6 * trained * vocab * width),
            make=partial(make, config, width, vocab, tokens, device),
            check=partial(check, config),
            errors=partial(errors, config),
            implementations=implementations,
        )


def parts_of(found: Result) -> list[Tensor]:
    """The tensors of a result."""
    return [found.loss, found.dhidden, found.dweight, found.metrics]


def main() -> int:
    """Measure; 1 if an implementation of ours failed."""
    try:
        return harness.main("step", (__doc__ or "").splitlines()[0], cases)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
