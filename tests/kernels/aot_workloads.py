"""The launches that `aot` compiles, one generator a kernel: (variant, call) pairs whose arguments are CPU tensors.

Constants and types cover every path of a kernel. Variants are named by their number of tokens at the end, for example
`glm-T1`; each kernel has one with T1, because an argument equal to 1 becomes a constant and another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pacenote.kernels import (
    invariant_triton,
    logprob_tiles_triton,
    logprob_triton,
    pack_triton,
    permute_triton,
    policy_triton,
    route_triton,
    segment_triton,
)
from pacenote.kernels.policy_config import PolicyConfig
from pacenote.kernels.reference_policy import PolicyInputs
from pacenote.kernels.spec import RouterSpec

Launches = Iterator[tuple[str, Callable[[], Any]]]


# --- route -----------------------------------------------------------------------------------------------------------


def route() -> Launches:
    """Each kind of logits, rows and score, each flag of both kernels, groups, the largest E and K."""
    sigmoid = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=1.8)
    grouped = RouterSpec(score="sigmoid", renormalize=True, eps=1e-20, scale=2.5, groups=8, topk_groups=4)
    uneven = RouterSpec(score="softmax", groups=3, topk_groups=2, group_score="topk_share")
    loud = RouterSpec(score="softmax", groups=4, topk_groups=1, group_score="max", score_dtype="logits")
    qwen = RouterSpec(score="softmax", renormalize=True, weight_dtype="logits")
    low = RouterSpec(score="softmax", score_dtype="logits", weight_dtype="logits")
    gpt = RouterSpec(score="softmax_topk", score_dtype="logits", weight_dtype="logits")
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    u8, u16, i32, i64 = torch.uint8, torch.uint16, torch.int32, torch.int64
    table: list[tuple[str, RouterSpec, torch.dtype, torch.dtype, int, int, bool, bool, str]] = [
        # name, spec, logits, rows, E, K, state, bias, what is counted
        ("glm", sigmoid, f32, u8, 64, 4, True, True, "load"),
        ("glm-plain", sigmoid, f32, u8, 64, 4, False, False, ""),
        ("qwen", qwen, bf16, u8, 128, 8, True, False, "count"),
        ("deepseek", grouped, f32, u8, 256, 8, True, True, "load"),
        ("kimi", sigmoid, bf16, u16, 384, 8, True, True, ""),
        ("gpt-oss", gpt, bf16, i32, 128, 4, False, False, "count"),
        ("gpt-oss-half", gpt, f16, i64, 32, 4, True, False, ""),
        ("low", low, bf16, i32, 60, 4, True, True, "load"),
        ("uneven", uneven, f16, u16, 96, 10, True, False, "load"),
        ("loud", loud, f16, i64, 512, 10, False, True, "count"),
        ("largest", sigmoid, f32, u16, 1024, 32, True, True, "load"),
        ("largest-softmax", qwen, f32, i64, 1024, 32, True, False, "count"),
        ("top-1", low, f32, u8, 16, 1, False, False, "load"),
    ]
    for name, spec, logits, rows, experts, k, state, bias, counted in table:
        for tokens in (1, 33) if name in ("glm", "deepseek") else (33,):
            call = partial(_route, tokens, spec, logits, rows, experts, k, state, bias, counted)
            yield f"{name}-T{tokens}", call


def _route(
    tokens: int,
    spec: RouterSpec,
    logits_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    experts: int,
    k: int,
    with_state: bool,
    with_bias: bool,
    counted: str,
) -> None:
    """Launch both kernels; rows are one layer of three, so their stride is not their width."""
    logits = torch.zeros(tokens, experts, dtype=logits_dtype)
    rows = torch.zeros(tokens, 3, k, dtype=rows_dtype)[:, 1]
    state = torch.ones(tokens, dtype=torch.uint8) if with_state else None
    bias = torch.zeros(experts) if with_bias else None
    weights, chosen, *_ = route_triton.forward(
        logits, rows, state, bias, spec, count=counted != "", load=counted == "load"
    )
    route_triton.backward(logits, chosen, state, weights, spec)


# --- permute ---------------------------------------------------------------------------------------------------------


def permute() -> Launches:
    """Each kind of ids, E and K of one, E + 2 at and above a power of two, the largest E and K, strided columns."""
    table = (
        # name, ids, E, K, tokens
        ("glm", torch.int64, 64, 4, 33),
        ("glm", torch.int64, 64, 4, 1),
        ("deepseek", torch.uint8, 254, 8, 33),
        ("kimi", torch.uint16, 384, 8, 33),
        ("largest", torch.int32, 1024, 32, 33),
        ("top-1", torch.int32, 1, 1, 33),
        ("top-1", torch.int32, 1, 1, 1),
    )
    for name, dtype, experts, k, tokens in table:
        for kind, ids in (
            ("rows", torch.zeros(tokens, k, dtype=dtype)),
            ("view", torch.zeros(k, tokens, 2, dtype=dtype)),
        ):
            view = ids if kind == "rows" else ids[:, :, 0].t()
            yield f"{name}-{kind}-T{tokens}", partial(permute_triton.permutation, view, experts)


# --- pack ------------------------------------------------------------------------------------------------------------


def pack() -> Launches:
    """Ids that make words of each width and of no power of two, with and without stale rows, no rows, one layer."""
    u8, u16 = torch.uint8, torch.uint16
    table: tuple[tuple[str, torch.dtype | None, int, int, int, bool, int], ...] = (
        # name, ids, E, layers, K, whether some rows are stale, tokens
        ("glm", u8, 64, 46, 4, False, 34),
        ("glm", u8, 64, 46, 4, True, 2),
        ("qwen", u8, 128, 48, 8, True, 34),
        ("kimi", u16, 384, 60, 8, False, 34),
        ("six", u8, 160, 27, 6, False, 34),
        ("ten", u16, 512, 48, 10, True, 34),
        ("odd", u8, 60, 3, 5, False, 34),
        ("odd-wide", u16, 300, 3, 5, False, 34),
        ("one", u8, 16, 1, 1, False, 34),
        ("largest", u16, 1024, 80, 32, True, 34),
        ("no-rows", None, 1024, 0, 0, False, 34),
    )
    for name, dtype, experts, layers, k, stale, tokens in table:
        for kind, run in (("run", 0), ("table", -1)):
            yield f"{name}-{kind}-T{tokens - 1}", partial(_pack, dtype, experts, layers, k, stale, tokens, run)


def _pack(dtype: torch.dtype | None, experts: int, layers: int, k: int, stale: bool, tokens: int, run: int) -> None:
    """Launch the kernel on one sample."""
    rows = tokens - 1
    pack_triton.pack(
        torch.zeros(4, 2, dtype=torch.int64),
        torch.zeros(tokens, dtype=torch.int32),
        torch.ones(tokens, dtype=torch.bool),
        torch.zeros(tokens),
        torch.zeros(tokens),
        None if dtype is None else torch.zeros(rows, layers, k, dtype=dtype),
        None if dtype is None else torch.zeros(rows, dtype=torch.uint8),
        torch.ones(rows, dtype=torch.bool) if stale else None,
        torch.arange(layers),
        run,
        rows,
        1,
        0,
        0,
        rows,
        num_experts=experts,
        codes=14,
    )


# --- segment ---------------------------------------------------------------------------------------------------------


def segment() -> Launches:
    """Values and ids of each width, with a mask and without."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ids in (torch.int32, torch.int64):
            for masked in (False, True):
                for tokens in (1, 33):
                    name = f"{str(dtype)[6:]}-{str(ids)[6:]}{'-mask' if masked else ''}-T{tokens}"
                    yield name, partial(_segment, dtype, ids, masked, tokens)


