"""Named checks of the policy loss, each a function of the device; see `mutants_policy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels import launch
from pacenote.kernels import reference_policy as plain
from pacenote.kernels.policy import METRICS, TERMS, PolicyConfig, group_tokens, policy_loss
from pacenote.kernels.policy_config import Estimator
from pacenote.kernels.reference import wide
from pacenote.kernels.reference_policy import PolicyInputs
from tests.kernels.policy_oracle import INF, NAN, Batch, Result, Token, apply, columns

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}
PPO = PolicyConfig(tis_cap=None)
GSPO = PolicyConfig(ratio="sequence", normalize="sequence", tis_cap=None)
BLOCK, ROWS, CHUNK = (128, 4, 2) if launch.INTERPRETED else (512, 32, 32)
"""Positions, samples and runs that a program of the kernels takes at a time."""


def named(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


# --- against float64 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """Random samples of these lengths, and how they are given to the op."""

    lengths: tuple[int, ...] = (7, 1, 0, 12, 3)
    padding: int = 2
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int32
    trained: float = 0.8
    drift: float = 0.4
    far: float = 0.1
    old: bool = True
    reference: bool = True
    divisor: float | None = None
    grad: float = 1.0
    seed: int = 0

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Batch]:
        """What `make` gives, moved."""
        logprob, entropy, reference, batch = self.make()
        return logprob.to(device), entropy.to(device), reference.to(device), on(batch, device)

    def make(self) -> tuple[Tensor, Tensor, Tensor, Batch]:
        """logprob, entropy, reference [T] and the batch, on the CPU; NaN stands where nothing is trained.

        Logprobs differ by some `drift`, by nothing at all, or, of the share `far`, by more than exp may take. Older
        logprobs, advantages and reference are float32, as in a packed batch.
        """
        g = torch.Generator().manual_seed(self.seed)
        total = sum(self.lengths) + self.padding
        segments = torch.tensor([s for s, n in enumerate(self.lengths) for _ in range(n)] + [-1] * self.padding)

        def apart() -> Tensor:
            some = torch.randn(total, generator=g) * self.drift
            some = torch.where(torch.rand(total, generator=g) < 0.3, 0.0, some)
            beyond = torch.randn(total, generator=g).sign() * 30
            return torch.where(torch.rand(total, generator=g) < self.far, beyond, some)

        logprob = (-torch.rand(total, generator=g) * 3).to(self.dtype)
        old = logprob.float() + apart()
        rollout = old if self.old else logprob.float()
        mask = (torch.rand(total, generator=g) < self.trained) & (segments >= 0)
        values = [logprob, torch.rand(total, generator=g).to(self.dtype), logprob.float() + apart(), old]
        values += [rollout + apart(), torch.randn(total, generator=g)]
        policy, entropy, reference, old, rollout, advantages = (torch.where(mask, value, NAN) for value in values)
        batch = Batch(mask, rollout, old if self.old else None, advantages, segments.to(self.ids), len(self.lengths))
        return policy, entropy, reference, batch


def check(config: PolicyConfig, device: torch.device, **given: Any) -> Result:
    """Compare the op with its definition in float64 on a Case of these fields; gives what the op gave.

    The error is at most twice that of the definition in float32, plus one rounding of the terms' magnitude.

    Raises:
        AssertionError: they differ.
    """
    case = Case(**given)
    logprob, entropy, reference, batch = case.make()
    sizes = None
    if config.normalize == "group":
        sizes = group_tokens(batch, torch.arange(batch.num_samples) // 2) + 1
    return compare(case, config, device, logprob, entropy, reference if case.reference else None, batch, sizes)


def compare(
    case: Case,
    config: PolicyConfig,
    device: torch.device,
    logprob: Tensor,
    entropy: Tensor,
    reference: Tensor | None,
    batch: Batch,
    sizes: Tensor | None,
) -> Result:
    """The op on a device against the definition; see `check`."""
    moved = on(batch, device)
    given = {"denominator": case.divisor, "group_tokens": None if sizes is None else sizes.to(device)}
    other = None if reference is None else reference.to(device)
    got = apply(logprob.to(device), entropy.to(device), other, moved, config, grad=case.grad, **given)
    results = []
    for kind in (torch.float64, torch.float32):
        x = PolicyInputs(
            logprob.to(kind),
            None if batch.old_logprobs is None else batch.old_logprobs.to(kind),
            batch.logprobs.to(kind),
            batch.advantages.to(kind),
            batch.loss_mask,
            batch.segment_ids,
            batch.num_samples,
            entropy.to(kind),
            None if reference is None else reference.to(kind),
            sizes,
            case.divisor,
        )
        out = plain.policy_loss(x, config)
        coef = config.entropy_coef
        slopes = plain.policy_gradient(out.slopes, torch.tensor(case.grad), batch.loss_mask, batch.segment_ids, coef)
        sizes_of = plain._terms(x, config)[0].abs()
        results.append((out, slopes, sizes_of))
    (gold, gold_slopes, magnitude), (rough, rough_slopes, _) = results
    kind = wide(logprob).dtype
    near("loss", got.loss, rough.loss, gold.loss, kind, scale=float(gold.sums[1].abs().sum()))
    for name, mine, theirs, exact in zip(
        ("gradient", "entropy's gradient"), (got.grad, got.bonus), rough_slopes, gold_slopes, strict=True
    ):
        assert mine.dtype == logprob.dtype
        near(name, mine, theirs.to(mine.dtype), exact, mine.dtype)
        assert not mine[~batch.loss_mask.to(device)].any(), f"{name} where nothing is trained"
    for i, name in enumerate(TERMS):
        scale = float(magnitude[i].sum())
        near(f"sums of {name}", got.sums[name], rough.sums[i], gold.sums[i], kind, scale=scale)
    for i, name in enumerate(METRICS):
        scale = float(magnitude[i].sum() / gold.metrics[0].clamp(min=1)) if name in TERMS else 0.0
        near(name, got.metrics[name], rough.metrics[i], gold.metrics[i], kind, scale=scale)
    return got


def near(name: str, mine: Tensor, rough: Tensor, gold: Tensor, kind: torch.dtype, scale: Any = 0.0) -> None:
    """The error is at most twice that of plain torch, plus two roundings of the largest; of any shape."""
    assert mine.shape == gold.shape, name
    mine, rough, gold = mine.detach().cpu().double(), rough.double(), gold.double()
    if not mine.numel():
        return
    assert mine.isfinite().all(), f"{name} is {mine}"
    error, allowed = (mine - gold).abs().max(), 2 * (rough - gold).abs().max()
    allowed = allowed + 2 * torch.finfo(kind).eps * max(float(gold.abs().max()), float(scale))
    assert error <= allowed, f"error of {name} {float(error):.3g}, at most {float(allowed):.3g}"


def on(batch: Batch, device: torch.device) -> Batch:
    """A batch moved."""
    old = batch.old_logprobs
    return Batch(
        batch.loss_mask.to(device),
        batch.logprobs.to(device),
        None if old is None else old.to(device),
        batch.advantages.to(device),
        batch.segment_ids.to(device),
        batch.num_samples,
    )


@named
def clips(device: torch.device) -> None:
    """PPO and CISPO: advantages of both signs, ratios inside, outside and far outside; bounds that bind nothing."""
    check(replace(PPO, dual_clip=1.3), device, lengths=(60, 1, 7))
    check(replace(PPO, algorithm="cispo"), device, lengths=(60, 1, 7), far=0.0)
    check(replace(PPO, clip_low=1.0, clip_high=INF), device, lengths=(40,), far=0.0)


@named
def sequence_ratios(device: torch.device) -> None:
    """The geometric mean of a sample, with its own gradient and with the tokens'; of weights that differ."""
    check(PolicyConfig(ratio="sequence", dual_clip=1.3), device, lengths=(40, 1, 7), far=0.0)
    check(PolicyConfig(ratio="sequence-token", normalize="sequence"), device, lengths=(40, 1, 7), far=0.0)
    check(replace(PPO, algorithm="cispo", ratio="sequence"), device, far=0.0)


