"""What the ops refuse, and in which words: what was expected, what came, what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pacenote.kernels import check
from pacenote.kernels.logprob import linear_logprob, logprob_from_logits
from pacenote.kernels.policy import PolicyConfig, policy_loss
from pacenote.kernels.spec import RouterSpec

NAN = float("nan")


# --- router specs and the common wording -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": "relu"}, r"RouterSpec\.score expects one of .*'sigmoid'.*got 'relu'"),
        ({"score": "softmax", "group_score": "sum"}, r"group_score expects .*got 'sum'"),
        ({"score": "softmax", "score_dtype": "bfloat16"}, r"score_dtype expects .*got 'bfloat16'"),
        ({"score": "softmax", "weight_dtype": "half"}, r"weight_dtype expects .*got 'half'"),
        ({"score": "softmax", "groups": 2, "topk_groups": 3}, r"topk_groups <= groups, got topk_groups=3, groups=2"),
        ({"score": "softmax", "topk_groups": 0}, r"got topk_groups=0"),
        ({"score": "softmax", "eps": -1.0}, r"eps >= 0 .*got eps=-1\.0"),
        ({"score": "softmax", "eps": NAN}, r"got eps=nan"),
        ({"score": "softmax", "scale": 0.0}, r"scale > 0, got .*scale=0\.0"),
        ({"score": "softmax", "scale": NAN}, r"scale=nan"),
        ({"score": "softmax_topk", "jitter": 0.01}, r"0 unless the score is sparsemixer, got jitter=0\.01, .*topk"),
        ({"score": "sparsemixer", "jitter": -0.01}, r"jitter >= 0.*got jitter=-0\.01"),
        ({"score": "sparsemixer", "jitter": NAN}, r"got jitter=nan"),
    ],
)
def test_specs_that_describe_no_router(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterSpec(**fields)


def test_arguments_are_refused_in_one_wording() -> None:
    cpu, floats = torch.device("cpu"), (torch.float32, torch.bfloat16)
    check.tensor(torch.zeros(3, 5), "x", (3, None), floats, cpu)
    for value, words in (
        ([1.0], r"expected x as a tensor \[3, any\] of float32 or bfloat16, got list"),
        (torch.zeros(4, 5), r"expected x \[3, any\] of float32 or bfloat16, got \[4, 5\] of float32"),
        (torch.zeros(3), r"got \[3\] of float32"),
        (torch.zeros(3, 5).long(), r"got \[3, 5\] of int64"),
        (torch.zeros(3, 5, device="meta"), r"expected x on cpu as the other arguments, got meta: move it first"),
    ):
        with pytest.raises(ValueError, match=words):
            check.tensor(value, "x", (3, None), floats, cpu)


# --- logprob ---------------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"expected hidden \[3, 4\] of float32 .*got \[2, 4\] of float32"),
        ({"hidden": torch.zeros(3, 5)}, r"got \[3, 5\]"),
        ({"hidden": torch.zeros(2, 3, 4)}, r"got \[2, 3, 4\]"),
        ({"hidden": HIDDEN.bfloat16()}, r"expected hidden \[3, 4\] of float32 .*of bfloat16"),
        ({"weight": torch.zeros(5)}, r"expected weight \[any, any\] .*got \[5\]"),
        ({"weight": WEIGHT.long()}, r"got \[5, 4\] of int64"),
        ({"targets": TARGETS.float()}, r"expected targets \[3\] of int64 or int32, got \[3\] of float32"),
        ({"targets": TARGETS + 5}, r"targets in \[0, 5\) or ignore_index=-100, got 5"),
        ({"targets": TARGETS - 1}, r"got -1"),
        ({"targets": TARGETS + 4, "vocab_bound": 4}, r"targets in \[0, 4\) .*got 4"),
        ({"bias": torch.zeros(4)}, r"expected bias \[5\]"),
        ({"temperature": 0.0}, r"a temperature above 0, got 0\.0"),
        ({"temperature": -1}, r"a temperature above 0, got -1"),
        ({"temperature": NAN}, r"got nan"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"temperatures above 0, got 0\.0"),
        ({"temperature": torch.tensor([1.0, NAN, 1.0])}, r"temperatures above 0, got nan"),
        ({"temperature": torch.ones(2)}, r"expected temperature \[3\]"),
        ({"mask": torch.ones(3)}, r"expected mask \[3\] of bool, got \[3\] of float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"expected mask \[3\]"),
        ({"vocab_bound": 0}, r"1 <= vocab_bound <= V = 5, got 0"),
        ({"vocab_bound": 6}, r"got 6"),
        ({"chunk": 0}, r"chunk >= 1 tokens, got 0"),
    ],
)
def test_logprob_arguments(changed: dict[str, Any], words: str) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **changed}
    with pytest.raises(ValueError, match=words):
        linear_logprob(**arguments)
    rest = {name: value for name, value in arguments.items() if name not in {"hidden", "weight", "bias"}}
    if not set(changed) & {"hidden", "weight", "bias"}:
        with pytest.raises(ValueError, match=words):
            logprob_from_logits(torch.zeros(3, 5), **rest)


def test_logprob_logits() -> None:
    for logits in (torch.zeros(2, 5), torch.tensor(1.0), torch.zeros(3, 5).long(), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"floating logits \[3, 'V'\]|vocab_bound"):
            logprob_from_logits(logits, TARGETS)


# --- policy ----------------------------------------------------------------------------------------------------------

PLAIN = PolicyConfig(tis_cap=None)


@dataclass(frozen=True, slots=True)
class Batch:
    loss_mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    segment_ids: Tensor
    num_samples: int


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clip_low": 1.1}, r"0 <= clip_low <= 1 and clip_high >= 0, got 1\.1, 0\.28"),
        ({"clip_low": -0.1}, r"got -0\.1"),
        ({"clip_high": NAN}, "got 0.2, nan"),
        ({"dual_clip": 1.0}, "dual_clip above 1, got 1"),
        ({"tis_cap": 0.0}, "tis_cap above 0, got 0"),
        ({"icepop": (1.1, 2.0)}, r"an icepop band around 1, got \(1\.1, 2\.0\)"),
        ({"icepop": (NAN, 2.0)}, "an icepop band around 1"),
        ({"kl_coef": -1.0}, r"coefficients >= 0, got kl -1\.0"),
        ({"entropy_coef": NAN}, "entropy nan"),
        ({"kl_coef": float("inf")}, "got kl inf"),
        ({"mis": (0.5, 0.9)}, r"a mis band around 1, got \(0\.5, 0\.9\)"),
        ({"algorithm": "trpo"}, r"algorithm as one of \('ppo', 'cispo', 'reinforce'\), got 'trpo'"),
        ({"ratio": "word"}, "ratio as one of .*got 'word'"),
        ({"tis_level": "word"}, "tis_level as one of .*got 'word'"),
        ({"mis_level": "word"}, "mis_level as one of .*got 'word'"),
        ({"algorithm": "cispo", "dual_clip": 3.0}, 'expected dual_clip=None with algorithm="cispo"'),
        ({"algorithm": "reinforce", "ratio": "sequence"}, 'ratio="token" with algorithm="reinforce", which has none'),
        ({"tis_cap": None, "tis_level": "sequence"}, "expected tis_cap with tis_level='sequence', got None"),
        ({"kl_type": "k4"}, r"kl_type as one of \('k1', 'k2', 'k3'\), got 'k4'"),
        ({"normalize": "mean"}, r"normalize as one of .*got 'mean'"),
    ],
)
def test_policy_configs(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PolicyConfig(**fields)


ZERO = torch.zeros(3)
GOOD = Batch(torch.ones(3, dtype=torch.bool), ZERO, ZERO, ZERO, torch.zeros(3, dtype=torch.int32), 1)


@pytest.mark.parametrize(
    ("logprob", "batch", "config", "extra", "words"),
    [
        (torch.zeros(1, 3), GOOD, PLAIN, {}, r"expected logprob \[any\] of .*got \[1, 3\]"),
        (torch.zeros(3).long(), GOOD, PLAIN, {}, r"got \[3\] of int64"),
        (torch.zeros(4), GOOD, PLAIN, {}, r"expected batch\.loss_mask \[4\] of bool, got \[3\]"),
        (ZERO, replace(GOOD, loss_mask=ZERO), PLAIN, {}, r"batch\.loss_mask \[3\] of bool, got \[3\] of float32"),
        (ZERO, replace(GOOD, segment_ids=ZERO), PLAIN, {}, r"batch\.segment_ids \[3\] of int32 or int64"),
        (ZERO, replace(GOOD, logprobs=torch.zeros(2)), PLAIN, {}, r"batch\.logprobs \[3\]"),
        (ZERO, replace(GOOD, advantages=torch.zeros(1)), PLAIN, {}, r"batch\.advantages \[3\] .*got \[1\]"),
        (ZERO, replace(GOOD, old_logprobs=torch.zeros(3, 1)), PLAIN, {}, r"batch\.old_logprobs \[3\]"),
        (ZERO, GOOD, PLAIN, {"entropy": torch.zeros(2)}, r"expected entropy \[3\]"),
        (ZERO, GOOD, PLAIN, {"reference": torch.zeros(2)}, r"expected reference \[3\]"),
        (ZERO, GOOD, PolicyConfig(entropy_coef=0.1), {}, r"expected entropy \[T\] for entropy_coef=0\.1, got None"),
        (ZERO, GOOD, PolicyConfig(kl_coef=0.1), {}, r"expected reference \[T\] for kl_coef=0\.1, got None"),
        (ZERO, GOOD, PolicyConfig(normalize="constant"), {}, 'a denominator for normalize="constant", got None'),
        (
            ZERO,
            GOOD,
            PolicyConfig(normalize="group"),
            {},
            r'expected group_tokens \[S\] for normalize="group", got None',
        ),
        (ZERO, GOOD, PLAIN, {"group_tokens": torch.ones(2)}, r"expected group_tokens \[1\] of .*got \[2\]"),
        (ZERO, GOOD, PLAIN, {"denominator": 0}, r"a denominator above 0, got 0\.0"),
        (ZERO, GOOD, PLAIN, {"denominator": NAN}, "a denominator above 0, got nan"),
        (ZERO, GOOD, PLAIN, {"denominator": torch.tensor(0.0)}, r"a denominator above 0, got 0\.0"),
        (ZERO, GOOD, PLAIN, {"denominator": torch.ones(3)}, r"expected denominator \[\] of .*got \[3\]"),
        (torch.zeros(3, device="meta"), GOOD, PLAIN, {}, "expected batch.loss_mask on meta .*got cpu: move it first"),
    ],
)
def test_policy_arguments(
    logprob: Tensor, batch: Batch, config: PolicyConfig, extra: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        policy_loss(logprob, batch, config, **extra)
