"""The policy loss against a loop over tokens in Python floats: loss, gradient, every metric, sums by sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels import launch, reference_policy
from pacenote.kernels.policy import PolicyConfig, group_tokens, policy_loss
from pacenote.kernels.policy_config import Algorithm, Level
from tests.kernels.policy_oracle import INF, NAN, Batch, Token, count_samples, naive, run

pytestmark = pytest.mark.usefixtures("poisoned")
CASES = settings(
    max_examples=20 if launch.INTERPRETED else 200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PLAIN = PolicyConfig(tis_cap=None)


@st.composite
def configs(draw: st.DrawFn) -> PolicyConfig:
    algorithm: Algorithm = draw(st.sampled_from(("ppo", "ppo", "cispo", "reinforce")))
    cap = draw(st.sampled_from((None, 0.9, 2.0, INF)))
    band = st.sampled_from((None, (0.5, 1.5), (0.0, 1.0), (1.0, INF)))
    level: st.SearchStrategy[Level] = st.sampled_from(("token", "sequence", "geometric"))
    return PolicyConfig(
        algorithm=algorithm,
        ratio="token" if algorithm == "reinforce" else draw(st.sampled_from(("token", "sequence", "sequence-token"))),
        clip_low=draw(st.sampled_from((0.0, 0.2, 1.0))),
        clip_high=draw(st.sampled_from((0.0, 0.28, INF))),
        dual_clip=draw(st.sampled_from((None, 1.5, 3.0))) if algorithm == "ppo" else None,
        tis_cap=cap,
        tis_level=draw(level) if cap is not None else "token",
        icepop=draw(band),
        mis=draw(band),
        mis_level=draw(level),
        kl_coef=draw(st.sampled_from((0.0, 0.3))),
        kl_type=draw(st.sampled_from(("k1", "k2", "k3"))),
        kl_unbiased=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from((0.0, 0.02))),
        normalize=draw(st.sampled_from(("token", "sequence", "group", "constant"))),
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


def grouped(tokens: list[Token], samples: int) -> tuple[list[int], Tensor]:
    """Groups of every other sample, and their trained tokens [S]."""
    groups = [s % 2 for s in range(samples)]
    sizes = [sum(t.trained and groups[t.sample] == g for t in tokens) for g in groups]
    return groups, torch.tensor(sizes, dtype=torch.int64)


@CASES
@given(tokens=batches(), config=configs(), divisor=st.none() | st.just(7.5), spare=st.integers(0, 1))
def test_everything(
    tokens: list[Token], config: PolicyConfig, divisor: float | None, spare: int, device: torch.device
) -> None:
    divisor = 7.5 if config.normalize == "constant" else divisor
    samples = count_samples(tokens) + spare
    groups, sizes = grouped(tokens, samples)
    said: dict[str, Any] = {"denominator": divisor, "samples": samples, "group_tokens": sizes.to(device)}
    got = run(tokens, config, device, **said)
    loss, slopes, bonus, metrics, sums = naive(tokens, config, divisor, samples=samples, groups=groups)
    assert float(got.loss) == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert got.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    assert got.bonus.tolist() == pytest.approx(bonus, rel=1e-9, abs=1e-12)
    assert not got.grad[[i for i, t in enumerate(tokens) if not t.trained]].any()
    assert set(got.metrics) == set(metrics)
    for name, value in got.metrics.items():
        assert float(value) == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
    assert set(got.sums) == set(sums)
    for name, values in got.sums.items():
        assert values.tolist() == pytest.approx(sums[name], rel=1e-9, abs=1e-12), name
    for poison in (INF, -INF, 0.0):
        again = run(tokens, config, device, poison=poison, **said)
        assert torch.equal(again.loss, got.loss)
        assert torch.equal(again.grad, got.grad)
        assert all(torch.equal(again.metrics[name], got.metrics[name]) for name in got.metrics)


@CASES
@given(tokens=batches(), config=configs())
def test_microbatches_add_up(tokens: list[Token], config: PolicyConfig, device: torch.device) -> None:
    """Under one denominator, the whole's: losses and gradients of any two halves are the whole's."""
    trained = [t for t in tokens if t.trained]
    groups, sizes = grouped(tokens, count_samples(tokens))
    counts = {
        "sequence": len({t.sample for t in trained}),
        "group": len({groups[t.sample] for t in trained}),
        "constant": 12,
    }
    divisor = float(max(counts.get(config.normalize, len(trained)), 1))
    sizes = sizes.to(device)
    whole = run(tokens, config, device, denominator=torch.tensor(divisor, device=device), group_tokens=sizes)
    if config.normalize != "constant":
        own = run(tokens, config, device, group_tokens=sizes).loss
        torch.testing.assert_close(own, whole.loss, rtol=1e-12, atol=1e-12)
    cut = max((t.sample for t in tokens), default=0) // 2
    first = [t for t in tokens if 0 <= t.sample <= cut]
    second = [replace(t, sample=t.sample - cut - 1) if t.sample >= 0 else t for t in tokens[len(first) :]]
    parts = [
        run(part, config, device, denominator=divisor, group_tokens=size, samples=len(size))
        for part, size in ((first, sizes[: cut + 1]), (second, sizes[cut + 1 :]))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([parts[0].grad, parts[1].grad]), whole.grad, rtol=1e-12, atol=1e-12)


KINDS: dict[str, dict[str, Any]] = {
    "ppo": {"dual_clip": 1.5},
    "gspo": {"ratio": "sequence", "dual_clip": 1.5},
    "gspo of sample weights": {"ratio": "sequence", "tis_level": "geometric", "mis": (0.1, 9.0)},
    "unbiased": {"kl_unbiased": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["token", "sequence", "group", "constant"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradcheck(normalize: Any, kl_type: Any, kind: str, device: torch.device) -> None:
    """Where the loss is one that has its gradient: neither a stopped ratio (cispo) nor a borrowed one (GSPO-token)."""
    terms = {"icepop": (0.5, 2.5), "kl_coef": 0.4, "kl_type": kl_type, "entropy_coef": 0.1, "normalize": normalize}
    config = PolicyConfig(**{**terms, **KINDS[kind]})
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6, 12, generator=generator, dtype=torch.float64).to(device) * 0.6
    mask = torch.ones(12, dtype=torch.bool, device=device)
    mask[3:5] = False
    segments = torch.tensor([0] * 5 + [2] * 5 + [-1] * 2, dtype=torch.int32, device=device)
    batch = Batch(mask & (segments >= 0), values[0], values[1], values[2], segments, 3)
    divisor = 5.0 if normalize == "constant" else None
    sizes = group_tokens(batch, torch.tensor([0, 1, 0], device=device))

    def loss(logprob: Tensor, entropy: Tensor) -> Tensor:
        given: dict[str, Any] = {"denominator": divisor, "group_tokens": sizes}
        return policy_loss(logprob, batch, config, entropy=entropy, reference=values[3], **given).loss

    assert torch.autograd.gradcheck(loss, (values[4].clone().requires_grad_(), values[5].clone().requires_grad_()))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_equality_is_not_a_clip(device: torch.device) -> None:
    """Nor a dual clip, nor a truncation."""
    for x, a in ((0.25, 1.0), (-0.25, -1.0)):
        ratio = math.exp(x)
        edges: dict[str, Any] = {"clip_high": ratio - 1} if x > 0 else {"clip_low": 1 - ratio}
        for shift, clips in ((0.0, 0.0), (1e-9, 1.0)):
            token = Token(0, True, policy=x + math.copysign(shift, x), old=0.0, advantage=a)
            got = run([token], PolicyConfig(tis_cap=None, **edges), device)
            assert float(got.metrics["clip_fraction"]) == clips
            assert float(got.grad) == pytest.approx(-ratio * a if not clips else 0.0)
    half = float(torch.tensor(0.5, dtype=torch.float64).exp())
    for shift, happens in ((0.0, 0.0), (1e-9, 1.0)):
        token = Token(0, True, policy=0.5 + shift, old=0.0, rollout=-0.5 - shift, advantage=-1.0)
        got = run([token], PolicyConfig(dual_clip=half, tis_cap=half), device)
        assert float(got.metrics["dual_clip_fraction"]) == float(got.metrics["tis_truncated"]) == happens
        assert float(got.grad) == pytest.approx(0.0 if happens else half * half)


def test_the_clip_that_was_not_taken_is_not_counted(device: torch.device) -> None:
    """A ratio outside the band on the pessimistic side keeps its gradient."""
    tokens = [Token(0, True, 1.0, 0.0, 0.0, -1.0), Token(0, True, -1.0, 0.0, 0.0, 1.0), Token(0, True, 1.0, 0.0)]
    got = run(tokens, PLAIN, device)
    assert float(got.metrics["clip_fraction"]) == pytest.approx(1 / 3)
    assert (got.grad != 0).tolist() == [True, True, False]


def test_band_edges_are_inside_and_weights_multiply(device: torch.device) -> None:
    low, high = (float(torch.tensor(x, dtype=torch.float64).exp()) for x in (-0.5, 0.5))
    config = PolicyConfig(tis_cap=None, icepop=(low, high))
    tokens = [Token(0, True, 0.0, 0.0, -x, 1.0) for x in (-0.5, 0.5, -0.5 - 1e-12, 0.5 + 1e-12, 0.0)]
    got = run(tokens, config, device)
    assert got.grad.tolist() == pytest.approx([-low / 5, -high / 5, 0.0, 0.0, -1 / 5])
    assert float(got.metrics["icepop_masked"]) == pytest.approx(2 / 5)
    both = PolicyConfig(tis_cap=1.2, icepop=(0.5, 2.0))  # truncated weights stay inside, the band looks at raw ones
    got = run([Token(0, True, 0.0, 0.0, -x, 1.0) for x in (0.5, 1.0)], both, device)
    assert got.grad.tolist() == pytest.approx([-1.2 / 2, 0.0])
    assert float(got.metrics["tis_truncated"]) == 1.0


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
    got = run(tokens, config, device, dtype=dtype)
    assert all(x.isfinite().all() for x in (got.loss, got.grad, got.metrics["ratio_max"], got.metrics["tis_mean"]))
    assert (got.grad[:2] <= 0).all()


def test_k3_is_never_negative_and_keeps_small_values(device: torch.device) -> None:
    """exp(-d) - 1 + d cancels: at d = 1e-4, float32 would leave noise ten times the value, of either sign."""
    d = torch.logspace(-6, 0, 200, device=device)
    for sign in (1, -1):
        got = reference_policy.kl(sign * d, torch.zeros_like(d), "k3")
        exact = torch.expm1(-sign * d.double()) + sign * d.double()
        assert (got >= 0).all()
        assert (got - exact).abs().max() <= 1e-7
        assert ((got - exact).abs() <= 1e-7 * d).all()


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("tokens", [[], [Token(0, False)], [Token(0, False), Token(1, False), Token(-1, False)]])
def test_nothing_trained(tokens: list[Token], normalize: Any, device: torch.device) -> None:
    config = PolicyConfig(normalize=normalize, kl_coef=0.1, entropy_coef=0.1, icepop=(0.5, 2.0))
    for divisor in (None, 3.0):
        got = run(tokens, config, device, denominator=divisor)
        assert float(got.loss) == 0.0
        assert not got.grad.any()
        assert not got.bonus.any()
        assert not any(float(value) for value in got.metrics.values())


def test_without_old_logprobs_the_policy_is_its_own_old(device: torch.device) -> None:
    """The ratio is 1 with a slope; importance weights exp(policy - rollout) have none."""
    tokens = [Token(0, True, -1.0, NAN, -1.3, 2.0), Token(0, True, -2.0, NAN, -1.5, -1.0)]
    for cap, weight in ((2.0, math.exp(0.3)), (1.1, 1.1)):
        got = run(tokens, PolicyConfig(tis_cap=cap), device, given_old=False)
        assert got.grad.tolist() == pytest.approx([-weight * 2 / 2, math.exp(-0.5) / 2])
    assert float(got.metrics["ratio_mean"]) == float(got.metrics["ratio_max"]) == 1.0
    assert float(got.metrics["kl_old_k1"]) == float(got.metrics["clip_fraction"]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logprobs_are_widened_and_nothing_else_is_narrowed(dtype: torch.dtype, device: torch.device) -> None:
    """600 tokens of a sample: counts, advantages and older logprobs do not fit into 8 bits of mantissa."""
    rng = np.random.default_rng(0)
    narrow = torch.tensor(-rng.random(600) * 2, dtype=dtype).tolist()
    tokens = [Token(0, True, p, p + float(rng.normal() * 0.05), p, 1.0 + float(rng.normal() * 1e-3)) for p in narrow]
    for normalize in ("token", "sequence"):
        config = replace(PolicyConfig(), normalize=normalize)
        wanted, slopes, _, wanted_metrics, _ = naive(tokens, config, None)
        got = run(tokens, config, device, dtype=dtype)
        assert got.loss.dtype == torch.float32
        assert float(got.loss) == pytest.approx(wanted, rel=1e-5)
        assert got.grad.dtype == dtype
        assert got.grad.tolist() == pytest.approx(slopes, rel=torch.finfo(dtype).eps, abs=1e-6)
        for name in ("ratio_mean", "kl_old_k1", "tis_mean"):
            assert float(got.metrics[name]) == pytest.approx(wanted_metrics[name], rel=1e-4, abs=1e-6)


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