@named
def without_old(device: torch.device) -> None:
    """The policy is its own old one, of tokens and of samples; and REINFORCE, which asks for none."""
    check(PolicyConfig(), device, old=False)
    check(PolicyConfig(ratio="sequence"), device, old=False, far=0.0)
    check(PolicyConfig(algorithm="reinforce"), device)


@named
def importance_weights(device: torch.device) -> None:
    """Truncation, IcePop's band and masks together; masks of each level without weights."""
    check(PolicyConfig(tis_cap=1.2, icepop=(0.5, 2.0), mis=(0.9, 1.1)), device, far=0.05)
    for level in ("token", "sequence", "geometric"):
        config = PolicyConfig(tis_cap=1.1, tis_level=level, mis=(0.8, 1.2), mis_level=level)
        check(config, device, lengths=(9, 1, 3, 20), drift=0.2, far=0.0)


@named
def distances(device: torch.device) -> None:
    """Each KL, unbiased or not, small and far; in the metrics alone; and the bonus."""
    table: tuple[tuple[Estimator, bool, float], ...] = (
        ("k1", True, 0.5),
        ("k2", False, 0.5),
        ("k3", False, 0.001),
        ("k3", True, 2.0),
    )
    for kind, unbiased, drift in table:
        config = PolicyConfig(kl_coef=0.3, kl_type=kind, kl_unbiased=unbiased, entropy_coef=0.1)
        check(config, device, drift=drift, far=0.05, lengths=(30, 2))
    check(PolicyConfig(ratio="sequence", kl_coef=0.3), device, far=0.0)
    check(PolicyConfig(), device, reference=False)


