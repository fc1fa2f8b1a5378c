"""Sorting (token, slot) pairs by expert: against its definition in plain torch, megatron-core and liger-kernel.

    python -m benchmarks.permute --out benchmarks/results

`plain` is `reference.permutation`, a stable sort of int64; `careful` sorts int16. megatron-core sorts a map [T, E] and
gives tokens and counts only: no slots, no inverse. liger-kernel makes the tiles of its matrix products as well, and
waits for the device to learn their number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, peers
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.models import MODELS, Model
from pacenote.kernels import reference
from pacenote.kernels.permute import Permutation, permutation


@dataclass(frozen=True, slots=True)
class Inputs:
    """experts [T, K], and E."""

    experts: Tensor
    num_experts: int


def make(model: Model, tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A routing whose experts are not equally loaded, as no router's are."""
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(tokens, model.experts, generator=g, device=device)
    lean = torch.randn(model.experts, generator=g, device=device) * 0.5
    chosen = reference.native_topk(logits + lean, model.k, model.family.spec, None)
    return Inputs(chosen.to(dtype), model.experts)


def check(inputs: Inputs, result: Any) -> None:
    """The sort is the definition's: of a Permutation all of it, of tokens and counts these.

    Raises:
        AssertionError: it is not.
    """
    expected = reference.permutation(inputs.experts, inputs.num_experts)
    if len(parts := parts_of(result)) == 2:
        tokens, counts = parts
        assert torch.equal(tokens.int(), expected.token), "tokens differ"
        assert torch.equal(counts.int(), expected.offsets.diff()), "counts differ"
        return
    order, place, offsets = parts
    assert torch.equal(order.int(), expected.order), "order differs"
    assert torch.equal(place.int().reshape(expected.place.shape), expected.place), "places differ"
    assert torch.equal(offsets.int(), expected.offsets), "offsets differ"


def parts_of(result: Any) -> tuple[Tensor, ...]:
    """order [T*K], place [T, K] and offsets [E+1] of a result; or whatever else it holds."""
    return (result.order, result.place, result.offsets) if isinstance(result, Permutation) else tuple(result)


def careful(inputs: Inputs) -> tuple[Tensor, ...]:
    """The narrowest keys that torch sorts, and int32 where it takes it."""
    keys = inputs.experts.flatten().to(torch.int16)
    by_expert = keys.sort(stable=True)
    pairs = torch.arange(len(keys), device=keys.device, dtype=torch.int32)
    place = torch.empty_like(pairs).scatter_(0, by_expert.indices, pairs)
    bins = torch.arange(inputs.num_experts + 1, device=keys.device, dtype=torch.int16)
    return by_expert.indices.int(), place, torch.searchsorted(by_expert.values, bins, out_int32=True)


def compiled(setting: harness.Setting) -> Implementation[Inputs] | Absent:
    """The definition, compiled."""

    def plain(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
        return parts_of(reference.permutation(experts, num_experts))

    found = setting.compile(plain)
    if isinstance(found, Absent):
        return found
    return Implementation(bind=lambda inputs: partial(found, inputs.experts, inputs.num_experts))


def megatron() -> Implementation[Inputs] | Absent:
    """The sort inside megatron-core's `permute`, with a hidden size of 1, and the counts its dispatcher takes."""
    module = peers.megatron()
    if isinstance(module, Absent):
        return module

    def bind(inputs: Inputs) -> Callable[[], Any]:
        tokens, k = inputs.experts.shape
        hidden = torch.zeros(tokens, 1, dtype=torch.bfloat16, device=inputs.experts.device)
        chosen = torch.zeros(tokens, inputs.num_experts, dtype=torch.bool, device=hidden.device)
        chosen.scatter_(1, inputs.experts.long(), True)
        return lambda: (module.permute(hidden, chosen, num_out_tokens=tokens * k)[2], chosen.sum(dim=0))

    return Implementation(bind=bind, note="of a map [T, E]; tokens and counts only; moves one number a token along")


def liger(device: torch.device) -> Implementation[Inputs] | Absent:
    """The routing metadata of liger-kernel's fused mixture of experts."""
    module = peers.liger("fused_moe", device)
    if not isinstance(module, ModuleType):
        return module

    def call(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
        _, offsets, _, order, place, *_ = module.compute_routing_metadata(experts, num_experts)
        return order, place, offsets

    return Implementation(
        bind=lambda inputs: partial(call, inputs.experts.int().contiguous(), inputs.num_experts),
        note="ids made int32 beforehand; waits for the device; makes the tiles of its matrix products as well",
    )


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """Experts as `replay_topk` gives them, and as they are recorded."""
    model = MODELS[name]
    for work, dtype in (("experts as routed", torch.int64), ("experts as recorded", model.ids)):
        pairs = tokens * model.k
        implementations: dict[str, Implementation[Inputs] | Absent] = {
            OURS: Implementation(bind=lambda inputs: partial(permutation, inputs.experts, inputs.num_experts)),
            "plain": Implementation(
                bind=lambda inputs: partial(reference.permutation, inputs.experts, inputs.num_experts)
            ),
            "compiled": compiled(setting)
            if dtype == torch.int64
            else Absent("compiled for experts as routed only: the rest is the same code"),
            "careful": Implementation(bind=lambda inputs: partial(careful, inputs)),
            "megatron": megatron(),
            "liger": liger(setting.device),
        }
        yield Case(
            model=name,
            tokens=tokens,
            work=work,
            shape={"experts": model.experts, "k": model.k, "ids": str(dtype)[6:]},
            floor=Floor(bytes=pairs * (dtype.itemsize + 8) + 4 * (model.experts + 1)),
            make=partial(make, model, tokens, dtype, setting.device),
            check=check,
            implementations=implementations,
        )


if __name__ == "__main__":
    sys.exit(harness.main("permute", __doc__.splitlines()[0], cases))
