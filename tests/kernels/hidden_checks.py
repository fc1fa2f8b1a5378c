"""Named checks of the policy loss of hidden states, each a function of the device; see `mutants_hidden`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.policy import PolicyConfig, PolicyOutput, group_tokens, policy_loss
from pacenote.kernels.policy_config import Normalize
from tests.kernels.route_oracle import no_worse

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
NAN = float("nan")
SLOW = launch.INTERPRETED
"""The interpreter takes a second for a chunk: there a few of the cases show that the kernels fit together."""
GIVEN: tuple[dict[str, Any], ...] = ({}, {"old": False, "bias": False, "heat": False}, {"dtype": torch.bfloat16})
NORMALIZE: tuple[Normalize, ...] = ("token", "sequence", "group", "constant")
CONFIGS = (
    PolicyConfig(tis_cap=None),
    PolicyConfig(entropy_coef=0.1, icepop=(0.5, 2.0), dual_clip=3.0),
    PolicyConfig(algorithm="cispo", kl_coef=0.2, kl_unbiased=True, mis=(0.5, 2.0), mis_level="token"),
    PolicyConfig(algorithm="reinforce", entropy_coef=0.05, kl_coef=0.1, kl_type="k2"),
)
"""Losses whose token has its own gradient."""
SEQUENCES = (
    PolicyConfig(ratio="sequence", entropy_coef=0.1),
    PolicyConfig(ratio="sequence-token", tis_level="geometric"),
    PolicyConfig(mis=(0.5, 2.0), kl_coef=0.1),
)
"""Losses whose ratio, weight or mask is the sample's."""


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True, slots=True)
class Batch:
    """A TargetBatch."""

    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    segment_ids: Tensor
    num_samples: int
    targets: Tensor
    num_trained: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Random samples, a head, and how they are given."""

    lengths: tuple[int, ...] = (9, 4, 0, 12, 3)
    padding: int = 3
    dim: int = 8
    vocab: int = 37
    dtype: torch.dtype = torch.float32
    trained: float = 0.6
    known: int | None = 0
    """Tokens by which `num_trained` is too high; None: it is not said."""
    old: bool = True
    bias: bool = True
    bound: int | None = None
    heat: bool = True
    divisor: float | None = None
    chunk: int | None = 16 if SLOW else 5
    mode: Any = "chunked"
    grad: float = 1.0
    seed: int = 0

    def batch(self, device: torch.device) -> Batch:
        """Samples end to end; what is not trained is NaN, and its targets are no ids."""
        g = torch.Generator().manual_seed(self.seed)
        total = sum(self.lengths) + self.padding
        segments = torch.tensor([s for s, n in enumerate(self.lengths) for _ in range(n)] + [-1] * self.padding)
        mask = torch.rand(total, generator=g) < self.trained
        live = mask & (segments >= 0)
        values = [-torch.rand(total, generator=g) * 4, -torch.rand(total, generator=g) * 4]
        values.append(torch.randn(total, generator=g))
        rollout, old, advantages = (torch.where(live, value, NAN).to(device) for value in values)
        targets = torch.randint(self.bound or self.vocab, (total,), generator=g)
        return Batch(
            loss_mask=mask.to(device),
            logprobs=rollout,
            old_logprobs=old if self.old else None,
            advantages=advantages,
            segment_ids=segments.int().to(device),
            num_samples=len(self.lengths),
            targets=torch.where(live, targets, 10**6).to(device),
            num_trained=None if self.known is None else int(live.sum()) + self.known,
        )

    def tensors(self, batch: Batch) -> list[Tensor]:
        """hidden [T, D], NaN where nothing is trained, weight [V, D], bias [V] or nothing; leaves."""
        g, device = torch.Generator().manual_seed(self.seed + 1), batch.targets.device
        shapes = [(len(batch.targets), self.dim), (self.vocab, self.dim), (self.vocab,)][: 3 if self.bias else 2]
        found = [torch.randn(*shape, generator=g).to(device, self.dtype) for shape in shapes]
        found[0] = torch.where(live(batch)[:, None], found[0], NAN)
        return [x.requires_grad_() for x in found]

    def temperature(self, batch: Batch) -> Tensor | float:
        """[T], NaN where nothing is trained, or a number."""
        if not self.heat:
            return 0.8
        g = torch.Generator().manual_seed(self.seed + 2)
        some = torch.rand(len(batch.targets), generator=g).to(batch.targets.device) + 0.5
        return torch.where(live(batch), some, NAN)


def live(batch: Batch) -> Tensor:
    """[T] bool, what is trained."""
    return batch.loss_mask & (batch.segment_ids >= 0) & (batch.segment_ids < batch.num_samples)


@dataclass(frozen=True, slots=True)
class Result:
    """What a loss gave, and the gradients of hidden states, weight and bias."""

    out: PolicyOutput
    grads: list[Tensor]

    @property
    def all(self) -> dict[str, Tensor]:
        """By name."""
        grads = dict(zip(("dhidden", "dweight", "dbias"), self.grads, strict=False))
        return {"loss": self.out.loss.detach(), "metrics": self.out.values, "sums": self.out.sums, **grads}


def options(case: Case, config: PolicyConfig, batch: Batch) -> dict[str, Any]:
    """Arguments of `policy_loss` beyond logprob and entropy."""
    groups = torch.arange(batch.num_samples, device=batch.targets.device) // 2
    g = torch.Generator().manual_seed(case.seed + 3)
    other = torch.where(live(batch), -torch.rand(len(batch.targets), generator=g).to(batch.targets.device) * 4, NAN)
    return {
        "reference": other if config.kl_coef else None,
        "group_tokens": group_tokens(batch, groups) if config.normalize == "group" else None,
        "denominator": 7.5 if config.normalize == "constant" and case.divisor is None else case.divisor,
    }


def from_hidden(*args: Any, **kwargs: Any) -> PolicyOutput:
    """`policy_loss_from_hidden`, of the module that is there now: a mutant, perhaps."""
    from pacenote.kernels import policy_hidden

    return policy_hidden.policy_loss_from_hidden(*args, **kwargs)


def one_pass(case: Case, config: PolicyConfig, device: torch.device) -> Result:
    """`policy_loss_from_hidden` of a case."""
    batch = case.batch(device)
    hidden, weight, *bias = leaves = case.tensors(batch)
    out = from_hidden(
        hidden, weight, batch, config, temperature=case.temperature(batch), bias=bias[0] if bias else None,
        vocab_bound=case.bound, chunk=case.chunk, mode=case.mode, **options(case, config, batch),
    )  # fmt: skip
    (out.loss * case.grad).backward()  # type: ignore[no-untyped-call]
    return Result(out, [gradient(leaf) for leaf in leaves])


def two_calls(case: Case, config: PolicyConfig, device: torch.device) -> Result:
    """`linear_logprob`, then `policy_loss`."""
    batch = case.batch(device)
    hidden, weight, *bias = leaves = case.tensors(batch)
    logprob, entropy = linear_logprob(
        hidden, weight, batch.targets, temperature=case.temperature(batch), bias=bias[0] if bias else None,
        vocab_bound=case.bound, mask=live(batch), chunk=case.chunk, mode=case.mode,
    )  # fmt: skip
    out = policy_loss(logprob, batch, config, entropy=entropy, **options(case, config, batch))
    (out.loss * case.grad).backward()  # type: ignore[no-untyped-call]
    return Result(out, [gradient(leaf) for leaf in leaves])


def plain(case: Case, config: PolicyConfig, device: torch.device, dtype: torch.dtype) -> Result:
    """Plain torch in a dtype: all logits, log_softmax, the loss of them."""
    batch = case.batch(device)
    leaves = [x.detach().to(dtype).requires_grad_() for x in case.tensors(batch)]
    hidden, weight, *bias = leaves
    there = live(batch)
    logits = torch.where(there[:, None], hidden, 0.0) @ weight[: case.bound].t()
    logits = logits + bias[0][: case.bound] if bias else logits
    heat = case.temperature(batch)
    heat = torch.where(there, heat, 1.0)[:, None] if isinstance(heat, Tensor) else heat
    logp = (logits / heat).log_softmax(1)
    chosen = logp.gather(1, torch.where(there, batch.targets, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(1)
    out = policy_loss(chosen, batch, config, entropy=entropy, **options(case, config, batch))
    (out.loss * case.grad).backward()  # type: ignore[no-untyped-call]
    return Result(out, [gradient(leaf) for leaf in leaves])


def gradient(leaf: Tensor) -> Tensor:
    """Of a leaf."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def same(mine: Result, other: Result) -> None:
    """Loss, metrics, sums and gradients of two are the same bits."""
    for name, value in mine.all.items():
        assert torch.equal(value, other.all[name]), f"{name} differs by {(value - other.all[name]).abs().max()}"