@named
def normalisations(device: torch.device) -> None:
    """Each, with its own count or a denominator, of a token's and a sequence's ratio, and an upstream scale."""
    for normalize, ratio, divisor in (
        ("sequence", "token", None),
        ("group", "sequence", None),
        ("sequence", "sequence", 2.5),
        ("constant", "token", 7.5),
    ):
        config = PolicyConfig(normalize=normalize, ratio=ratio, entropy_coef=0.1)  # type: ignore[arg-type]
        check(config, device, lengths=(9, 0, 4, 1, 7), far=0.0, divisor=divisor, grad=-3.0)


@named
def runs(device: torch.device) -> None:
    """Samples that end at a block, begin there, or fill several; empty ones at any place; none of a token."""
    check(PPO, device, lengths=(1,), padding=0)
    check(PPO, device, lengths=(0, 3, 0, 0, 5, 0))
    check(PPO, device, lengths=(BLOCK - 1, 0, 1, BLOCK, 7), padding=3)
    check(PPO, device, lengths=(BLOCK + 1, 2 * BLOCK - 1, 1))


@named
def long_samples(device: torch.device) -> None:
    """One of more blocks than are added up at a time, beside short ones."""
    check(GSPO, device, lengths=(5, (CHUNK + 1) * BLOCK, 3), far=0.0, trained=0.9)


@named
def many_samples(device: torch.device) -> None:
    """More than are added up at a time."""
    got = check(replace(GSPO, kl_coef=0.1), device, lengths=(1,) * (ROWS + 3) + (40,), far=0.0, trained=1.0)
    assert float(got.metrics["samples"]) == ROWS + 4


@named
def many_runs(device: torch.device) -> None:
    """More than the largest and smallest ratios are looked for at a time: they stand at the ends."""
    count = ROWS * CHUNK + 2
    ones, ids = torch.ones(count, device=device), torch.arange(count, device=device)
    batch = Batch(ones > 0, -ones, -ones, ones, ids, count)
    said = policy_loss(-ones + torch.linspace(0.5, 1.5, count).log().to(device), batch, PPO).read()
    torch.testing.assert_close((said["ratio_min"], said["ratio_max"]), (0.5, 1.5))


@named
def nothing(device: torch.device) -> None:
    """No positions, no samples, padding alone, nothing trained: all is 0."""
    for config in (PPO, replace(GSPO, entropy_coef=0.1)):
        for lengths, padding in (((), 0), ((), 5), ((0, 0), 0), ((3, 2), 1)):
            got = check(config, device, lengths=lengths, padding=padding, trained=0.0)
            assert not any(float(value) for value in got.metrics.values())
            assert not any(values.any() for values in got.sums.values())