def _segment(dtype: torch.dtype, ids: torch.dtype, masked: bool, tokens: int) -> None:
    """Launch both kernels."""
    segments = torch.zeros(tokens, dtype=ids)
    mask = torch.ones(tokens, dtype=torch.bool) if masked else None
    segment_triton.sums(torch.zeros(tokens, dtype=dtype), segments, mask, 3)
    segment_triton.spread(torch.zeros(3), segments, mask, dtype)


# --- policy ----------------------------------------------------------------------------------------------------------


def policy() -> Launches:
    """Each algorithm, ratio, level, KL and normalisation; what may be absent, absent; each width of floats and ids."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    table: tuple[tuple[str, PolicyConfig, torch.dtype, torch.dtype, bool], ...] = (
        # name, config, floats, ids, whether old, entropy and reference are given
        ("grpo", PolicyConfig(), f32, torch.int32, False),
        ("all", PolicyConfig(dual_clip=3.0, icepop=(0.5, 2.0), kl_coef=0.1, entropy_coef=0.1), f32, torch.int32, True),
        ("bare", PolicyConfig(tis_cap=None, normalize="constant"), bf16, torch.int64, True),
        ("k1", PolicyConfig(kl_coef=0.1, kl_type="k1", kl_unbiased=True), f16, torch.int32, True),
        ("k2", PolicyConfig(kl_coef=0.1, kl_type="k2", mis=(0.5, 2.0), mis_level="token"), bf16, torch.int32, True),
        ("gspo", PolicyConfig(ratio="sequence", normalize="sequence", entropy_coef=0.1), f32, torch.int32, True),
        ("gspo-token", PolicyConfig(ratio="sequence-token", tis_level="sequence"), f32, torch.int64, False),
        ("mis", PolicyConfig(mis=(0.5, 2.0), tis_level="geometric", normalize="group"), f32, torch.int32, True),
        ("cispo", PolicyConfig(algorithm="cispo", ratio="sequence", mis=(0.5, 2.0)), f32, torch.int32, False),
        ("reinforce", PolicyConfig(algorithm="reinforce", kl_coef=0.1), bf16, torch.int64, True),
    )
    for name, config, floats, ids, whole in table:
        for tokens in (1, 33) if name in ("all", "gspo") else (33,):
            yield f"{name}-T{tokens}", partial(_policy, config, floats, ids, whole, tokens)


def _policy(config: PolicyConfig, floats: torch.dtype, ids: torch.dtype, whole: bool, tokens: int) -> None:
    """Launch all kernels of both passes; older logprobs and advantages are float32, as in a packed batch."""
    wide, mask, segments = torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=ids)
    given = torch.zeros(tokens, dtype=floats) if whole else None
    groups = torch.ones(3, dtype=ids) if config.normalize == "group" else None
    divisor = torch.ones(()) if config.kl_coef else 7.0 if config.normalize == "constant" else None
    logprob = torch.zeros(tokens, dtype=floats)
    old = wide if whole else None
    x = PolicyInputs(logprob, old, wide, wide, mask, segments, 3, given, given, groups, divisor)
    slopes = policy_triton.policy_loss(x, config).slopes
    bonus = floats if config.entropy_coef else None
    policy_triton.policy_gradient(slopes, torch.ones(()), mask, segments, 0.1, floats, bonus)


# --- invariant -------------------------------------------------------------------------------------------------------


def invariant() -> Launches:
    """Inputs of each width, all three products, results of both widths, with a bias and without, K of whole tiles."""
    for dtype, counts in ((torch.float32, (33, 64)), (torch.bfloat16, (1, 33, 64)), (torch.float16, (33,))):
        for tokens in counts:
            yield f"{str(dtype)[6:]}-T{tokens}", partial(_invariant, dtype, tokens)


def _invariant(dtype: torch.dtype, tokens: int) -> None:
    """Launch the kernel on a layer and on its gradients."""
    x, weight = torch.zeros(tokens, 64, dtype=dtype), torch.zeros(130, 64, dtype=dtype)
    grad = torch.zeros(tokens, 130, dtype=dtype)
    invariant_triton.product(x, weight, torch.zeros(130), torch.float32)
    invariant_triton.product(grad, weight.t(), None, dtype)
    invariant_triton.add_outer(torch.zeros(130, 64), grad, x)
    invariant_triton.add_outer(torch.zeros(130, 16), grad, torch.zeros(tokens, 16, dtype=dtype))


# --- logprob ---------------------------------------------------------------------------------------------------------


def logprob() -> Launches:
    """Logits and results of each width, each kind of temperature, with and without bias, entropy, parts and state."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    table: list[tuple[str, torch.dtype, torch.dtype, int, bool, bool]] = [
        # name, inputs, bias, size of the temperature's shape or none, entropy, state
        ("plain", bf16, f32, -1, False, True),
        ("token-heat", bf16, bf16, 1, True, True),
        ("one-heat", f16, f16, 0, True, False),
        ("wide", f32, f32, 1, True, True),
    ]
    for name, dtype, bias, heat, entropy, state in table:
        for tokens in (1, 33) if name == "plain" else (33,):
            yield f"{name}-T{tokens}", partial(_logprob, tokens, dtype, bias, heat, entropy, state)


