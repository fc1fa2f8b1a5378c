"""The policy loss as an op: every check of `policy_checks`, random samples, launches, waits, autograd, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels import launch
from pacenote.kernels.policy import TERMS, PolicyConfig, group_tokens, policy_loss
from pacenote.kernels.policy_config import plain_values
from pacenote.kernels.reference_policy import PolicyInputs
from tests.kernels.conftest import GPU
from tests.kernels.policy_checks import CHECKS, GSPO, PPO, Case, check, on
from tests.kernels.policy_oracle import Batch
from tests.kernels.test_policy import configs

pytestmark = pytest.mark.usefixtures("poisoned")
ALL = PolicyConfig(icepop=(0.5, 2.0), mis=(0.5, 2.0), kl_coef=0.1, entropy_coef=0.1, normalize="sequence")
SEQUENCES = (GSPO, replace(PPO, tis_cap=2.0, tis_level="geometric"), replace(PPO, mis=(0.5, 2.0)))


def name(config: PolicyConfig) -> str:
    """Of a test."""
    levels = config.tis_level if config.tis_cap is not None else "", config.mis_level if config.mis is not None else ""
    return "-".join(filter(None, (config.ratio, *levels, config.normalize)))


@pytest.mark.parametrize("which", CHECKS)
def test_check(which: str, device: torch.device) -> None:
    CHECKS[which](device)


@settings(
    max_examples=4 if launch.INTERPRETED else 80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    config=configs(),
    lengths=st.lists(st.sampled_from((0, 1, 2, 30, 140)), max_size=3).map(tuple),
    padding=st.integers(0, 3),
    old=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_samples(
    config: PolicyConfig, lengths: tuple[int, ...], padding: int, old: bool, seed: int, device: torch.device
) -> None:
    divisor = 3.0 if config.normalize == "constant" else None
    check(config, device, lengths=lengths, padding=padding, old=old, seed=seed, drift=0.1, far=0.0, divisor=divisor)


# --- launches and waits ----------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the ops that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


NO_LAUNCH = {"empty", "new_empty", "empty_like", "view", "detach", "fill_"}
"""Ops that launch nothing on a GPU; fill_ is the NaN of the tests' own poisoning."""


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[str]]]:
    """Names of the Triton kernels that are launched, and of torch's ops but for those of the interpreter's copies."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    seen, ops = list[str](), Ops()
    kind: Any = InterpretedFunction if launch.INTERPRETED else JITFunction
    run = kind.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        before = len(ops.names)
        result = run(self, *args, **kwargs)
        del ops.names[before:]
        return result

    with monkeypatch.context() as patch, ops:
        patch.setattr(kind, "run", watched)
        yield seen, ops.names


@pytest.mark.skipif(not (launch.INTERPRETED or GPU), reason="runs where Triton kernels do")
@pytest.mark.parametrize("config", [PPO, ALL, *SEQUENCES], ids=name)
def test_two_launches_or_three_and_nothing_else(
    config: PolicyConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pacenote.kernels import policy_triton

    logprob, entropy, reference, batch = Case().on(device)
    older = batch.old_logprobs, batch.logprobs, batch.advantages
    where = batch.loss_mask, batch.segment_ids
    x = PolicyInputs(logprob, *older, *where, batch.num_samples, entropy, reference)
    with launches(monkeypatch) as (seen, ops):
        out = policy_triton.policy_loss(x, config)
        policy_triton.policy_gradient(out.slopes, out.slopes.divisor, *where, 0.1, torch.float32, torch.float32)
    first = ["_samples_kernel"] if config.by_sample else []
    assert config.by_sample == (config in (ALL, *SEQUENCES))
    assert seen == [*first, "_tokens_kernel", "_fold_kernel", "_gradient_kernel"]
    assert set(ops) <= NO_LAUNCH
    if launch.INTERPRETED:
        return
    with launches(monkeypatch) as (seen, ops):  # nor does what stands around the op launch anything
        leaf = logprob.requires_grad_()
        policy_loss(leaf, batch, config, entropy=entropy, reference=reference)
    assert set(ops) <= NO_LAUNCH | {"policy_loss", "unbind"}


@pytest.mark.parametrize("config", [PPO, ALL, GSPO], ids=name)
def test_nothing_waits(config: PolicyConfig) -> None:
    """On the meta device, where an op that would wait for a value raises; and its results have the real shapes."""
    logprob, entropy, reference, batch = Case().make()
    real = policy_loss(logprob.requires_grad_(), batch, config, entropy=entropy, reference=reference)
    meta = torch.device("meta")
    leaf, bonus = (x.detach().to(meta).requires_grad_() for x in (logprob, entropy))
    given: dict[str, Any] = {
        "entropy": bonus,
        "reference": reference.to(meta),
        "denominator": torch.ones((), device=meta),
    }
    out = policy_loss(leaf, on(batch, meta), config, **given)
    out.backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape
    assert (bonus.grad is None) == (not config.entropy_coef)
    for mine, theirs in ((out.loss, real.loss), (out.values, real.values), (out.sums, real.sums)):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert out.metrics.keys() == real.metrics.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [ALL, GSPO], ids=name)
def test_no_wait_and_graphs(config: PolicyConfig, device: torch.device) -> None:
    """Nothing waits for the device; a captured graph replays with what then stands in its arguments."""
    logprob, entropy, reference, batch = Case(lengths=(900, 3, 4000, 0, 70)).on(device)
    leaf = logprob.nan_to_num(-1.0).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = policy_loss(leaf, batch, config, entropy=entropy, reference=reference)
        return out.values, out.sums, torch.autograd.grad(out.loss, leaf)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.mul_(1.1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


# --- as an op --------------------------------------------------------------------------------------------------------


def arguments(config: PolicyConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of the op."""
    logprob, entropy, reference, batch = Case(lengths=(4, 1, 3)).on(device)
    leaf = logprob.nan_to_num(-1.0).to(dtype).requires_grad_()
    spread = entropy.nan_to_num(0.5).to(dtype).requires_grad_()
    older = batch.old_logprobs, batch.logprobs, batch.advantages, batch.loss_mask, batch.segment_ids
    sizes = torch.tensor([3, 3, 2], device=device)
    return leaf, *older, 3, spread, reference, sizes, None, 5.0, *plain_values(config)