@named
def types(device: torch.device) -> None:
    """Logprobs and entropy of every width, ids of both."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for ids in (torch.int32, torch.int64):
            config = PolicyConfig(entropy_coef=0.1, kl_coef=0.1, normalize="sequence")
            check(config, device, dtype=dtype, ids=ids, far=0.0, lengths=(5, 2))


@named
def unknown_samples(device: torch.device) -> None:
    """Ids that are no sample's count nothing and have no gradient, also where 32 bits would wrap them."""
    for last in (3, 2**32, 2**40 + 1):
        values = torch.tensor([-1.0, -2.0, -1.5, -0.5, -4.0, -3.0], device=device)
        ids = torch.tensor([0, 0, 2, 2, last, last], device=device)
        batch = Batch(torch.ones(6, dtype=torch.bool, device=device), values, values, torch.ones_like(values), ids, 3)
        spoilt = values + torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], device=device)
        got = apply(spoilt, values, None, batch, PolicyConfig(entropy_coef=0.5, ratio="sequence"))
        assert float(got.metrics["ratio_max"]) == 1.0
        assert float(got.metrics["tokens"]) == 4.0
        assert got.sums["tokens"].tolist() == [2.0, 0.0, 2.0]
        assert got.grad.tolist() == [-0.25] * 4 + [0.0] * 2
        assert got.bonus.tolist() == [-0.125] * 4 + [0.0] * 2


@named
def views(device: torch.device) -> None:
    """Strided tensors, and a denominator of whole numbers on the device."""
    logprob, entropy, reference, batch = Case().on(device)
    config = PolicyConfig(kl_coef=0.1, entropy_coef=0.1, normalize="group")
    sizes = torch.tensor([8, 8, 3, 9, 3], device=device)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=1)[:, 0]

    old = batch.old_logprobs
    assert old is not None
    apart = Batch(
        strided(batch.loss_mask),
        strided(batch.logprobs),
        strided(old),
        strided(batch.advantages),
        strided(batch.segment_ids),
        batch.num_samples,
    )
    first = apply(logprob, entropy, reference, batch, config, group_tokens=sizes, denominator=3.0)
    divisor = torch.tensor(3, device=device)
    given_strided: dict[str, Any] = {"group_tokens": strided(sizes), "denominator": divisor}
    second = apply(strided(logprob), strided(entropy), strided(reference), apart, config, **given_strided)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad, second.grad)
    assert torch.equal(first.bonus, second.bonus)


