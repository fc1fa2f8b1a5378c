"""The policy loss of hidden states: every check of `hidden_checks`, any case, what may be alive, and what may wait."""

from __future__ import annotations

import weakref
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacenote.kernels import launch
from pacenote.kernels.pack import pack
from pacenote.kernels.policy import PolicyConfig
from pacenote.kernels.policy_hidden import policy_loss_from_hidden
from pacenote.kernels.spec import DECODE
from tests.kernels.hidden_checks import (
    CHECKS,
    CONFIGS,
    NORMALIZE,
    SEQUENCES,
    Batch,
    Case,
    near,
    one_pass,
    plain,
    two_calls,
)
from tests.kernels.pack_checks import random
from tests.kernels.test_policy import configs

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = tuple(field.name for field in fields(Batch))


FEW = ("like_two_calls", "sequences", "heads", "too_few")
"""Checks that the interpreter runs: it takes seconds for each, and what it interprets has checks of its own."""


@pytest.mark.parametrize("which", FEW if launch.INTERPRETED else CHECKS)
def test_check(which: str, device: torch.device) -> None:
    CHECKS[which](device)


@settings(
    max_examples=1 if launch.INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    config=configs(),
    case=st.builds(
        Case,
        lengths=st.lists(st.sampled_from((0, 1, 2, 11)), max_size=4).map(tuple),
        padding=st.integers(0, 3),
        dim=st.integers(1, 5),
        vocab=st.sampled_from((2, 9, 40)),
        bound=st.sampled_from((None, 2)),
        trained=st.sampled_from((0.0, 0.5, 1.0)),
        known=st.sampled_from((None, 0, 3)),
        old=st.booleans(),
        bias=st.booleans(),
        heat=st.booleans(),
        divisor=st.sampled_from((None, 2.5)),
        chunk=st.sampled_from((1, 4, None)),
        mode=st.sampled_from(("chunked", "invariant")),
        grad=st.sampled_from((1.0, 0.5)),
        seed=st.integers(0, 999),
        dtype=st.just(torch.float64),
    ),
)
def test_any_case(config: PolicyConfig, case: Case, device: torch.device) -> None:
    mine = one_pass(case, config, device)
    near(mine, two_calls(case, config, device))
    gold = plain(case, config, device, torch.float64)
    assert torch.allclose(mine.out.loss, gold.out.loss, rtol=1e-5, atol=1e-6)


# --- what is alive, what waits ---------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest floating tensor that any op makes, and how many of at least `big` numbers live at once."""

    def __init__(self, big: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.big, self.largest, self.most = big, 0, 0
        self.made: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.is_floating_point() and not value._is_view():
                self.largest = max(self.largest, value.numel())
                if value.numel() >= self.big:
                    self.made.append(weakref.ref(value))
        self.most = max(self.most, len({id(x) for ref in self.made if (x := ref()) is not None}))
        return out


@pytest.mark.parametrize("config", [CONFIGS[1], SEQUENCES[0]], ids=["one pass", "sequences"])
def test_only_a_chunk_of_logits_lives(config: PolicyConfig, device: torch.device) -> None:
    case = Case(lengths=(90, 60), dim=4, vocab=300, chunk=16, trained=1.0)
    with Alive(16 * 300) as seen:
        one_pass(case, config, device)
    assert seen.largest == 16 * 300, "more than a chunk of logits"
    assert seen.most <= 4, (
        "logits of an earlier chunk are kept"
    )  # these, two temporaries on the CPU, and their gradient


def test_nothing_waits() -> None:
    """Of tensors without values, nothing asks for one, of the loss and of its gradients."""
    case = Case(lengths=(40, 7), dtype=torch.bfloat16, heat=False)
    here = case.batch(torch.device("cpu"))
    values: list[Any] = [x.to("meta") if isinstance(x, Tensor) else x for x in map(here.__getattribute__, NAMES)]
    batch = Batch(*values)
    sizes = torch.ones(batch.num_samples, device="meta", dtype=torch.int64)
    for config in (*CONFIGS, *SEQUENCES):
        for normalize in NORMALIZE:
            hidden, weight, bias = leaves = [x.detach().to("meta").requires_grad_() for x in case.tensors(here)]
            out = policy_loss_from_hidden(
                hidden, weight, batch, replace(config, normalize=normalize), bias=bias, temperature=0.7, chunk=5,
                reference=batch.logprobs, group_tokens=sizes,
                denominator=torch.ones((), device="meta") if normalize == "constant" else None,
            )  # fmt: skip
            out.backward()
            assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)
    with pytest.raises(NotImplementedError):  # the net holds
        policy_loss_from_hidden(hidden, weight, replace(batch, num_trained=None), CONFIGS[0])


@pytest.mark.gpu
def test_nothing_waits_on_a_gpu(device: torch.device) -> None:
    case = Case(lengths=(4000, 700), dim=64, vocab=5000, chunk=512, dtype=torch.bfloat16, heat=False)
    batch = case.batch(device)
    hidden, weight, bias = case.tensors(batch)
    for config in (*CONFIGS[:2], SEQUENCES[0]):
        policy_loss_from_hidden(hidden, weight, batch, config, bias=bias).backward()  # compiles what it needs
        torch.cuda.set_sync_debug_mode("error")
        try:
            policy_loss_from_hidden(hidden, weight, batch, config, bias=bias).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- with the rest ---------------------------------------------------------------------------------------------------


