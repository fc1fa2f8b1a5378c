"""The policy loss of hidden states in one pass: logits, logprobs and gradients, one chunk of trained tokens at a time.

What the loss passes to a token's logprob depends on the other tokens only by their number, and the masks say that
before any logit exists. So a chunk's gradients are taken while its logits live, in 6 n V D operations for n trained
tokens; a graph that keeps no logits computes them again and takes 8 n V D, which is what is left to do where a ratio or
weight is the whole sample's. Loss and metrics are those of `policy.policy_loss` of all logprobs.

Legend: T tokens, n of them trained, C of a chunk, S samples, D model, V vocabulary (of this rank).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pacenote.kernels import check, policy
from pacenote.kernels.logprob_chunks import Linear, LogprobChunks, chunk_size, flattened
from pacenote.kernels.logprob_head import Head, Mode
from pacenote.kernels.logprob_rows import Rows
from pacenote.kernels.policy import PolicyBatch, PolicyConfig, PolicyOutput
from pacenote.kernels.policy_config import Normalize
from pacenote.kernels.reference import wide

__all__ = ["TargetBatch", "policy_loss_from_hidden"]

IGNORED, OUTSIDE = -100, -1


class TargetBatch(PolicyBatch, Protocol):
    """What the loss reads of a batch; `pack.PackedBatch` has it."""

    @property
    def targets(self) -> Tensor:
        """[T] int64 or int32, ids of the whole vocabulary; where nothing is trained, anything."""

    @property
    def num_trained(self) -> int | None:
        """At least as many tokens as are trained, as the host knows them; None: nobody does."""


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    batch: TargetBatch,
    config: PolicyConfig,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    vocab_bound: int | None = None,
    reference: Tensor | None = None,
    group_tokens: Tensor | None = None,
    denominator: float | Tensor | None = None,
    chunk: int | None = None,
    mode: Mode = "chunked",
    group: dist.ProcessGroup | None = None,
) -> PolicyOutput:
    """`policy_loss` of `linear_logprob` of the trained tokens, without a logit that outlives its chunk.

    Only trained tokens go through the head: where the mask is set in a sample. Hidden states, targets and temperatures
    elsewhere reach nothing, not even NaN. Nothing waits for the device where the batch has `num_trained`, as one from
    `pack` has; otherwise it waits once, to learn how many are trained. What is alive at once: the logits of a chunk
    (float32), and the gradients asked for (that of the weight in float32).

    The loss and its metrics have the very bits of the two calls if the chunks are the same. The gradients do as well
    where the loss is divided by trained tokens or a given denominator, and the ops run in the same order; those of the
    other denominators may differ by a rounding of that number. The loss may be differentiated once.

    Args:
        hidden: [T, D] or [1, T, D] floating.
        weight: [V, D] of the same dtype; with a group, this rank's rows, see `linear_logprob`.
        batch: of S samples, see TargetBatch; the rest as for `policy_loss`.
        config: the terms.
        temperature: a number above 0, or such numbers [T].
        bias: [V].
        vocab_bound: real vocabulary; the entries from here on are padding and have no probability.
        reference: as `policy_loss`.
        group_tokens: as `policy_loss`.
        denominator: as `policy_loss`.
        chunk: tokens whose logits exist at once.
        mode: "chunked" or "invariant", see `linear_logprob`; "liger" keeps no logits that a gradient could be taken of.
        group: as `linear_logprob`; every rank returns the whole loss.

    Returns:
        As `policy_loss`; differentiating its loss gives gradients to hidden, weight and bias.

    Raises:
        ValueError: as `linear_logprob` and `policy_loss`.
        RuntimeError: from the loss, if it is differentiated a second time.
    """
    shape = tuple(batch.loss_mask.shape)
    check.tensor(batch.targets, "batch.targets", (None,), (torch.int64, torch.int32), hidden.device)
    check.tensor(batch.loss_mask, "batch.loss_mask", tuple(batch.targets.shape), (torch.bool,), hidden.device)
    check.tensor(batch.segment_ids, "batch.segment_ids", shape, (torch.int32, torch.int64), hidden.device)
    head = Head.of(weight, bias, vocab_bound, mode, group, hidden.device)
    flat = flattened(hidden, weight, batch.targets)
    targets, picked = _trained(batch)
    rows = Rows.of(targets, temperature, IGNORED, head.vocabulary.whole, flat, picked=picked)
    terms = _Terms(batch, config, reference, group_tokens, denominator)
    size = chunk_size(chunk, len(weight), hidden.device)
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if config.by_sample or not wants:
        logprob, entropy = Linear.apply(flat, weight, bias, rows, head, size)  # type: ignore[no-untyped-call]
        return terms.loss(rows.place(logprob), rows.place(entropy))
    terms.check(flat)
    loss, values, sums = _OnePass.apply(flat, weight, bias, rows, head, size, terms)  # type: ignore[no-untyped-call]
    return PolicyOutput.of(loss, values, sums)


def _trained(batch: TargetBatch) -> tuple[Tensor, Tensor]:
    """Targets [T], IGNORED where nothing is trained; places [n] of what is, in order.

    Where fewer are trained than the batch says, others stand behind them. Where more are, a target is out of range,
    which makes NaN of the loss; on the CPU ValueError is raised.
    """
    trained = batch.loss_mask & (batch.segment_ids >= 0) & (batch.segment_ids < batch.num_samples)
    targets, bound = torch.where(trained, batch.targets, IGNORED), batch.num_trained
    if bound is None:
        return targets, trained.nonzero()[:, 0]
    number = trained.sum()
    if trained.device.type == "cpu" and not int(number) <= bound:
        raise ValueError(f"expected batch.num_trained of at least {int(number)}, which the masks train, got {bound}")
    targets = torch.where(trained & (number > bound), OUTSIDE, targets)
    return targets, torch.argsort(~trained, stable=True)[: max(0, bound)]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some tokens of a batch, as a batch."""

    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    segment_ids: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a policy loss is of, but for logprob and entropy; the arguments of `policy_loss`."""

    batch: TargetBatch
    config: PolicyConfig
    reference: Tensor | None
    group_tokens: Tensor | None
    denominator: float | Tensor | None

    def loss(self, logprob: Tensor, entropy: Tensor) -> PolicyOutput:
        """Of all tokens, [T] each."""
        return policy.policy_loss(
            logprob,
            self.batch,
            self.config,
            entropy=entropy,
            reference=self.reference,
            group_tokens=self.group_tokens,
            denominator=self.denominator,
        )

    def check(self, hidden: Tensor) -> None:
        """Raise what `policy_loss` would, before anything of the size of the vocabulary is computed."""
        like = wide(hidden[:0]).new_zeros(len(hidden))
        policy.check_terms(like, self.batch, self.config, like, self.reference, self.group_tokens, self.denominator)

    def shared(self) -> _Terms:
        """The same gradients for any part of the tokens: what the masks of all of them decide is written out.

        A mean over samples is one over groups of one sample each.
        """
        batch, config = self.batch, self.config
        counts = policy.group_tokens(batch, torch.arange(batch.num_samples, device=batch.segment_ids.device))
        sizes = self.group_tokens if config.normalize == "group" else counts
        units: float | Tensor | None = self.denominator
        if units is None and config.normalize == "token":
            units = counts.sum().clamp(min=1)
        elif units is None and config.normalize == "sequence":
            units = (counts > 0).sum().clamp(min=1)
        elif units is None:
            assert sizes is not None, "checked"
            whole = (counts / sizes.clamp(min=1)).sum()
            units = torch.where(whole > 0, whole, 1.0)
        normalize: Normalize = "group" if config.normalize in ("sequence", "group") else "constant"
        return replace(self, config=replace(config, normalize=normalize), group_tokens=sizes, denominator=units)

    def slopes(
        self, index: Tensor | slice, live: Tensor, logprob: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of `shared` terms in logprob [C] and entropy [C] of the tokens at `index`, trained if `live`."""
        batch = self.batch
        part = _Slice(
            loss_mask=live,
            logprobs=batch.logprobs[index],
            old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[index],
            advantages=batch.advantages[index],
            segment_ids=torch.where(live, batch.segment_ids[index], -1),
            num_samples=batch.num_samples,
        )
        reference = None if self.reference is None else self.reference[index]
        return policy.policy_slopes(
            logprob,
            part,
            self.config,
            entropy=entropy,
            reference=reference,
            group_tokens=self.group_tokens,
            denominator=self.denominator,
        )


class _OnePass(torch.autograd.Function):
    """Loss, metrics and sums by sample of hidden states, whose gradients are there when it returns."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, head: Head, size: int, terms: _Terms
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, D], weight [V, D], bias [V], which the head has -> loss 0-d, metrics [M], sums [F, S]."""
        chunks = LogprobChunks(hidden, rows, head, size, want=ctx.needs_input_grad[:3])
        shared = terms.shared()
        found = wide(hidden[:0]).new_zeros(2, len(rows.targets))
        for chunk in chunks:
            found[0, chunk.part], found[1, chunk.part] = chunk.logprob, chunk.entropy
            chunk.backward(*shared.slopes(chunk.index, rows.live(chunk.part), chunk.logprob, chunk.entropy))
        ctx.gradients = chunks.gradients()
        out = terms.loss(rows.place(found[0]), rows.place(found[1]))
        ctx.mark_non_differentiable(out.values, out.sums)
        return out.loss, out.values, out.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> Any:
        """The gradients, scaled where they stand: that of the weight is the largest array of the step."""
        if ctx.gradients is None:
            raise RuntimeError("expected one backward of this loss, got a second: its gradients were given away")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients), None, None, None, None
