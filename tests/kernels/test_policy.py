"""The policy loss against a loop over tokens in Python floats: loss, gradient and every metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels import launch, reference
from pacenote.kernels.policy import PolicyConfig, policy_loss

NAN, INF, BOUND = float("nan"), float("inf"), 20.0
CASES = settings(
    max_examples=20 if launch.INTERPRETED else 200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
PLAIN = PolicyConfig(tis_cap=None)


@dataclass(frozen=True, slots=True)
class Batch:
    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    segment_ids: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class Token:
    """Everything about a position; `sample` is -1 in padding."""

    sample: int
    trained: bool
    policy: float = -1.0
    old: float = -1.0
    rollout: float = -1.0
    advantage: float = 1.0
    entropy: float = 0.0
    other: float = -1.0


# --- the loop --------------------------------------------------------------------------------------------------------


def bounded(x: float) -> float:
    return math.exp(max(-BOUND, min(BOUND, x)))


def one(token: Token, config: PolicyConfig) -> dict[str, float]:
    """A trained token's loss, its slope in the policy's logprob, and what the metrics count."""
    x, a = token.policy - token.old, token.advantage
    r = bounded(x)
    moves = -BOUND <= x <= BOUND  # beyond, the ratio is a constant
    low, high = 1 - config.clip_low, 1 + config.clip_high
    surrogate, slope, clipped, dual = -r * a, -r * a * moves, 0.0, 0.0
    if (a > 0 and r > high) or (a < 0 and r < low):
        surrogate, slope, clipped = -(high if a > 0 else low) * a, 0.0, 1.0
    if config.dual_clip is not None and a < 0 and surrogate > -config.dual_clip * a:
        surrogate, slope, clipped, dual = -config.dual_clip * a, 0.0, 0.0, 1.0
    raw = bounded(token.old - token.rollout)
    weight, truncated, outside = 1.0, 0.0, 0.0
    if config.tis_cap is not None or config.icepop is not None:
        weight = raw
    if config.tis_cap is not None and raw > config.tis_cap:
        weight, truncated = config.tis_cap, 1.0
    if config.icepop is not None and not config.icepop[0] <= raw <= config.icepop[1]:
        weight, outside = 0.0, 1.0
    d = token.policy - token.other
    if config.kl_type == "k1":
        away, away_slope = d, 1.0
    elif config.kl_type == "k2":
        away, away_slope = d * d / 2, d
    else:
        b = max(d, -BOUND)
        away, away_slope = math.expm1(-b) + b, (1 - math.exp(-b)) * (d >= -BOUND)
    back = max(-x, -BOUND)
    return {
        "value": weight * surrogate + config.kl_coef * away - config.entropy_coef * token.entropy,
        "slope": weight * slope + config.kl_coef * away_slope,
        "ratio": r,
        "clip_fraction": clipped,
        "dual_clip_fraction": dual,
        "tis_mean": weight,
        "tis_truncated": truncated,
        "icepop_masked": outside,
        "kl_old_k1": -x,
        "kl_old_k3": math.expm1(-back) + back,
        "kl_reference": away,
        "entropy": token.entropy,
    }


def naive(tokens: Sequence[Token], config: PolicyConfig, denominator: float | None) -> tuple[Any, ...]:
    """Loss, its slopes in logprob and entropy, metrics."""
    terms = {i: one(token, config) for i, token in enumerate(tokens) if token.trained}
    by_sample: dict[int, list[int]] = {}
    for i in terms:
        by_sample.setdefault(tokens[i].sample, []).append(i)
    share = dict.fromkeys(terms, 1.0)
    if config.normalize == "sequence":
        share = {i: 1 / len(members) for members in by_sample.values() for i in members}
    count = len(by_sample) if config.normalize == "sequence" else len(terms)
    divisor = max(count, 1) if denominator is None else denominator
    loss = sum(share[i] * term["value"] for i, term in terms.items()) / divisor
    slopes = [share[i] * terms[i]["slope"] / divisor if i in terms else 0.0 for i in range(len(tokens))]
    bonus = [-share[i] * config.entropy_coef / divisor if i in terms else 0.0 for i in range(len(tokens))]
    names = one(Token(0, True), config).keys() - {"value", "slope", "ratio"}
    mean = {name: sum(t[name] for t in terms.values()) / max(len(terms), 1) for name in names}
    ratios = [t["ratio"] for t in terms.values()]
    metrics = {
        **mean,
        "loss": loss,
        "ratio_mean": sum(ratios) / max(len(terms), 1),
        "ratio_max": max(ratios, default=0.0),
        "tokens": len(terms),
        "samples": len(by_sample),
    }
    return loss, slopes, bonus, metrics


def run(
    tokens: Sequence[Token],
    config: PolicyConfig,
    device: torch.device,
    *,
    samples: int | None = None,
    dtype: torch.dtype = torch.float64,
    given_old: bool = True,
    denominator: Any = None,
    poison: float = NAN,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradients in logprob and entropy, metrics; `poison` stands wherever nothing is trained."""

    def column(name: str, kind: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([getattr(t, name) if t.trained else poison for t in tokens], dtype=kind, device=device)

    batch = Batch(
        loss_mask=torch.tensor([t.trained for t in tokens], dtype=torch.bool, device=device),
        logprobs=column("rollout"),
        old_logprobs=column("old") if given_old else None,
        advantages=column("advantage"),
        segment_ids=torch.tensor([t.sample for t in tokens], dtype=torch.int32, device=device),
        num_samples=max((t.sample for t in tokens), default=-1) + 1 if samples is None else samples,
    )
    logprob, entropy = column("policy", dtype).requires_grad_(), column("entropy").requires_grad_()
    out = policy_loss(logprob, batch, config, entropy=entropy, reference=column("other"), denominator=denominator)
    assert out.loss.ndim == 0
    assert all(m.ndim == 0 and not m.requires_grad and m.device == out.loss.device for m in out.metrics.values())
    out.backward()
    assert logprob.grad is not None
    return (
        out.loss.detach(),
        logprob.grad,
        torch.zeros_like(entropy) if entropy.grad is None else entropy.grad,
        out.metrics,
    )


@st.composite
def configs(draw: st.DrawFn) -> PolicyConfig:
    return PolicyConfig(
        clip_low=draw(st.sampled_from((0.0, 0.2, 1.0))),
        clip_high=draw(st.sampled_from((0.0, 0.28))),
        dual_clip=draw(st.sampled_from((None, 1.5, 3.0))),
        tis_cap=draw(st.sampled_from((None, 0.9, 2.0))),
        icepop=draw(st.sampled_from((None, (0.5, 1.5), (0.0, 1.0), (1.0, INF)))),
        kl_coef=draw(st.sampled_from((0.0, 0.3))),
        kl_type=draw(st.sampled_from(("k1", "k2", "k3"))),
        entropy_coef=draw(st.sampled_from((0.0, 0.02))),
        normalize=draw(st.sampled_from(("token", "sequence", "constant"))),
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Token]:
    """0 to 4 samples of 0 to 5 tokens, then padding; differences small, zero, or far beyond the bound."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rate = draw(st.sampled_from((0.0, 0.5, 1.0)))

    def drift() -> float:
        return float(rng.choice([0.0, 0.0, 30.0, -30.0])) if rng.random() < 0.15 else float(rng.normal() * 0.4)

    tokens = []
    for sample in range(draw(st.integers(0, 4))):
        for _ in range(draw(st.integers(0, 5))):
            old = -float(rng.random() * 3)
            policy, rollout = old + drift(), old + drift()
            advantage = float(rng.choice([0.0, rng.normal(), rng.normal()]))
            tokens.append(
                Token(
                    sample, bool(rng.random() < rate), policy, old, rollout, advantage, rng.random(), policy + drift()
                )
            )
    return tokens + [Token(-1, False)] * draw(st.integers(0, 2))


# --- against it ------------------------------------------------------------------------------------------------------


@CASES
@given(tokens=batches(), config=configs(), divisor=st.none() | st.just(7.5), spare=st.integers(0, 1))
def test_loss_gradient_and_metrics(
    tokens: list[Token], config: PolicyConfig, divisor: float | None, spare: int, device: torch.device
) -> None:
    divisor = 7.5 if config.normalize == "constant" else divisor
    samples = max((t.sample for t in tokens), default=-1) + 1 + spare
    loss, grad, bonus, metrics = run(tokens, config, device, denominator=divisor, samples=samples)
    wanted, slopes, wanted_bonus, wanted_metrics = naive(tokens, config, divisor)
    assert float(loss) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    assert bonus.tolist() == pytest.approx(wanted_bonus, rel=1e-9, abs=1e-12)
    assert not grad[[i for i, t in enumerate(tokens) if not t.trained]].any()
    assert set(metrics) == set(wanted_metrics)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(wanted_metrics[name], rel=1e-9, abs=1e-12), name
    for poison in (INF, -INF, 0.0):
        again = run(tokens, config, device, denominator=divisor, samples=samples, poison=poison)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], grad)
        assert all(torch.equal(again[3][name], metrics[name]) for name in metrics)


@CASES
@given(tokens=batches(), config=configs())
def test_microbatches_add_up(tokens: list[Token], config: PolicyConfig, device: torch.device) -> None:
    """Under one denominator, the whole's: losses and gradients of any two halves are the whole's."""
    trained = [t for t in tokens if t.trained]
    count = len({t.sample for t in trained}) if config.normalize == "sequence" else len(trained)
    divisor = 12.0 if config.normalize == "constant" else float(max(count, 1))
    whole = run(tokens, config, device, denominator=torch.tensor(divisor, device=device))
    if config.normalize != "constant":
        assert torch.equal(run(tokens, config, device)[0], whole[0])
    cut = max((t.sample for t in tokens), default=0) // 2
    first = [t for t in tokens if 0 <= t.sample <= cut]
    second = [replace(t, sample=t.sample - cut - 1) if t.sample >= 0 else t for t in tokens[len(first) :]]
    parts = [run(part, config, device, denominator=divisor) for part in (first, second)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradcheck(normalize: Any, kl_type: Any, device: torch.device) -> None:
    config = PolicyConfig(
        dual_clip=1.5, icepop=(0.5, 2.5), kl_coef=0.4, kl_type=kl_type, entropy_coef=0.1, normalize=normalize
    )
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6, 12, generator=generator, dtype=torch.float64).to(device) * 0.6
    mask = torch.ones(12, dtype=torch.bool, device=device)
    mask[3:5] = False
    segments = torch.tensor([0] * 5 + [2] * 5 + [-1] * 2, dtype=torch.int32, device=device)
    batch = Batch(mask & (segments >= 0), values[0], values[1], values[2], segments, 3)
    divisor = 5.0 if normalize == "constant" else None

    def loss(logprob: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(logprob, batch, config, entropy=entropy, reference=values[3], denominator=divisor).loss

    assert torch.autograd.gradcheck(loss, (values[4].clone().requires_grad_(), values[5].clone().requires_grad_()))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_equality_is_not_a_clip(device: torch.device) -> None:
    """Nor a dual clip, nor a truncation."""
    for x, a in ((0.25, 1.0), (-0.25, -1.0)):
        ratio = math.exp(x)
        edges: dict[str, Any] = {"clip_high": ratio - 1} if x > 0 else {"clip_low": 1 - ratio}
        for shift, clips in ((0.0, 0.0), (1e-9, 1.0)):
            token = Token(0, True, policy=x + math.copysign(shift, x), old=0.0, advantage=a)
            _, grad, _, metrics = run([token], PolicyConfig(tis_cap=None, **edges), device)
            assert float(metrics["clip_fraction"]) == clips
            assert float(grad) == pytest.approx(-ratio * a if not clips else 0.0)
    half = float(torch.tensor(0.5, dtype=torch.float64).exp())
    for shift, happens in ((0.0, 0.0), (1e-9, 1.0)):
        token = Token(0, True, policy=0.5 + shift, old=0.0, rollout=-0.5 - shift, advantage=-1.0)
        _, grad, _, metrics = run([token], PolicyConfig(dual_clip=half, tis_cap=half), device)
        assert float(metrics["dual_clip_fraction"]) == float(metrics["tis_truncated"]) == happens
        assert float(grad) == pytest.approx(0.0 if happens else half * half)


def test_the_clip_that_was_not_taken_is_not_counted(device: torch.device) -> None:
    """A ratio outside the band on the pessimistic side keeps its gradient."""
    tokens = [Token(0, True, 1.0, 0.0, 0.0, -1.0), Token(0, True, -1.0, 0.0, 0.0, 1.0), Token(0, True, 1.0, 0.0)]
    _, grad, _, metrics = run(tokens, PLAIN, device)
    assert float(metrics["clip_fraction"]) == pytest.approx(1 / 3)
    assert (grad != 0).tolist() == [True, True, False]


def test_band_edges_are_inside_and_weights_multiply(device: torch.device) -> None:
    low, high = (float(torch.tensor(x, dtype=torch.float64).exp()) for x in (-0.5, 0.5))
    config = PolicyConfig(tis_cap=None, icepop=(low, high))
    tokens = [Token(0, True, 0.0, 0.0, -x, 1.0) for x in (-0.5, 0.5, -0.5 - 1e-12, 0.5 + 1e-12, 0.0)]
    _, grad, _, metrics = run(tokens, config, device)
    assert grad.tolist() == pytest.approx([-low / 5, -high / 5, 0.0, 0.0, -1 / 5])
    assert float(metrics["icepop_masked"]) == pytest.approx(2 / 5)
    both = PolicyConfig(tis_cap=1.2, icepop=(0.5, 2.0))  # truncated weights stay inside, the band looks at raw ones
    _, grad, _, metrics = run([Token(0, True, 0.0, 0.0, -x, 1.0) for x in (0.5, 1.0)], both, device)
    assert grad.tolist() == pytest.approx([-1.2 / 2, 0.0])
    assert float(metrics["tis_truncated"]) == 1.0


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig(kl_coef=1.0), PLAIN, PolicyConfig(dual_clip=3.0)])
@pytest.mark.parametrize("far", [30.0, 500.0, 1e30, INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_far_apart_stays_finite(config: PolicyConfig, far: float, dtype: torch.dtype, device: torch.device) -> None:
    """And no estimate of a KL pushes the policy away from the reference that it already left."""
    tokens = [
        Token(0, True, policy, old, rollout, advantage, 0.0, -1.0)
        for policy, old, rollout in (
            (-far, -1.0, -1.0),
            (-1.0, -1.0, -far),
            (-1.0, -far if far < INF else -500.0, -1.0),
        )
        for advantage in (1.0, -1.0)
    ]
    if dtype == torch.float16:
        tokens = [replace(t, policy=max(t.policy, -6e4)) for t in tokens]
    loss, grad, _, metrics = run(tokens, config, device, dtype=dtype)
    assert all(x.isfinite().all() for x in (loss, grad, metrics["ratio_max"], metrics["tis_mean"]))
    assert (grad[:2] <= 0).all()


def test_k3_is_never_negative_and_keeps_small_values(device: torch.device) -> None:
    """exp(-d) - 1 + d cancels: at d = 1e-4, float32 would leave noise ten times the value, of either sign."""
    d = torch.logspace(-6, 0, 200, device=device)
    for sign in (1, -1):
        got = reference.kl(sign * d, torch.zeros_like(d), "k3")
        exact = torch.expm1(-sign * d.double()) + sign * d.double()
        assert (got >= 0).all()
        assert (got - exact).abs().max() <= 1e-7
        assert ((got - exact).abs() <= 1e-7 * d).all()


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("tokens", [[], [Token(0, False)], [Token(0, False), Token(1, False), Token(-1, False)]])
def test_nothing_trained(tokens: list[Token], normalize: Any, device: torch.device) -> None:
    config = PolicyConfig(normalize=normalize, kl_coef=0.1, entropy_coef=0.1, icepop=(0.5, 2.0))
    for divisor in (None, 3.0):
        loss, grad, bonus, metrics = run(tokens, config, device, denominator=divisor)
        assert float(loss) == 0.0
        assert not grad.any()
        assert not bonus.any()
        assert not any(float(value) for value in metrics.values())


def test_without_old_logprobs_the_policy_is_its_own_old(device: torch.device) -> None:
    """The ratio is 1 with a slope; importance weights exp(policy - rollout) have none."""
    tokens = [Token(0, True, -1.0, NAN, -1.3, 2.0), Token(0, True, -2.0, NAN, -1.5, -1.0)]
    for cap, weight in ((2.0, math.exp(0.3)), (1.1, 1.1)):
        _, grad, _, metrics = run(tokens, PolicyConfig(tis_cap=cap), device, given_old=False)
        assert grad.tolist() == pytest.approx([-weight * 2 / 2, math.exp(-0.5) / 2])
    assert float(metrics["ratio_mean"]) == float(metrics["ratio_max"]) == 1.0
    assert float(metrics["kl_old_k1"]) == float(metrics["clip_fraction"]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logprobs_are_widened_and_nothing_else_is_narrowed(dtype: torch.dtype, device: torch.device) -> None:
    """600 tokens of a sample: counts, advantages and older logprobs do not fit into 8 bits of mantissa."""
    rng = np.random.default_rng(0)
    narrow = torch.tensor(-rng.random(600) * 2, dtype=dtype).tolist()
    tokens = [Token(0, True, p, p + float(rng.normal() * 0.05), p, 1.0 + float(rng.normal() * 1e-3)) for p in narrow]
    for normalize in ("token", "sequence"):
        config = replace(PolicyConfig(), normalize=normalize)
        wanted, slopes, _, wanted_metrics = naive(tokens, config, None)
        loss, grad, _, metrics = run(tokens, config, device, dtype=dtype)
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(wanted, rel=1e-5)
        assert grad.dtype == dtype
        assert grad.tolist() == pytest.approx(slopes, rel=torch.finfo(dtype).eps, abs=1e-6)
        for name in ("ratio_mean", "kl_old_k1", "tis_mean"):
            assert float(metrics[name]) == pytest.approx(wanted_metrics[name], rel=1e-4, abs=1e-6)


def test_a_packed_batch_is_a_policy_batch(device: torch.device) -> None:
    from pacenote.kernels.pack import pack

    class Sample:
        tokens, experts = np.arange(4, dtype=np.int32), None
        loss_mask = np.array([0, 0, 1, 1], np.uint8)
        logprobs = np.array([NAN, NAN, -1.0, -2.0], np.float32)
        provenance, version = np.zeros(3, np.uint8), np.zeros(4, np.int32)

    batch = pack(
        [Sample(), Sample()], advantages=[1.0, np.array([NAN, NAN, 3.0, -2.0])], device=device, pad_to_multiple=4
    )
    logprob = torch.where(batch.loss_mask, batch.logprobs, NAN).requires_grad_()
    out = policy_loss(logprob, batch, PolicyConfig(normalize="sequence"))
    out.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [0.0, -0.25, -0.25, 0.0, -0.75, 0.5, 0.0, 0.0]
    assert out.metrics["samples"] == 2