def test_opcheck(device: torch.device) -> None:
    config = replace(GSPO, normalize="group", entropy_coef=0.1, icepop=(0.5, 2.0))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = arguments(config, device, torch.float32)
    torch.library.opcheck(torch.ops.pacenote.policy_loss.default, args, test_utils=checks)


def test_compiles_whole(device: torch.device) -> None:
    logprob, _, _, batch = Case(lengths=(4, 1, 3)).make()
    moved = on(batch, device)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        out = policy_loss(x * 2, moved, GSPO)
        return out.loss, out.metrics["ratio_mean"]

    plain, compiled = (logprob.to(device).nan_to_num(-1.0).requires_grad_() for _ in range(2))
    loss(plain)[0].backward()  # type: ignore[no-untyped-call]
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled)[0].backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert compiled.grad is not None
    assert torch.equal(plain.grad, compiled.grad)


def test_groups_from_ids(device: torch.device) -> None:
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 1], dtype=torch.bool, device=device)
    segments = torch.tensor([0, 0, 1, 1, 2, 3, -1], dtype=torch.int32, device=device)
    batch = Batch(mask, mask.float(), None, mask.float(), segments, 5)
    sizes = group_tokens(batch, torch.tensor([3, 0, 3, 0, 1], device=device))
    assert sizes.tolist() == [2, 3, 2, 3, 0]
    with pytest.raises(ValueError, match=r"expected group_ids \[5\] of int32 or int64, got \[4\] of int64"):
        group_tokens(batch, torch.zeros(4, dtype=torch.int64, device=device))


def test_what_is_read(device: torch.device) -> None:
    """One tensor of all metrics, whose parts the metrics are; sums by sample add up to them."""
    logprob, entropy, reference, batch = Case().on(device)
    out = policy_loss(logprob, batch, PolicyConfig(kl_coef=0.1), entropy=entropy, reference=reference)
    numbers, sums = out.read(), out.by_sample()
    assert numbers == {key: float(value) for key, value in out.metrics.items()}
    assert all(
        value.untyped_storage().data_ptr() == out.values.untyped_storage().data_ptr() for value in out.metrics.values()
    )
    assert list(sums) == list(TERMS)
    assert sums["tokens"].sum() == numbers["tokens"] == batch.loss_mask.sum()
    for term in TERMS[1:]:
        assert float(sums[term].sum()) == pytest.approx(numbers[term] * numbers["tokens"], rel=1e-5, abs=1e-6), term