def _logprob(tokens: int, dtype: torch.dtype, bias_dtype: torch.dtype, heat: int, entropy: bool, state: bool) -> None:
    """Launch all kernels: logits as given, and float32 as they come from a product, whose gradient is narrower."""
    degrees = None if heat < 0 else torch.ones([tokens] if heat else [])
    bias = torch.zeros(4160, dtype=bias_dtype) if heat >= 0 else None
    targets, states = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.uint8)
    hidden, weight = torch.zeros(tokens, 64, dtype=dtype), torch.zeros(4160, 64, dtype=dtype)
    dlogprob, dentropy = torch.zeros(tokens), torch.zeros(tokens) if entropy else None
    parts = logprob_tiles_triton.stats(hidden, weight, bias, degrees, targets)
    score = logprob_triton.score(parts, states if state else None)
    for given in {dtype, torch.float32}:
        logits = torch.zeros(tokens, 4160, dtype=given)
        logprob_triton.stats(logits, bias, degrees, targets)
        out = torch.zeros(tokens, 4160, dtype=dtype)
        logprob_triton.slope(logits, bias, degrees, targets, states, score, dlogprob, dentropy, out)


WORKLOADS: dict[str, Callable[[], Launches]] = {
    "invariant": invariant,
    "logprob": logprob,
    "pack": pack,
    "permute": permute,
    "policy": policy,
    "route": route,
    "segment": segment,
}