def close(mine: Result, other: Result) -> None:
    """The same bits but for gradients, which may be a rounding apart: of a denominator, or of its dtype."""
    for name in ("loss", "metrics", "sums"):
        assert torch.equal(mine.all[name], other.all[name]), name
    for a, b in zip(mine.grads, other.grads, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert (a - b).abs().max() <= 4 * eps * max(float(b.abs().max()), 1e-30) if b.numel() else True


def near(mine: Result, other: Result) -> None:
    """Equal but for the order of sums, of products whose sizes differ."""
    for name, value in mine.all.items():
        torch.testing.assert_close(value, other.all[name], rtol=1e-5, atol=1e-6)


def rounded(normalize: Normalize) -> Callable[[Result, Result], None]:
    """How equal the two ways are with a denominator."""
    return same if normalize in ("token", "constant") else close


@contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    """What is done raises this, with this text."""
    said = ""
    try:
        yield
    except kind as error:
        said = str(error)
    assert text in said, f"expected {kind.__name__} with {text!r}, got {said!r}"


# --- the checks ------------------------------------------------------------------------------------------------------


@named
def like_two_calls(device: torch.device) -> None:
    """Every loss and denominator, the bits of the two calls."""
    for config in CONFIGS[1:2] if SLOW else CONFIGS:
        for normalize in NORMALIZE[2:3] if SLOW else NORMALIZE:
            asked = replace(config, normalize=normalize)
            for given in GIVEN[:1] if SLOW else GIVEN:
                case = Case(**given)
                rounded(normalize)(one_pass(case, asked, device), two_calls(case, asked, device))


@named
def sequences(device: torch.device) -> None:
    """Losses whose ratio or weight is the sample's."""
    for config in SEQUENCES[:1] if SLOW else SEQUENCES:
        for known in (0,) if SLOW else (None, 0):
            case = Case(known=known)
            same(one_pass(case, config, device), two_calls(case, config, device))


@named
def float64(device: torch.device) -> None:
    """No worse than plain torch of all logits at the same dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        for config in CONFIGS[2:3] if SLOW else CONFIGS:
            case = Case(dtype=dtype, lengths=(40, 7), vocab=130, dim=24, chunk=20)
            mine = one_pass(case, config, device)
            gold, usual = (plain(case, config, device, kind) for kind in (torch.float64, dtype))
            for name in mine.all:
                if name != "metrics":  # whose largest is a maximum of roundings
                    no_worse(name, mine.all[name], usual.all[name], gold.all[name], dtype)


@named
def counts(device: torch.device) -> None:
    """What the host knows of the number of trained tokens changes nothing, if it is enough."""
    for config in (CONFIGS[1], replace(CONFIGS[1], normalize="sequence"), SEQUENCES[0])[: 1 if SLOW else 3]:
        known = one_pass(Case(known=0), config, device)
        same(one_pass(Case(known=None), config, device), known)
        for more in (2,) if SLOW else (1, 2, 10**6):
            near(one_pass(Case(known=more), config, device), known)


@named
def too_few(device: torch.device) -> None:
    """A number that is too low makes NaN where nothing may wait, and is refused where it may."""
    if device.type == "cpu":
        with refused(ValueError, "expected batch.num_trained of at least"):
            one_pass(Case(known=-1), CONFIGS[0], device)
    else:
        assert one_pass(Case(known=-1), CONFIGS[0], device).out.loss.isnan()


@named
def nothing(device: torch.device) -> None:
    """No tokens, no samples, none trained: 0 everywhere."""
    for given in ({"lengths": (), "padding": 0}, {"lengths": (0,), "padding": 4}, {"trained": 0.0}):
        for config in CONFIGS[:1] if SLOW else (*CONFIGS, *SEQUENCES):
            for known in (3,) if SLOW else (0, None, 3):
                for normalize in NORMALIZE[:1] if SLOW else NORMALIZE:
                    found = one_pass(Case(known=known, **given), replace(config, normalize=normalize), device)
                    assert not any(value.any() for value in found.all.values())


@named
def denominators(device: torch.device) -> None:
    """A denominator that is given, and a gradient that comes in."""
    for normalize in NORMALIZE[:1] if SLOW else NORMALIZE:
        config = replace(CONFIGS[1], normalize=normalize)
        for case in (Case(divisor=11.0), Case(divisor=3.0, grad=-2.0)):
            rounded(normalize)(one_pass(case, config, device), two_calls(case, config, device))


@named
def heads(device: torch.device) -> None:
    """Padded vocabularies, products that do not depend on the batch, chunks of any size."""
    sizes = ({"chunk": 1000}, {"chunk": 1}, {"chunk": None})[: 1 if SLOW else 3]
    for given in ({"bound": 30}, {"mode": "invariant"}, *sizes):
        case = Case(**given)
        same(one_pass(case, CONFIGS[1], device), two_calls(case, CONFIGS[1], device))


@named
def given_once(device: torch.device) -> None:
    """The gradients are given away once, and the loss says so."""
    batch = Case().batch(device)
    hidden, weight, _ = Case().tensors(batch)
    out = from_hidden(hidden, weight, batch, CONFIGS[0], temperature=Case().temperature(batch))
    out.loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with refused(RuntimeError, "expected one backward"):
        out.backward()
