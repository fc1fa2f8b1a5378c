"""The policy loss of the field's algorithms: clip, importance weights and masks against the rollout, KL, entropy.

`reference_policy.policy_loss` is the definition. CPU tensors and float64 take it; CUDA and ROCm take the kernels of
`policy_triton`, and so does the CPU in Triton's interpreter; all through one custom op, which gives loss, gradient and
every metric at once. Legend: T tokens, S samples, F names of TERMS, M of METRICS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pacenote.kernels import check, launch
from pacenote.kernels import reference_policy as plain
from pacenote.kernels.policy_config import PolicyConfig, from_values, plain_values
from pacenote.kernels.reference import wide
from pacenote.kernels.reference_policy import METRICS, TERMS, PolicyInputs, PolicyResult

__all__ = ["METRICS", "TERMS", "PolicyBatch", "PolicyConfig", "PolicyOutput", "group_tokens", "policy_loss"]


class PolicyBatch(Protocol):
    """What the loss reads of a batch; `pack.PackedBatch` has it."""

    @property
    def loss_mask(self) -> Tensor:
        """[T] bool."""

    @property
    def logprobs(self) -> Tensor:
        """[T] float32 of the rollout."""

    @property
    def old_logprobs(self) -> Tensor | None:
        """[T] float32 of the old policy; None: the logprobs given, without gradient."""

    @property
    def advantages(self) -> Tensor:
        """[T] float32."""

    @property
    def segment_ids(self) -> Tensor:
        """[T] int32, samples one after another; -1: padding, at the end."""

    @property
    def num_samples(self) -> int:
        """S."""


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """The loss and what is known of it, on its device; only the loss has a gradient.

    Attributes:
        loss: 0-d.
        metrics: views [] of `values` by their names, see `policy_loss`.
        values: [M], all metrics in the order of METRICS.
        sums: [F, S], of TERMS over each sample's trained tokens; `loss` of it is before share and denominator.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(repr=False)
    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, loss: Tensor, values: Tensor, sums: Tensor) -> PolicyOutput:
        """Of the loss [], metrics [M] and sums [F, S], the latter two without a graph."""
        return cls(loss, dict(zip(METRICS, values.unbind(), strict=True)), values, sums)

    def backward(self) -> None:
        """Differentiate the loss."""
        self.loss.backward()  # type: ignore[no-untyped-call]

    def read(self) -> dict[str, float]:
        """All metrics as numbers, in one copy from the device, which is waited for."""
        return dict(zip(METRICS, self.values.tolist(), strict=True))

    def by_sample(self) -> dict[str, Tensor]:
        """Sums [S] over the trained tokens of each sample, by the names of TERMS."""
        return dict(zip(TERMS, self.sums.unbind(), strict=True))