@named
def repeats(device: torch.device) -> None:
    """The same bits each time."""
    logprob, entropy, reference, batch = Case(lengths=(2 * BLOCK, 3, BLOCK // 2)).make()
    config = PolicyConfig(ratio="sequence", kl_coef=0.1, mis=(0.5, 2.0), normalize="sequence")
    tensors = logprob.to(device), entropy.to(device), reference.to(device)
    first, second = (apply(*tensors, on(batch, device), config) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad, second.grad)
    assert all(torch.equal(first.sums[name], second.sums[name]) for name in TERMS)


# --- by hand ---------------------------------------------------------------------------------------------------------


def logs(*ratios: float) -> list[float]:
    """Logarithms."""
    return torch.tensor(ratios, dtype=torch.float64).log().tolist()


def expect(
    config: PolicyConfig, given: list[Token], device: torch.device, loss: float, grad: list[float], **metrics: float
) -> None:
    """What the op gives in float32.

    Raises:
        AssertionError: something else.
    """
    logprob, entropy, reference, batch = columns(given, device, torch.float32)
    needed = {"denominator": 10.0} if config.normalize == "constant" else {}
    if config.normalize == "group":
        needed["group_tokens"] = group_tokens(batch, torch.arange(batch.num_samples, device=device) // 2)  # type: ignore[assignment]
    got = apply(logprob, entropy, reference, batch, config, **needed)
    torch.testing.assert_close(float(got.loss), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad.tolist(), grad, rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        torch.testing.assert_close(float(got.metrics[name]), value, rtol=1e-5, atol=1e-6, msg=name)


def moved(*ratios: float, advantages: list[float], sample: int = 0, weights: list[float] | None = None) -> list[Token]:
    """Tokens of probability 1/e under the policy, with these ratios to the old policy, and of old to rollout."""
    apart = logs(*(weights or [1.0] * len(ratios)))
    return [
        Token(sample, True, -1.0, -1.0 - r, -1.0 - r - w, a)
        for r, w, a in zip(logs(*ratios), apart, advantages, strict=True)
    ]


@named
def clips_by_hand(device: torch.device) -> None:
    """PPO, clipped at 0.8 and 1.2: -1.2 * 2, -0.5 * 2, 1.5 * 2, 0.8 * 2; the first and the last have no slope."""
    four = moved(1.5, 0.5, 1.5, 0.5, advantages=[2.0, 2.0, -2.0, -2.0])
    config = PolicyConfig(tis_cap=None, clip_high=0.2)
    shares = {"clip_fraction": 0.5, "clip_low_fraction": 0.25, "clip_high_fraction": 0.25, "ratio_mean": 1.0}
    ends = {"ratio_max": 1.5, "ratio_min": 0.5}
    expect(config, four, device, (-2.4 - 1 + 3 + 1.6) / 4, [0.0, -0.25, 0.75, 0.0], **shares, **ends)
    # clip-higher at 1.6 leaves the first alone; dual clip at 1.4: the third loses 2.8 and its slope.
    config = replace(config, clip_high=0.6, dual_clip=1.4)
    shares = {"clip_fraction": 0.25, "clip_low_fraction": 0.25, "clip_high_fraction": 0.0, "dual_clip_fraction": 0.25}
    expect(config, four, device, (-3 - 1 + 2.8 + 1.6) / 4, [-0.75, -0.25, 0.0, 0.0], **shares)


@named
def cispo_by_hand(device: torch.device) -> None:
    """Weights 1.2, 0.8, 1.2 times A times the logprob -1, all with a slope; REINFORCE: A times the logprob."""
    three = moved(1.5, 0.5, 1.5, advantages=[2.0, 2.0, -2.0])
    config = PolicyConfig(algorithm="cispo", tis_cap=None, clip_high=0.2)
    shares = {"clip_low_fraction": 1 / 3, "clip_high_fraction": 2 / 3}
    expect(config, three, device, 1.6 / 3, [-0.8, -1.6 / 3, 0.8], **shares)
    plain_config = PolicyConfig(algorithm="reinforce")
    expect(plain_config, three, device, 2 / 3, [-2 / 3, -2 / 3, 2 / 3], ratio_mean=3.5 / 3, clip_fraction=0.0)


@named
def gspo_by_hand(device: torch.device) -> None:
    """The geometric mean of 1.8 and 0.5 is 0.9487; that of 2, 2 and 2, clipped at 1.2, is 2. Means of samples.

    Of advantages 3 and 1, GSPO's gradient is of the one ratio, GSPO-token's each token's own.
    """
    config, root = replace(GSPO, clip_high=0.2), 0.9**0.5
    pair = moved(1.8, 0.5, advantages=[3.0, 1.0]) + moved(2.0, 2.0, 2.0, advantages=[1.0] * 3, sample=1)
    loss, mean = (-2 * root - 1.2) / 2, {"ratio_mean": (2 * root + 6) / 5}
    expect(config, pair, device, loss, [-root / 2] * 2 + [0.0] * 3, **mean)
    slopes = [-0.75 * root, -0.25 * root, 0.0, 0.0, 0.0]
    expect(replace(config, ratio="sequence-token"), pair, device, loss, slopes, **mean)


THREE_WEIGHTS = [0.5, 1.5, 4.0]


def weigh(config: PolicyConfig, device: torch.device, weights: list[float], **metrics: float) -> None:
    """Importance weights of THREE_WEIGHTS on tokens of ratio 1 and advantage 1 become `weights`."""
    three = moved(1.0, 1.0, 1.0, advantages=[1.0] * 3, weights=THREE_WEIGHTS)
    slopes = [-weight / 3 for weight in weights]
    expect(config, three, device, sum(slopes), slopes, surrogate=sum(slopes), tis_mean=sum(weights) / 3, **metrics)


@named
def weights_by_hand(device: torch.device) -> None:
    """Truncated, of tokens, of the product 3, of the geometric mean; and how far old and rollout are apart."""
    weigh(PolicyConfig(tis_cap=2.0), device, [0.5, 1.5, 2.0], tis_truncated=1 / 3)
    weigh(PolicyConfig(tis_cap=5.0, tis_level="sequence"), device, [3.0] * 3, tis_truncated=0.0)
    weigh(PolicyConfig(tis_cap=INF, tis_level="geometric"), device, [3.0 ** (1 / 3)] * 3)
    log2, log3 = logs(2.0, 3.0)
    far = {"mismatch_abs": (2 * log2 + log3) / 3, "mismatch_k3": (6 - 3 - log3) / 3, "mismatch_f2": 1 / 3}
    weigh(PPO, device, [1.0] * 3, **far)


@named
def masks_by_hand(device: torch.device) -> None:
    """Bands around the token's weight, which multiplies or does not, and around the sample's."""
    weigh(PolicyConfig(tis_cap=None, icepop=(0.6, 2.0)), device, [0.0, 1.5, 0.0], icepop_masked=2 / 3, mis_masked=0.0)
    own = PolicyConfig(tis_cap=None, mis=(0.6, 2.0), mis_level="token")
    weigh(own, device, [0.0, 1.0, 0.0], mis_masked=2 / 3, icepop_masked=0.0)
    weigh(replace(own, mis_level="geometric"), device, [1.0] * 3, mis_masked=0.0)
    weigh(replace(own, mis_level="sequence"), device, [0.0] * 3, mis_masked=1.0)
    both = PolicyConfig(tis_cap=3.0, icepop=(0.6, 5.0), mis=(0.1, 2.0), mis_level="token")
    weigh(both, device, [0.0, 1.5, 0.0], tis_truncated=1 / 3)


@named
def kl_by_hand(device: torch.device) -> None:
    """Two tokens that the policy finds twice and half as likely as the reference does; advantages are 0."""
    log2 = logs(2.0)[0]
    tokens = [Token(0, True, -1.0, -1.0 - r, -1.0, 0.0, 0.7, -1.0 + d) for r, d in ((0.0, -log2), (log2, log2))]
    for kind, values, slopes in (
        ("k1", (log2, -log2), (1.0, 1.0)),
        ("k2", (log2 * log2 / 2,) * 2, (log2, -log2)),
        ("k3", (0.5 - 1 + log2, 2 - 1 - log2), (0.5, -1.0)),
    ):
        config = PolicyConfig(kl_coef=0.4, kl_type=kind, tis_cap=None)  # type: ignore[arg-type]
        grad = [0.2 * s for s in slopes]
        expect(config, tokens, device, 0.2 * sum(values), grad, kl_reference=sum(values) / 2)
        grad = [0.2 * r * (s + v) for r, s, v in zip((1, 2), slopes, values, strict=True)]  # ratios to the old policy
        mean = (values[0] + 2 * values[1]) / 2
        expect(replace(config, kl_unbiased=True), tokens, device, 0.4 * mean, grad, kl_reference=mean)
    old = {"kl_old_k1": -log2 / 2, "kl_old_k3": (2 - 1 - log2) / 2, "entropy": 0.7, "advantage_mean": 0.0}
    expect(PolicyConfig(entropy_coef=0.5, tis_cap=None), tokens, device, -0.35, [0.0, 0.0], **old)


@named
def means_by_hand(device: torch.device) -> None:
    """Samples of 1, 3 and 2 tokens, whose losses are -1, -2 and -3 each; the first two are a group."""
    tokens = [t for s, n in enumerate((1, 3, 2)) for t in moved(*[1.0] * n, advantages=[s + 1.0] * n, sample=s)]
    for normalize, loss, shares in (
        ("token", 13 / 6, (1 / 6, 1 / 6, 1 / 6)),
        ("sequence", 2.0, (1 / 3, 1 / 9, 1 / 6)),
        ("group", (7 / 4 + 3) / 2, (1 / 8, 1 / 8, 1 / 4)),
        ("constant", 1.3, (0.1, 0.1, 0.1)),
    ):
        config = PolicyConfig(normalize=normalize, tis_cap=None)  # type: ignore[arg-type]
        grad = [-(t.sample + 1) * shares[t.sample] for t in tokens]
        expect(config, tokens, device, -loss, grad, samples=3.0, tokens=6.0, advantage_mean=13 / 6)


# --- edges -----------------------------------------------------------------------------------------------------------


@named
def edges_are_inside(device: torch.device) -> None:
    """A ratio or weight of exactly 1 at a bound of 1 is not clipped, truncated or masked."""
    tokens = [Token(0, True, advantage=a) for a in (1.0, -1.0)]
    slopes = [-0.5, 0.5]
    none = {"clip_fraction": 0.0, "clip_low_fraction": 0.0, "clip_high_fraction": 0.0, "tis_truncated": 0.0}
    none |= {"icepop_masked": 0.0, "mis_masked": 0.0, "mismatch_f2": 0.0}
    for band in ((1.0, INF), (0.0, 1.0)):
        config = PolicyConfig(clip_low=0.0, clip_high=0.0, tis_cap=1.0, icepop=band, mis=band)
        expect(config, tokens, device, 0.0, slopes, **none)
        expect(replace(config, mis_level="token"), tokens, device, 0.0, slopes, **none)
        flat = replace(config, algorithm="cispo")
        expect(flat, tokens, device, 0.0, slopes, **none)


@named
def bounded(device: torch.device) -> None:
    """Logprobs that are far apart, or infinite, give finite weights, and no ratio beyond the bound has a slope."""
    for far, ratio in ((19.0, "token"), (22.0, "token"), (22.0, "sequence"), (INF, "token")):
        tokens = [
            Token(0, True, -far, -1.0, -1.0, 1.0, other=-1.0),
            Token(0, True, -far, -1.0, -1.0, 1.0, other=-1.0),
            Token(1, True, -1.0, -far, -1.0, -1.0, other=-1.0),
            Token(1, True, -1.0, -1.0, -far, -1.0, other=-1.0),
        ]
        config = PolicyConfig(tis_cap=INF, ratio=ratio, kl_coef=0.1)  # type: ignore[arg-type]
        logprob, entropy, reference, batch = columns(tokens, device, torch.float32)
        out = policy_loss(logprob.requires_grad_(), batch, config, entropy=entropy, reference=reference)
        (slope,) = torch.autograd.grad(out.loss, logprob)
        assert out.loss.isfinite()
        assert slope.isfinite().all()
        assert out.read()["ratio_max"] <= 1.0001 * 4.8517e8
        if ratio == "token":
            assert (float(slope[2]) == 0.0) == (far > 20), (far, slope)
    zero = Token(0, True, -INF, -1.0, -1.0, 0.0)
    for algorithm in ("reinforce", "cispo"):
        config = PolicyConfig(algorithm=algorithm)
        expect(config, [zero, Token(0, True, -1.0, -1.0, -1.0, 1.0)], device, 0.5, [0.0, -0.5])


@named
def nan_is_seen(device: torch.device) -> None:
    """NaN in a trained token reaches the loss, whatever it stands in."""
    for name in ("policy", "old", "rollout", "advantage", "entropy", "other"):
        ratio = "sequence" if name == "old" else "token"
        config = PolicyConfig(kl_coef=0.1, entropy_coef=0.1, ratio=ratio)  # type: ignore[arg-type]
        spoil: dict[str, Any] = {name: NAN}
        spoilt = [Token(0, True, -1.5, -1.2, -1.1, -1.0), replace(Token(0, True), **spoil)]
        logprob, entropy, reference, batch = columns(spoilt, device, torch.float32)
        assert policy_loss(logprob, batch, config, entropy=entropy, reference=reference).loss.isnan(), name
