"""The policy loss with gradient and all metrics: against plain torch, torch.compile, and a loop over samples.

    python -m benchmarks.policy --out benchmarks/results

`plain` is `reference_policy.policy_loss` with the formula of its gradient, `compiled` that under torch.compile. `per
sample` is what trainers do that keep ragged lists: a few ops for each sample, a loss by autograd, fewer metrics. The
loss knows nothing of the model, whose name is carried along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from pacenote.kernels import reference_policy as definition
from pacenote.kernels.policy import METRICS, PolicyConfig, policy_loss
from pacenote.kernels.reference_policy import PolicyInputs
from tests.kernels.policy_oracle import Batch

SAMPLE = 512
"""Mean length of a sample: lengths are between a quarter and seven quarters of it."""
FIRST = "glm-4.7-flash"
WORKS = {
    "grpo": PolicyConfig(),
    "grpo, all terms": PolicyConfig(dual_clip=3.0, icepop=(0.5, 2.0), kl_coef=0.01, entropy_coef=0.01),
    "gspo, sample masks": PolicyConfig(ratio="sequence", mis=(0.99, 1.01), normalize="sequence"),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """logprob, entropy, reference [T], the batch, and where each sample starts and ends, on the host."""

    logprob: Tensor
    entropy: Tensor | None
    reference: Tensor | None
    batch: Batch
    spans: list[tuple[int, int]]


def make(config: PolicyConfig, tokens: int, device: torch.device, seed: int) -> Inputs:
    """Samples of uneven lengths, a tenth of whose tokens is not trained."""
    g = torch.Generator().manual_seed(seed)
    count = max(1, tokens // SAMPLE)
    lengths = (torch.rand(count, generator=g) * 1.5 + 0.25) * tokens / count
    ends = (lengths.cumsum(0) * tokens / lengths.sum()).long().clamp(max=tokens)
    ends[-1] = tokens
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    segments = torch.arange(count).repeat_interleave(ends - starts).int()

    def some(scale: float) -> Tensor:
        return torch.randn(tokens, generator=g) * scale

    logprob = -torch.rand(tokens, generator=g) * 2
    old = logprob + some(0.1)
    values = [old + some(0.02), old, some(1.0)[starts][segments.long()] if tokens else some(1.0)]
    rollout, old, advantages = (value.to(device) for value in values)
    mask = (torch.rand(tokens, generator=g) < 0.9).to(device)
    batch = Batch(mask, rollout, old, advantages, segments.to(device), count)
    entropy = torch.rand(tokens, generator=g).to(device) if config.entropy_coef else None
    reference = (logprob + some(0.1)).to(device) if config.kl_coef else None
    return Inputs(logprob.to(device), entropy, reference, batch, list(zip(starts.tolist(), ends.tolist(), strict=True)))


def arguments(inputs: Inputs) -> PolicyInputs:
    """Of the definition."""
    batch, older = inputs.batch, (inputs.batch.old_logprobs, inputs.batch.logprobs, inputs.batch.advantages)
    where = batch.loss_mask, batch.segment_ids, batch.num_samples
    return PolicyInputs(inputs.logprob, *older, *where, inputs.entropy, inputs.reference)


def ours(config: PolicyConfig, inputs: Inputs) -> Callable[[], Any]:
    """The op and its gradient."""
    leaf = inputs.logprob.detach().requires_grad_()
    bonus = None if inputs.entropy is None else inputs.entropy.detach().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        out = policy_loss(leaf, inputs.batch, config, entropy=bonus, reference=inputs.reference)
        grads = torch.autograd.grad(out.loss, [x for x in (leaf, bonus) if x is not None])
        return out.loss.detach(), grads[0], out.values

    return call


def plain(config: PolicyConfig, x: PolicyInputs) -> tuple[Tensor, ...]:
    """The definition and its gradient."""
    out = definition.policy_loss(x, config)
    one = torch.ones((), device=x.logprob.device)
    grad, _ = definition.policy_gradient(out.slopes, one, x.mask, x.segment_ids, config.entropy_coef)
    return out.loss, grad, out.metrics


def by_definition(config: PolicyConfig, inputs: Inputs) -> Callable[[], Any]:
    """The call of `plain`."""
    return partial(plain, config, arguments(inputs))


def per_sample(config: PolicyConfig, inputs: Inputs) -> Callable[[], Any]:
    """A loop over samples, as trainers have it: a loss by autograd, and the mean of each metric by sample."""
    leaf, batch = inputs.logprob.detach().requires_grad_(), inputs.batch
    old = batch.old_logprobs
    assert old is not None
    low, high = 1 - config.clip_low, 1 + config.clip_high

    def call() -> tuple[Tensor, ...]:
        losses, counts, metrics = [], [], []
        for start, end in inputs.spans:
            part = slice(start, end)
            mask = batch.loss_mask[part].float()
            moved = leaf[part] - old[part]
            apart = old[part] - batch.logprobs[part]
            count = mask.sum().clamp(min=1)
            log_ratio = moved if config.ratio == "token" else ((moved * mask).sum() / count).expand_as(moved)
            ratio, weight = log_ratio.exp(), apart.exp()
            kept = torch.ones_like(weight)
            if config.icepop is not None:
                kept = ((weight >= config.icepop[0]) & (weight <= config.icepop[1])).float()
            if config.mis is not None:
                mean = ((apart * mask).sum() / count).exp()
                kept = kept * ((mean >= config.mis[0]) & (mean <= config.mis[1])).float()
            capped = weight.clamp(max=config.tis_cap) * kept
            worst = torch.maximum(-ratio * batch.advantages[part], -ratio.clamp(low, high) * batch.advantages[part])
            if config.dual_clip is not None:
                ceiling = -config.dual_clip * batch.advantages[part]
                worst = torch.where(batch.advantages[part] < 0, torch.minimum(worst, ceiling), worst)
            loss = capped * worst
            if inputs.reference is not None:
                d = inputs.reference[part] - leaf[part]
                loss = loss + config.kl_coef * (d.expm1() - d)
            if inputs.entropy is not None:
                loss = loss - config.entropy_coef * inputs.entropy[part]
            total = (loss * mask).sum()
            losses.append(total / count if config.normalize == "sequence" else total)
            counts.append(count)
            with torch.no_grad():
                clipped = ((ratio < low) | (ratio > high)).float()
                seen = (ratio, clipped, capped, weight - capped, -moved, moved.exp() - 1 - moved, apart.abs())
                metrics.append(torch.stack([(value * mask).sum() for value in seen]))
        units = len(losses) if config.normalize == "sequence" else torch.stack(counts).sum()
        loss = torch.stack(losses).sum() / units
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad, torch.stack(metrics).sum(0) / torch.stack(counts).sum()

    return call


def check(config: PolicyConfig, inputs: Inputs, result: Any) -> None:
    """Loss and gradient are the definition's, and where all metrics are given those.

    Raises:
        AssertionError: they are not.
    """
    loss, grad, metrics = plain(config, arguments(inputs))
    torch.testing.assert_close(result[0], loss, rtol=1e-4, atol=1e-5, msg=lambda m: f"loss: {m}")
    largest = float(grad.abs().max())
    torch.testing.assert_close(result[1], grad, rtol=1e-3, atol=1e-4 * largest, msg=lambda m: f"gradient: {m}")
    if len(result[2]) == len(METRICS):
        torch.testing.assert_close(result[2], metrics, rtol=1e-3, atol=1e-4, msg=lambda m: f"metrics: {m}")


def compiled(config: PolicyConfig, setting: harness.Setting) -> Implementation[Inputs] | Absent:
    """The definition, compiled."""
    found = setting.compile(partial(plain, config))
    if isinstance(found, Absent):
        return found
    return Implementation(bind=lambda inputs: partial(found, arguments(inputs)))


def floor(config: PolicyConfig, tokens: int, samples: int) -> Floor:
    """Four logprobs or advantages, mask and segments read; slopes written and read again; the gradients written."""
    given = 4 + bool(config.kl_coef) + bool(config.entropy_coef)
    again = 4 + 4 + (5 if config.entropy_coef or config.normalize != "token" else 0)
    return Floor(bytes=tokens * (4 * given + 5 + 4 + again + 4 * bool(config.entropy_coef)) + 80 * samples)


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """Each of WORKS, once: under the first model's name."""
    if name != FIRST:
        return
    samples = max(1, tokens // SAMPLE)
    for work, config in WORKS.items():
        implementations: dict[str, Implementation[Inputs] | Absent] = {
            OURS: Implementation(bind=partial(ours, config)),
            "plain": Implementation(bind=partial(by_definition, config)),
            "compiled": compiled(config, setting),
            "per sample": Implementation(
                bind=partial(per_sample, config),
                note="seven metrics, not twenty-three; the entropy has no gradient",
            ),
        }
        yield Case(
            model=name,
            tokens=tokens,
            work=work,
            shape={"samples": samples},
            floor=floor(config, tokens, samples),
            make=partial(make, config, tokens, setting.device),
            check=partial(check, config),
            implementations=implementations,
        )


def parts_of(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of a result: loss, gradient, metrics."""
    return result


if __name__ == "__main__":
    sys.exit(harness.main("policy", __doc__.splitlines()[0], cases))
