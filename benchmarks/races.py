"""The same launch many times: results that are not the same bits each time are a race, or an output not written.

    python -m benchmarks.races --repeats 200

On a GPU at a real size, with copies on another stream that make programs start in other orders. Before each launch what
the last one wrote is overwritten. On a CPU few and small, in Triton's interpreter if TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks import logprob, machine, pack, permute, policy, route, step
from benchmarks.case import OURS, Implementation
from benchmarks.harness import Cases, Setting
from benchmarks.models import MODELS
from pacenote.kernels.route import RouteStats, replay_topk
from pacenote.kernels.segment import segment_sum
from tests.kernels.route_oracle import FAMILIES, Inputs, of_family

SECONDS = 2.0
"""At most so long for one subject."""
GPU_TOKENS = 32767
"""No multiple of a block; nor of 16, for which Triton would compile every kernel again that the tests have compiled."""
PARTS: dict[str, tuple[Cases, Callable[[Any], Sequence[Tensor]]]] = {
    "logprob": (logprob.cases, logprob.parts_of),
    "permute": (permute.cases, permute.parts_of),
    "pack": (pack.cases, pack.fields),
    "policy": (policy.cases, policy.parts_of),
    "step": (step.cases, step.parts_of),
}
"""Benchmarks whose cases are raced, and the tensors of their results."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Call = Callable[[], Sequence[Tensor]]


def subjects(device: torch.device, tokens: int) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names, and what makes their calls: what the benchmarks measure of ours, and the routing of every family."""
    yield "segment sums", partial(summing, device, tokens)
    for name, (cases, parts) in PARTS.items():
        for model in MODELS:
            for case in cases(model, tokens, Setting(device=device)):
                ours = case.implementations[OURS]
                assert isinstance(ours, Implementation)
                yield f"{name} {model} {case.work}", partial(_bound, ours, case.make, parts)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"route {family} {str(dtype)[6:]}", partial(routing, family, dtype, device, tokens)


def routing(family: str, dtype: torch.dtype, device: torch.device, tokens: int) -> Call:
    """Both passes with all counts, on rows of every fate."""
    inputs = of_family(family, tokens=tokens).on(device)
    inputs = replace(inputs, logits=inputs.logits.to(dtype))
    return partial(_route, inputs, route.upstream(inputs))


def _route(inputs: Inputs, grad: Tensor) -> Sequence[Tensor]:
    stats, leaf = RouteStats.zeros(grad.device, inputs.logits.shape[1]), inputs.logits.detach().requires_grad_()
    weights, experts = replay_topk(leaf, inputs.rows, inputs.spec, state=inputs.state, bias=inputs.bias, stats=stats)
    (dlogits,) = torch.autograd.grad(weights, leaf, grad)
    assert stats.load is not None
    return weights, experts, dlogits, stats.counters, stats.margin, stats.load


def summing(device: torch.device, tokens: int) -> Call:
    """Sums of ragged segments, and their gradient."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, max(1, tokens // 100), (tokens,), generator=g).sort().values.int().to(device)
    values, grad = torch.randn(tokens, generator=g).to(device), torch.randn(tokens, generator=g).to(device)
    mask = values > -1

    def call() -> Sequence[Tensor]:
        leaf = values.detach().requires_grad_()
        sums = segment_sum(leaf, ids, tokens, mask=mask)
        return sums, *torch.autograd.grad(sums, leaf, grad)

    return call


def _bound(ours: Implementation[Any], make: Callable[[int], Any], parts: Callable[[Any], Sequence[Tensor]]) -> Call:
    call = ours.bind(make(0))
    return lambda: parts(call())


def bits(x: Tensor) -> Tensor:
    """[...] as integers: NaN is equal to itself, -0 is not 0."""
    return x.detach().view(INTEGERS[x.itemsize])


def race(call: Call, device: torch.device, repeats: int) -> tuple[int, int]:
    """How often the call was repeated, and how often its results had other bits than the first time."""
    results = [bits(x) for x in call()]
    first = [x.clone() for x in results]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    disturb, began, done = _disturbance(device), time.monotonic(), 0
    while done < repeats and time.monotonic() - began < SECONDS:
        for x in results:
            x.fill_(85)  # memory that the next launch is likely to be given
        disturb()
        results = [bits(x) for x in call()]
        same = [(a == b).all() for a, b in zip(first, results, strict=True)]
        wrong += ~torch.stack(same).all()
        done += 1
    return done, int(wrong)


def _disturbance(device: torch.device) -> Callable[[], None]:
    """Work on another stream, of another length each time; none on a CPU."""
    if device.type != "cuda":
        return lambda: None
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    noise, turn = torch.ones(2**24, device=device), count()

    def disturb() -> None:
        with torch.cuda.stream(stream):
            noise[: 2**24 >> next(turn) % 8].mul_(1.0)

    return disturb


def main() -> int:
    """Race all subjects; 1 if one differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.races", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help=f"default: {GPU_TOKENS} on a GPU, else 70")
    parser.add_argument("--repeats", type=int, help="default: 200 on a GPU, else 3")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no subject after so long")
    parser.add_argument("--only", default="", help="a part of the names")
    asked = parser.parse_args()
    device, began = machine.pick_device(), time.monotonic()
    on_gpu = device.type == "cuda"
    tokens, repeats = asked.tokens or (GPU_TOKENS if on_gpu else 70), asked.repeats or (200 if on_gpu else 3)
    raced, differ = 0, list[str]()
    for name, make in subjects(device, tokens):
        if asked.only not in name or time.monotonic() - began > asked.seconds:
            continue
        times, wrong = race(make(), device, repeats)
        print(f"{name}: {wrong} of {times} differ" if wrong else f"{name}: {times} times the same", flush=True)
        raced, differ = raced + 1, [*differ, *([name] if wrong else [])]
    print(f"{raced} raced on {device} with {tokens} tokens; {len(differ)} differ: {', '.join(differ) or 'none'}")
    return int(bool(differ) or not raced)


if __name__ == "__main__":
    sys.exit(main())