def test_a_packed_batch_is_one(device: torch.device) -> None:
    """`pack` counts what is trained, whatever is cut, masked or left out."""
    samples = random([9, 2, 30]).samples
    given: tuple[dict[str, Any], ...] = ({}, {"max_len": 6}, {"mask_provenance": (DECODE,)}, {"pad_to_multiple": 64})
    for options in given:
        batch = pack(samples, advantages=[1.0, -1.0, 0.5], device=device, num_experts=64, **options)
        assert batch.num_trained == int(batch.loss_mask.sum())
        hidden = torch.randn(batch.num_tokens, 4, generator=torch.Generator().manual_seed(0)).to(device)
        weight = torch.eye(int(batch.targets.max()) + 1, 4, device=device)
        out = policy_loss_from_hidden(hidden, weight, batch, PolicyConfig())
        assert out.read()["tokens"] == batch.num_trained


@pytest.mark.parametrize("config", [CONFIGS[0], SEQUENCES[0]], ids=["one pass", "sequences"])
def test_without_gradients(config: PolicyConfig, device: torch.device) -> None:
    """Under no_grad, and of leaves that want none, the same loss and no gradient."""
    case = Case()
    wanted = one_pass(case, config, device).out
    batch = case.batch(device)
    hidden, weight, bias = case.tensors(batch)
    given: dict[str, Any] = {"temperature": case.temperature(batch), "chunk": case.chunk}
    with torch.no_grad():
        assert torch.equal(policy_loss_from_hidden(hidden, weight, batch, config, bias=bias, **given).loss, wanted.loss)
    frozen = [x.detach() for x in (hidden, weight, bias)]
    out = policy_loss_from_hidden(frozen[0], frozen[1], batch, config, bias=frozen[2], **given)
    assert torch.equal(out.loss, wanted.loss)
    assert not out.loss.requires_grad
    only = frozen[1].requires_grad_()
    policy_loss_from_hidden(frozen[0], only, batch, config, bias=frozen[2], **given).backward()
    assert only.grad is not None
    assert frozen[0].grad is None


def test_hidden_states_of_a_model(device: torch.device) -> None:
    """[1, T, D], as transformers gives them, and gradients that flow on."""
    case = Case(bias=False)
    batch = case.batch(device)
    hidden, weight = case.tensors(batch)
    given: dict[str, Any] = {"temperature": case.temperature(batch), "chunk": case.chunk}
    policy_loss_from_hidden((hidden * 2)[None], weight, batch, CONFIGS[0], **given).backward()
    doubled = (hidden.detach() * 2).requires_grad_()
    policy_loss_from_hidden(doubled, weight.detach(), batch, CONFIGS[0], **given).backward()
    assert hidden.grad is not None
    assert doubled.grad is not None
    assert torch.equal(hidden.grad.nan_to_num(), 2 * doubled.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "expected batch.loss_mask"),
        ({"targets": torch.zeros(31)}, "expected batch.targets"),
        ({"segment_ids": torch.zeros(3, dtype=torch.int32)}, "expected batch.segment_ids"),
        ({"advantages": torch.zeros(3)}, "expected batch.advantages"),
        ({"num_trained": 2}, "expected batch.num_trained of at least"),
    ],
)
def test_batches_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    case = Case()
    batch = case.batch(torch.device("cpu"))
    hidden, weight, _ = case.tensors(batch)
    with pytest.raises(ValueError, match=message):
        policy_loss_from_hidden(hidden, weight, replace(batch, **change), CONFIGS[0])
    with pytest.raises(ValueError, match="expected a denominator"):
        policy_loss_from_hidden(hidden, weight, batch, replace(CONFIGS[0], normalize="constant"))
    with pytest.raises(ValueError, match="expected mode"):
        policy_loss_from_hidden(hidden, weight, batch, CONFIGS[0], mode="liger")


def test_it_learns(device: torch.device) -> None:
    """Steps along its gradient raise the logprob of what was good, and lower that of the rest."""
    case = Case(lengths=(20, 20), trained=1.0, bias=False, heat=False, padding=0)
    batch = replace(case.batch(device), old_logprobs=None)
    signs = torch.where(batch.segment_ids == 0, 1.0, -1.0)
    batch = replace(batch, advantages=signs, logprobs=torch.zeros_like(signs))
    hidden, weight = (x.detach() for x in case.tensors(batch))
    config = PolicyConfig(tis_cap=None)
    leaf = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=2.0)
    for _ in range(4 if launch.INTERPRETED else 20):
        policy_loss_from_hidden(hidden, leaf, batch, config).backward()
        optimizer.step()
        optimizer.zero_grad()
    logp = (hidden @ leaf.detach().t()).log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    first = (hidden @ weight.t()).log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert ((logp - first) * signs).mean() > 0.1