def policy_loss(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    *,
    entropy: Tensor | None = None,
    reference: Tensor | None = None,
    group_tokens: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyOutput:
    """weight * surrogate + kl_coef * KL(policy || reference) - entropy_coef * entropy, over trained tokens.

    Trained is where the mask is set in a sample. What stands elsewhere reaches neither loss nor gradient nor metrics,
    not even NaN. Exponents are bounded (`reference_policy.MAX_LOG_RATIO`). Without any trained token the loss is 0 and
    so are all gradients and metrics. Two launches, three where a ratio or weight is the sample's, and one for the
    gradient; nothing waits for the device, and results repeat bit for bit.

    Args:
        logprob: [T] floating, of the targets under the policy in training; all is computed in float32, or in float64
            if this is.
        batch: masks, advantages and older logprobs, see PolicyBatch. A ratio, weight or mean of a sample needs all of
            it here.
        config: the terms.
        entropy: [T] of the policy; needed if entropy_coef is not 0.
        reference: [T] logprobs of the reference policy; needed if kl_coef is not 0.
        group_tokens: [S] int32, int64 or float32, trained tokens of each sample's group, in other microbatches too;
            needed if normalize is "group". `policy.group_tokens` gives those of groups that are whole in a batch.
        denominator: what the sum over tokens ("token", "constant"), samples' means ("sequence") or groups' means
            ("group") is divided by, so that several microbatches share one, a number or 0-d; None: the trained tokens,
            samples, or groups (of a part of a group, that part) of this batch.

    Returns:
        The loss and metrics, means over this batch's trained tokens unless said otherwise: tokens (number); loss;
        ratio_mean, ratio_max, ratio_min; clip_fraction (tokens whose clipped branch was taken), at either end
        clip_low_fraction and clip_high_fraction; dual_clip_fraction; tis_mean (the weight as used); tis_truncated,
        icepop_masked, mis_masked (shares); kl_old_k1, kl_old_k3 (KL(old || policy)); kl_reference (the estimate as
        used); entropy; mismatch_abs, mismatch_k3, mismatch_f2 (of old and rollout: |difference|, KL(rollout || old),
        share whose ratio is beyond 2); surrogate (weighted); advantage_mean; samples (number that have any).

    Raises:
        ValueError: shapes that do not fit, a term without its input, a denominator not above 0 (of a tensor on an
            accelerator the value is not waited for).
    """
    check_terms(logprob, batch, config, entropy, reference, group_tokens, denominator)
    out = _forward(*_arguments(logprob, batch, config, entropy, reference, group_tokens, denominator))
    return PolicyOutput.of(out[0], out[1].detach(), out[2].detach())


def policy_slopes(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    *,
    entropy: Tensor | None = None,
    reference: Tensor | None = None,
    group_tokens: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients [T] of the loss in logprob and in entropy (None where it has no part in the loss), without a graph.

    Arguments as for `policy_loss`, which has checked them.
    """
    given = _arguments(logprob, batch, config, entropy, reference, group_tokens, denominator)
    _, _, _, slope, share, common, divisor = _forward(*given)
    bonus_dtype = None if entropy is None or not config.entropy_coef else entropy.dtype
    out, bonus = _backward(
        torch.ones_like(divisor), divisor, slope, share, common, batch.loss_mask, batch.segment_ids, batch.num_samples,
        config.entropy_coef, logprob.dtype, bonus_dtype,
    )  # fmt: skip
    return out, None if bonus_dtype is None else bonus


def _arguments(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    entropy: Tensor | None,
    reference: Tensor | None,
    group_tokens: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the op: logprob [T], and what it takes beside."""
    number = None if isinstance(denominator, Tensor) or denominator is None else float(denominator)
    return (
        logprob,
        batch.old_logprobs,
        batch.logprobs,
        batch.advantages,
        batch.loss_mask,
        batch.segment_ids,
        batch.num_samples,
        entropy,
        reference,
        group_tokens if config.normalize == "group" else None,
        denominator.to(wide(logprob[:0]).dtype) if isinstance(denominator, Tensor) else None,
        number,
        *plain_values(config),
    )


def group_tokens(batch: PolicyBatch, group_ids: Tensor) -> Tensor:
    """[S] int64, trained tokens of each sample's group, of groups that are whole in this batch; nothing waits.

    Args:
        batch: of S samples.
        group_ids: [S] int32 or int64, any numbers in 0..S-1; samples of a group have the same.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    samples, ids = batch.num_samples, batch.segment_ids
    check.tensor(group_ids, "group_ids", (samples,), (torch.int32, torch.int64), ids.device)
    known = batch.loss_mask & (ids >= 0) & (ids < samples)
    counts = torch.zeros(samples + 1, dtype=torch.int64, device=ids.device)
    tokens = counts.index_add(0, torch.where(known, ids, samples).long(), known.long())[:samples]
    return torch.zeros_like(tokens).index_add(0, group_ids.long(), tokens)[group_ids.long()]


def check_terms(
    logprob: Tensor,
    batch: PolicyBatch,
    config: PolicyConfig,
    entropy: Tensor | None,
    reference: Tensor | None,
    group_tokens: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    """Raise ValueError as `policy_loss` does: of a logprob [T], entropy [T] and the rest of its arguments."""
    check.tensor(logprob, "logprob", (None,), check.FLOATS, logprob.device)
    floats, shape, counts = check.FLOATS, tuple(logprob.shape), (torch.int32, torch.int64)
    if len(logprob) >= 2**30:
        raise ValueError(f"expected fewer than 2^30 positions, got {len(logprob)}: take a microbatch at a time")
    check.tensor(batch.loss_mask, "batch.loss_mask", shape, (torch.bool,), logprob.device)
    check.tensor(batch.segment_ids, "batch.segment_ids", shape, counts, logprob.device)
    for name, value in (
        ("batch.logprobs", batch.logprobs),
        ("batch.advantages", batch.advantages),
        ("batch.old_logprobs", batch.old_logprobs),
        ("entropy", entropy),
        ("reference", reference),
    ):
        if value is not None:
            check.tensor(value, name, shape, floats, logprob.device)
    if group_tokens is not None:
        check.tensor(group_tokens, "group_tokens", (batch.num_samples,), (*counts, torch.float32), logprob.device)
    if config.entropy_coef and entropy is None:
        raise ValueError(
            f"expected entropy [T] for entropy_coef={config.entropy_coef}, got None: linear_logprob gives it"
        )
    if config.kl_coef and reference is None:
        raise ValueError(f"expected reference [T] for kl_coef={config.kl_coef}, got None: logprobs of that policy")
    if config.normalize == "group" and group_tokens is None:
        raise ValueError('expected group_tokens [S] for normalize="group", got None: policy.group_tokens makes it')
    if config.normalize == "constant" and denominator is None:
        raise ValueError('expected a denominator for normalize="constant", got None')
    if isinstance(denominator, Tensor):
        check.tensor(denominator, "denominator", (), (*floats, *counts), logprob.device)
        if denominator.device.type != "cpu":  # its value is not waited for
            return
    if denominator is not None and not 0 < float(denominator) < float("inf"):
        raise ValueError(f"expected a denominator above 0, got {float(denominator)}")


# --- the op ----------------------------------------------------------------------------------------------------------

_CONFIG = (
    "str algorithm, str ratio, float clip_low, float clip_high, float? dual_clip, float? tis_cap, str tis_level, "
    "float[]? icepop, float[]? mis, str mis_level, float kl_coef, str kl_type, bool kl_unbiased, float entropy_coef, "
    "str normalize"
)
_GRADIENT = (
    "(Tensor grad, Tensor divisor, Tensor slope, Tensor share, Tensor common, Tensor mask, Tensor segment_ids, "
    "SymInt num_samples, float entropy_coef, ScalarType dtype, ScalarType? bonus_dtype) -> (Tensor, Tensor)"
)


@torch.library.custom_op(
    "pacenote::policy_loss",
    mutates_args=(),
    schema=(
        "(Tensor logprob, Tensor? old, Tensor rollout, Tensor advantages, Tensor mask, Tensor segment_ids, "
        "SymInt num_samples, Tensor? entropy, Tensor? reference, Tensor? group_tokens, Tensor? denominator, "
        f"float? number, {_CONFIG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _forward(*args: Any) -> tuple[Tensor, ...]:
    """The fields of a PolicyResult: loss, metrics [M], sums [F, S], slope [T], share [S], common [S], divisor."""
    x, config = _unpacked(args)
    if launch.takes_triton(x.logprob):
        from pacenote.kernels import policy_triton

        return _fields(policy_triton.policy_loss(x, config))
    return _fields(plain.policy_loss(x, config))


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    x, config = _unpacked(args)
    kind = torch.float64 if x.logprob.dtype == torch.float64 else torch.float32
    shares = config.normalize in ("sequence", "group")
    shapes: tuple[tuple[Any, ...], ...] = (
        (),
        (len(METRICS),),
        (len(TERMS), x.num_samples),
        tuple(x.logprob.shape),
        (x.num_samples if shares else 0,),
        (x.num_samples if config.shares_gradient else 0,),
        (),
    )
    return tuple(x.logprob.new_empty(shape, dtype=kind) for shape in shapes)


def _unpacked(args: tuple[Any, ...]) -> tuple[PolicyInputs, PolicyConfig]:
    """The op's arguments by their names."""
    denominator, number = args[10:12]
    given = (*args[:10], number if denominator is None else denominator)
    return PolicyInputs(*given), from_values(args[12:])


def _fields(out: PolicyResult) -> tuple[Tensor, ...]:
    s = out.slopes
    return out.loss, out.metrics, out.sums, s.slope, s.share, s.common, s.divisor


@torch.library.custom_op("pacenote::policy_gradient", mutates_args=(), schema=_GRADIENT)
def _backward(
    grad: Tensor,
    divisor: Tensor,
    slope: Tensor,
    share: Tensor,
    common: Tensor,
    mask: Tensor,
    segment_ids: Tensor,
    num_samples: int,
    entropy_coef: float,
    dtype: torch.dtype,
    bonus_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of logprob [T] and entropy [T], or [0] if that has no dtype."""
    saved = plain.PolicySlopes(slope, share, common, divisor, num_samples)
    if launch.takes_triton(slope):
        from pacenote.kernels import policy_triton

        return policy_triton.policy_gradient(saved, grad, mask, segment_ids, entropy_coef, dtype, bonus_dtype)
    out, bonus = plain.policy_gradient(saved, grad, mask, segment_ids, entropy_coef)
    return out.to(dtype), bonus.to(bonus_dtype) if bonus_dtype is not None else bonus[:0].to(dtype).clone()


@_backward.register_fake
def _(
    grad: Tensor,
    divisor: Tensor,
    slope: Tensor,
    share: Tensor,
    common: Tensor,
    mask: Tensor,
    segment_ids: Tensor,
    num_samples: int,
    entropy_coef: float,
    dtype: torch.dtype,
    bonus_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    out = slope.new_empty(slope.shape, dtype=dtype)
    return out, slope.new_empty(0, dtype=dtype) if bonus_dtype is None else slope.new_empty(
        slope.shape, dtype=bonus_dtype
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, config = _unpacked(inputs)
    _, _, _, slope, share, common, divisor = output
    ctx.save_for_backward(divisor, slope, share, common, x.mask, x.segment_ids)
    ctx.samples, ctx.coef, ctx.dtype = x.num_samples, config.entropy_coef, x.logprob.dtype
    ctx.bonus = x.entropy.dtype if x.entropy is not None and config.entropy_coef else None
    ctx.arguments = len(inputs)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    bonus_dtype = ctx.bonus if ctx.needs_input_grad[7] else None
    out, bonus = _backward(grad, *ctx.saved_tensors, ctx.samples, ctx.coef, ctx.dtype, bonus_dtype)
    rest = [None] * (ctx.arguments - 8)
    return out, *(None,) * 6, None if bonus_dtype is None else bonus, *rest


_forward.register_autograd(_differentiate, setup_context=_setup)
